"""Durable store of appended items: one sqlite file. What `add` has returned is there after a power failure or SIGKILL.

The file belongs to one bundle version, and one process at a time may open it.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmsid.disk import disk_errors, folder_lock
from mmsid.errors import ArtifactError
from mmsid.serve.known_items import Appended

FORMAT = "1"
_ITEMS = """CREATE TABLE IF NOT EXISTS items (
    place INTEGER PRIMARY KEY, item_id TEXT NOT NULL UNIQUE, content_sha256 TEXT NOT NULL, record TEXT NOT NULL, codes TEXT NOT NULL,
    raw_codes TEXT NOT NULL, margin REAL NOT NULL, embedding BLOB NOT NULL, thumbnail BLOB, added_unix REAL NOT NULL)"""


class AppendedStore:
    """Appended items of a bundle, in the order in which they were added. It must be used by the thread that made it.

    Args:
        path: sqlite file; it is created with its folder.
        version: of the bundle.

    Raises:
        ArtifactError: the file belongs to another bundle version, is damaged or in use by another process, or cannot be written.
    """

    def __init__(self, path: Path, version: str) -> None:
        self.path = Path(path)
        self._open = contextlib.ExitStack()
        try:
            with disk_errors(self.path, "Nothing was changed."):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._open.enter_context(folder_lock(self.path))
                self._db = self._open.enter_context(contextlib.closing(sqlite3.connect(self.path, timeout=10)))
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")  # the log is on the disk before a commit returns
                with self._db:
                    self._db.execute(_ITEMS)
                    self._db.execute("CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
                    about = [("format", FORMAT), ("bundle", version)]
                    self._db.executemany("INSERT OR IGNORE INTO about VALUES (?, ?)", about)
                found = dict(self._db.execute("SELECT name, value FROM about"))
        except (sqlite3.Error, ArtifactError, OSError) as error:
            self._open.close()
            raise error if isinstance(error, ArtifactError) else self._error(error) from error
        if found != dict(about):
            self._open.close()
            raise ArtifactError(
                f"{self.path} holds the items appended to bundle version {found.get('bundle')!r} (format {found.get('format')!r}), this is "
                f"version {version!r} (format {FORMAT!r}); name another file with --state, or serve the bundle that it belongs to"
            )

    def items(self) -> list[Appended]:
        """All items, in order."""
        query = "SELECT record, content_sha256, codes, raw_codes, margin, embedding, thumbnail FROM items ORDER BY place"
        try:
            return [
                Appended(
                    json.loads(record),
                    content,
                    np.array(json.loads(codes), dtype=np.int64),
                    np.array(json.loads(raw), dtype=np.int64),
                    margin,
                    np.frombuffer(embedding, dtype="<f4").astype(np.float32),
                    thumbnail,
                )
                for record, content, codes, raw, margin, embedding, thumbnail in self._db.execute(query)
            ]
        except (sqlite3.Error, ValueError) as error:
            raise self._error(error) from error

    def add(self, items: Sequence[Appended]) -> None:
        """Store items with new ids, all or none. They are on the disk when the call returns.

        Raises:
            ArtifactError: the file cannot be written.
        """
        now = time.time()
        rows = [
            (
                one.item_id,
                one.content_sha256,
                json.dumps(dict(one.record), ensure_ascii=False),
                json.dumps(one.codes.tolist()),
                json.dumps(one.raw_codes.tolist()),
                float(one.margin),
                one.embedding.astype("<f4").tobytes(),
                one.thumbnail,
                now,
            )
            for one in items
        ]
        columns = "item_id, content_sha256, record, codes, raw_codes, margin, embedding, thumbnail, added_unix"
        try:
            with self._db:
                self._db.executemany(f"INSERT INTO items ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Close the file and release its lock."""
        self._open.close()

    def _error(self, error: Exception) -> ArtifactError:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
            return ArtifactError(f"{self.path}: the disk is full, so nothing was appended; free some space")
        return ArtifactError(
            f"{self.path} cannot be used: {error}; make it writable, put back an intact copy, or name another file with --state"
        )
