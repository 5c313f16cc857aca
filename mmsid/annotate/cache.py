"""Cache of annotation results by content hash: one sqlite file that jobs may share and that can be deleted at any time."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mmsid.errors import AnnotationError


class AnnotationCache:
    """Maps `input_sha256` to the result of a generation. Only valid results are stored, so that failures are tried again.

    With `path=None` the store is a temporary file of this job: it only shares results between duplicates within the job.
    Each `put` is one transaction; a SIGKILL loses at most the transaction in progress.

    Raises:
        AnnotationError: reason `cache_unreadable`, when the file is not a sqlite database or cannot be written; `cache_full`
            when its disk is full; `cache_busy` when another job kept it locked for a minute.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        try:
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect("" if path is None else str(path), timeout=60.0)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS annotations (input_sha256 TEXT PRIMARY KEY, outcome TEXT NOT NULL) WITHOUT ROWID")
            self._db.commit()
        except (sqlite3.Error, OSError) as error:
            raise self._cache_error(error) from error

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The stored results of those `keys` that are in the cache."""
        unique = list(dict.fromkeys(keys))
        found: dict[str, dict[str, Any]] = {}
        try:
            for start in range(0, len(unique), 500):
                part = unique[start : start + 500]
                marks = ",".join("?" * len(part))
                rows = self._db.execute(f"SELECT input_sha256, outcome FROM annotations WHERE input_sha256 IN ({marks})", part)
                found.update((key, json.loads(result)) for key, result in rows)
        except (sqlite3.Error, json.JSONDecodeError) as error:
            raise self._cache_error(error) from error
        return found

    def put(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Store `results`. An existing entry is kept, so that a published row never changes."""
        rows = [(key, json.dumps(result, ensure_ascii=False)) for key, result in results.items()]
        try:
            with self._db:
                self._db.executemany("INSERT OR IGNORE INTO annotations VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise self._cache_error(error) from error

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> AnnotationCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _cache_error(self, error: Exception) -> AnnotationError:
        code = getattr(error, "sqlite_errorname", "")
        where = self.path or "in the folder for temporary files"
        if code == "SQLITE_FULL":
            return AnnotationError(
                "cache_full", f"annotation cache {where}: the disk is full; free some space and run again (results are kept)"
            )
        if code.startswith("SQLITE_BUSY"):
            return AnnotationError("cache_busy", f"annotation cache {where}: another job keeps it locked; wait, or name another `cache`")
        if code.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN")):
            return AnnotationError("cache_unreadable", f"annotation cache {where}: {error}; make it writable, or name another `cache`")
        return AnnotationError(
            "cache_unreadable",
            f"annotation cache {self.path}: {error}; delete the file (results are then generated again) or set cache: null",
        )
