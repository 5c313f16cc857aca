"""Items that a service knows: those of the bundle and those appended later, with titles, thumbnails, codes and embeddings."""

from __future__ import annotations

import base64
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mmsid.artifacts import read_table
from mmsid.serve.bundling import ITEMS
from mmsid.sids.table import token
from mmsid.tokenizer.bundle import Bundle

_QUERIES = 64  # embeddings compared at once: limits memory
EXAMPLES = 8  # items shown per prefix


@dataclass(frozen=True)
class Appended:
    """An item that was appended, as it is stored.

    Attributes:
        record: item_id, title, description, categories, attributes, caption, interests.
        codes, raw_codes: (L,) int64.
        embedding: (D,) float32.
        thumbnail: WebP, or None.
    """

    record: Mapping[str, Any]
    content_sha256: str
    codes: np.ndarray
    raw_codes: np.ndarray
    margin: float
    embedding: np.ndarray
    thumbnail: bytes | None

    @property
    def item_id(self) -> str:
        return self.record["item_id"]


class KnownItems:
    """N items in the order of the SID table, then the appended ones. Several threads may read while one adds.

    Attributes:
        row_of: item id -> row.
        codes: (N, L) published codes.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.row_of = bundle.table.row_of
        self._ids = list(bundle.table.item_ids)
        self._suffix = bundle.table.suffix
        self._codes, self._embeddings = bundle.table.codes.copy(), bundle.embeddings.numpy().astype(np.float32)
        self._count = len(self._ids)
        self._texts: pa.Table | None = None
        if "items" in bundle.parts:
            self._texts = read_table(bundle.folder / ITEMS)
        self._appended: list[Appended] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    @property
    def codes(self) -> np.ndarray:
        return self._codes[: self._count]

    @property
    def embeddings(self) -> np.ndarray:
        """(N, D) float32."""
        return self._embeddings[: self._count]

    def content_hashes(self) -> list[str]:
        """Content hash of every item; '' where the bundle has no texts of it."""
        first = len(self._ids) - len(self._appended)
        known = [""] * first if self._texts is None else self._texts["content_sha256"].to_pylist()
        return known + [one.content_sha256 for one in self._appended]

    def content_sha256(self, row: int) -> str:
        """Content hash of one item."""
        first = len(self._ids) - len(self._appended)
        if row >= first:
            return self._appended[row - first].content_sha256
        return "" if self._texts is None else self._texts["content_sha256"][row].as_py()

    def add(self, items: Sequence[Appended]) -> None:
        """Append items with new ids."""
        with self._lock:
            self._codes = _with_room(self._codes, self._count, len(items))
            self._embeddings = _with_room(self._embeddings, self._count, len(items))
            for item in items:
                self._codes[self._count], self._embeddings[self._count] = item.codes, item.embedding
                self._ids.append(item.item_id)
                self._appended.append(item)
                self.row_of[item.item_id] = self._count
                self._count += 1

    def card(self, row: int, *, picture: bool = True) -> dict[str, Any]:
        """What is shown of one item: `item_id`, `title`, `sid`, `caption`, `interests`, `picture` (data URL or None), `appended`."""
        with self._lock:
            first = len(self._ids) - len(self._appended)
            if row >= first:
                item = self._appended[row - first]
                texts = {name: item.record[name] for name in ("title", "caption", "interests")} | {"thumbnail": item.thumbnail}
            elif self._texts is not None:
                names = ("title", "caption", "interests", *(("thumbnail",) if picture else ()))
                texts = {name: self._texts[name][row].as_py() for name in names}
            else:
                texts = {"title": "", "caption": "", "interests": []}
            found = {"item_id": self._ids[row], "title": texts["title"], "sid": self.sid(row)}
        found |= {"caption": texts["caption"], "interests": texts["interests"], "appended": row >= first}
        data = texts.get("thumbnail") if picture else None
        return found | {"picture": None if data is None else f"data:image/webp;base64,{base64.b64encode(data).decode()}"}

    def sid(self, row: int) -> list[str]:
        """SID tokens of one item."""
        codes = self._codes[row].tolist()
        if self._suffix is not None and row < len(self._suffix):
            codes.append(int(self._suffix[row]))
        return [token(level, code) for level, code in enumerate(codes) if code >= 0]

    def nearest(self, embeddings: np.ndarray, k: int) -> list[list[tuple[int, float]]]:
        """(row, cosine) of the k nearest items of each embedding (n, D) of unit length, nearest first."""
        known, found = self.embeddings, []
        k = min(k, len(known))
        for start in range(0, len(embeddings), _QUERIES):
            similarity = embeddings[start : start + _QUERIES] @ known.T
            rows = np.argpartition(-similarity, k - 1, axis=1)[:, :k] if k else np.zeros((len(similarity), 0), np.int64)
            for values, best in zip(similarity, rows, strict=True):
                order = best[np.lexsort((best, -values[best]))]
                found.append([(int(row), float(values[row])) for row in order])
        return found

    def path(self, codes: np.ndarray, embedding: np.ndarray) -> list[tuple[str, int, list[int]]]:
        """Per level: the token of a code of (L,), how many items share the prefix up to it, and the nearest of them as rows."""
        rows, found = np.arange(self._count), []
        for level, code in enumerate(codes.tolist()):
            rows = rows[self.codes[rows, level] == code]
            similarity = self._embeddings[rows] @ embedding
            best = np.argpartition(-similarity, EXAMPLES)[:EXAMPLES] if len(rows) > EXAMPLES else np.arange(len(rows))
            best = best[np.lexsort((rows[best], -similarity[best]))]
            found.append((token(level, code), len(rows), rows[best].tolist()))
        return found


def _with_room(array: np.ndarray, used: int, more: int) -> np.ndarray:
    """The array itself, or a larger copy if `more` rows do not fit into it."""
    if used + more <= len(array):
        return array
    grown = np.zeros((max(used + more, len(array) + len(array) // 4 + 64), *array.shape[1:]), array.dtype)
    grown[:used] = array[:used]
    return grown
