"""Cache of picture features by the hash of the picture file: one sqlite file that processes may share and that can be deleted."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import numpy as np

from mmsid.errors import CatalogError

FILE_NAME = "features.sqlite"


class FeatureCache:
    """Features of picture files in `folder`. Each entry is written at once, so that a killed process loses none.

    Args:
        encoder: hash of the encoder; encoders do not share entries.
        width: number of features.
    """

    def __init__(self, folder: Path, encoder: str, width: int) -> None:
        self.path, self.encoder, self.width = Path(folder) / FILE_NAME, encoder, width
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=60)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute("CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, numbers BLOB NOT NULL) WITHOUT ROWID")
            self._database.commit()
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error

    def get(self, data: bytes) -> np.ndarray | None:
        """Features (width,) float16 of a picture file with these bytes, if they are known."""
        try:
            row = self._database.execute("SELECT numbers FROM features WHERE key = ?", (self._key(data),)).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        found = None if row is None else np.frombuffer(row[0], dtype="<f2")
        return found if found is not None and found.shape == (self.width,) else None

    def put(self, data: bytes, features: np.ndarray) -> None:
        """Store the features (width,) of a picture file."""
        try:
            with self._database:
                row = (self._key(data), features.astype("<f2").tobytes())
                self._database.execute("INSERT OR REPLACE INTO features VALUES (?, ?)", row)
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _key(self, data: bytes) -> bytes:
        return hashlib.sha256(self.encoder.encode() + hashlib.sha256(data).digest()).digest()

    def _unusable(self, error: Exception) -> CatalogError:
        return CatalogError(
            f"{self.path}: the cache of picture features cannot be used ({error}); delete this file (the features are computed again), "
            "or set catalog.picture_cache to a folder that can be written"
        )
