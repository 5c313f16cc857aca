"""Folder of picture files named by their content, `ab/abcdef...`, with an index from URLs to contents.

Several processes may use one folder. A file is complete or absent at any moment: it is written beside, flushed, and then given its name.
The index is an SQLite database that is written after the files, so a process that is killed loses downloads of its last seconds only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mmsid.errors import CatalogError

_FLUSH_ROWS, _FLUSH_SECONDS = 256, 2.0
_STALE_SECONDS = 86_400  # a temporary file of this age belongs to a process that was killed


def _publish(temporary: str, path: Path, size: int) -> None:
    """Give a finished file its name. A file that another process has finished in the meantime stays, and keeps its time."""
    with contextlib.suppress(OSError):  # a file system without hard links
        os.link(temporary, path)
        return
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size == size:
            return
    os.replace(temporary, path)


class PictureCache:
    """A cache folder. Threads may share it.

    The index holds hashes of URLs instead of URLs, because a URL may contain a signature that gives access.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).absolute()
        self._unfinished = self.folder / "unfinished"
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._pending: dict[bytes, bytes] = {}
        self._flushed = time.monotonic()
        self._remove_stale()

    def file_of(self, sha256: str) -> Path:
        """Path of the file with this content, which may not exist."""
        return self.folder / sha256[:2] / sha256

    def store(self, data: bytes, sha256: str) -> Path:
        """Write a file, if the folder does not hold it yet."""
        path = self.file_of(sha256)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == len(data):
                return path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._unfinished.mkdir(exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self._unfinished)
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            _publish(temporary, path, len(data))
        finally:
            Path(temporary).unlink(missing_ok=True)
        return path

    def read_url(self, url: str) -> bytes | None:
        """Content that was stored for a URL; None if there is none, or if the file was changed since."""
        key = hashlib.sha256(url.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            digest = self._pending.get(key) or self._look_up(key)
        if digest is None:
            return None
        with contextlib.suppress(FileNotFoundError):
            data = self.file_of(digest.hex()).read_bytes()
            return data if hashlib.sha256(data).digest() == digest else None
        return None

    def remember_url(self, url: str, sha256: str) -> None:
        """Note the content of a URL. The note reaches the disk within seconds, or at `close`."""
        with self._lock:
            self._pending[hashlib.sha256(url.encode("utf-8", "surrogatepass")).digest()] = bytes.fromhex(sha256)
            if len(self._pending) >= _FLUSH_ROWS or time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._flush()

    def close(self) -> None:
        """Write the notes that are left."""
        with self._lock:
            if self._pending:
                self._flush()
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _flush(self) -> None:
        with self._database() as database:
            database.executemany("INSERT OR REPLACE INTO urls VALUES (?, ?)", self._pending.items())
        self._pending.clear()
        self._flushed = time.monotonic()

    def _look_up(self, key: bytes) -> bytes | None:
        if self._connection is None and not self._index.exists():
            return None
        with self._database() as database:
            row = database.execute("SELECT sha256 FROM urls WHERE url = ?", (key,)).fetchone()
        return row[0] if row else None

    @property
    def _index(self) -> Path:
        return self.folder / "urls.sqlite"

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        try:
            if self._connection is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._connection = sqlite3.connect(self._index, timeout=60, check_same_thread=False)
                self._connection.execute("CREATE TABLE IF NOT EXISTS urls (url BLOB PRIMARY KEY, sha256 BLOB NOT NULL) WITHOUT ROWID")
            with self._connection:  # one transaction
                yield self._connection
        except sqlite3.DatabaseError as error:
            raise CatalogError(
                f"{self._index}: the index of downloaded pictures cannot be used ({error}); delete this file, the pictures are then "
                "downloaded again"
            ) from error

    def _remove_stale(self) -> None:
        """Remove temporary files of processes that were killed long ago."""
        with contextlib.suppress(OSError):
            for path in self._unfinished.iterdir():
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
