"""Ids and content hashes of all rows of the parts, and the rows that cannot become items."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.arrow_files import arrow_rows, read_arrow
from mmsid.catalog.vectors import ItemVectors

NO_ID, DUPLICATE_ID = "no_id", "duplicate_id"


@dataclass
class RowIndex:
    """Ids and content of R rows, in the order of the parts.

    Attributes:
        item_ids: (R,) large_string, null where a row has no id.
        id_rank: (R,) int64, position of each row in the order of ids; rows without id come last.
        content: (R, 4) uint64, the content hash as four numbers, the most significant first.
        file, row: (R,) number of the source file and of the row in it.
    """

    item_ids: pa.Array
    id_rank: np.ndarray
    content: np.ndarray
    file: np.ndarray
    row: np.ndarray

    @classmethod
    def read(cls, parts: Sequence[Path]) -> RowIndex:
        """Read the index of the rows of all parts. The columns are filled in place: two copies of them would be the peak of ingest."""
        total = sum(arrow_rows(path) for path in parts)
        content, row = np.empty((total, 4), dtype=np.uint64), np.empty(total, dtype=np.int64)
        file = np.empty(total, dtype=np.int32)
        ids, start = [], 0
        for path in parts:
            part = read_arrow(path, ["item_id", "content_sha256", "file", "row"])
            here = slice(start, start := start + len(part))
            of_part = part["item_id"].combine_chunks()
            ids.append(pc.if_else(pc.equal(of_part, ""), pa.scalar(None, of_part.type), of_part))
            content[here] = _numbers(part["content_sha256"].combine_chunks())
            file[here], row[here] = part["file"].to_numpy(), part["row"].to_numpy()
        item_ids = pa.concat_arrays(ids) if ids else pa.array([], pa.large_string())
        ids.clear()
        by_id = np.asarray(pc.sort_indices(item_ids)).view(np.int64)
        rank = np.empty_like(by_id)
        rank[by_id] = np.arange(len(by_id))
        return cls(item_ids, rank, content, file, row)

    def __len__(self) -> int:
        return len(self.item_ids)

    def content_order(self) -> np.ndarray:
        """(R,) rows sorted by content hash, then by id."""
        first = self.content[:, 0]  # rows of different content hardly ever share it, and sorting by all four needs a copy of them
        order = np.lexsort((self.id_rank, first))
        tied = np.flatnonzero(first[order[1:]] == first[order[:-1]])
        if (self.content[order[tied]] == self.content[order[tied + 1]]).all():
            return order
        return np.lexsort((self.id_rank, *self.content.T[::-1]))

    def add_vectors(self, rows: np.ndarray, vectors: ItemVectors) -> None:
        """Make the vectors a part of the content of `rows`."""
        for row, values, present in zip(rows.tolist(), vectors.values.astype("<f4"), vectors.present.tolist(), strict=True):
            if present:
                self.content[row] = _numbers_of(hashlib.sha256(self.content_hex(row).encode() + values.tobytes()).digest())

    def content_hex(self, row: int) -> str:
        """Content hash of a row, 64 hex digits."""
        return self.content[row].astype(">u8").tobytes().hex()

    def content_texts(self, rows: np.ndarray) -> list[str]:
        """Content hashes of `rows`, 64 hex digits each."""
        digits = self.content[rows].astype(">u8").tobytes().hex()
        return [digits[start : start + 64] for start in range(0, len(digits), 64)]

    def unusable(self) -> dict[int, str]:
        """Row -> `no_id`, or `duplicate_id` for all rows of an id but the one whose content comes first."""
        found = dict.fromkeys(np.flatnonzero(np.asarray(pc.is_null(self.item_ids))).tolist(), NO_ID)
        by_id = np.empty_like(self.id_rank)
        by_id[self.id_rank] = np.arange(len(by_id))
        by_id = by_id[: len(by_id) - len(found)]
        if len(by_id) < 2:
            return found
        ids = self.item_ids.take(pa.array(by_id))
        repeats = np.flatnonzero(np.asarray(pc.equal(ids.slice(1), ids.slice(0, len(ids) - 1)))) + 1
        groups: dict[int, list[int]] = {}
        first = -1
        for place in repeats.tolist():
            first = first if first in groups and place == first + len(groups[first]) else place - 1
            groups.setdefault(first, [int(by_id[first])]).append(int(by_id[place]))
        for rows in groups.values():
            kept = min(rows, key=lambda row: (*self.content[row].tolist(), self.file[row], self.row[row]))
            found |= dict.fromkeys((row for row in rows if row != kept), DUPLICATE_ID)
        return found


def _numbers(hashes: pa.Array) -> np.ndarray:
    """(R, 4) uint64 of (R,) texts of 64 hex digits."""
    if not len(hashes):
        return np.empty((0, 4), dtype=np.uint64)
    return _numbers_of(bytes.fromhex("".join(hashes.to_pylist()))).reshape(-1, 4)


def _numbers_of(digests: bytes) -> np.ndarray:
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)
