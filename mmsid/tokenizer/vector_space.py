"""Vectors of a quantizer as one memory-mapped matrix on disk: checked, normalised and, if behaviour is given, fused with it.

The matrix is written in one pass over the source in blocks, so that it may be larger than the memory. It is a safetensors file, which
also serves as `embeddings.safetensors` of the SID folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.columns import no_known_id
from mmsid.catalog.vector_files import REASONS, VectorFiles
from mmsid.catalog.vectors import unit_rows
from mmsid.errors import CatalogError
from mmsid.id_columns import id_array
from mmsid.progress import track
from mmsid.quantize import fuse

EMBEDDINGS = "embeddings.safetensors"
_HEADER_BYTES = 256  # space for the safetensors header, which is written last, when the number of rows is known
_DIGEST_BYTES = 16


class MatrixWriter:
    """Writes a float32 matrix (N, D) in blocks of rows, as a safetensors file with the tensor `embeddings`. A context manager."""

    def __init__(self, path: Path, dim: int) -> None:
        self.path, self.dim, self.rows = path, dim, 0

    def __enter__(self) -> MatrixWriter:
        self._file = open(self.path, "wb")
        self._file.write(b" " * _HEADER_BYTES)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, block: np.ndarray) -> None:
        """Write (n, D) rows."""
        self._file.write(np.ascontiguousarray(block, dtype="<f4").data)
        self.rows += len(block)

    def finish(self) -> np.ndarray:
        """Write the header and return the matrix, memory-mapped. Changes of the returned array are not written to the file."""
        size = 4 * self.rows * self.dim
        header = json.dumps({"embeddings": {"dtype": "F32", "shape": [self.rows, self.dim], "data_offsets": [0, size]}}).encode()
        self._file.seek(0)
        self._file.write((_HEADER_BYTES - 8).to_bytes(8, "little") + header.ljust(_HEADER_BYTES - 8))
        self._file.close()
        if not self.rows:
            return np.zeros((0, self.dim), dtype=np.float32)
        return np.memmap(self.path, dtype="<f4", mode="c", offset=_HEADER_BYTES, shape=(self.rows, self.dim))


@dataclass
class VectorSpace:
    """The vectors that are quantised.

    Attributes:
        values: (n, D) float32, rows of norm 1 (content), or [content ; weight x behaviour].
        rows: (n,) rows of the source that are in `values`; the others are in `problems`.
        contents: (n,) int64; equal numbers = equal vectors. Their order is that of a hash of the vectors, so it is independent of the
            order of the rows.
        problems: item_id, file, row (from 1), reason, length of every vector that cannot be used.
        with_behaviour: (n,) bool, items that have a behaviour vector; None if none was asked for.
    """

    values: np.ndarray
    rows: np.ndarray
    contents: np.ndarray
    problems: pa.Table
    with_behaviour: np.ndarray | None = None

    def sample(self, size: int, seed: int) -> np.ndarray:
        """(min(size, n),) ascending rows of `values`, drawn by content, so that the draw does not depend on their order."""
        if size >= len(self.values):
            return np.arange(len(self.values))
        distinct, first = np.unique(self.contents, return_index=True)
        if size >= len(distinct):
            return np.sort(first)
        drawn = np.random.default_rng(seed).choice(len(distinct), size, replace=False)
        return np.sort(first[drawn])


class BehaviourLookup:
    """Behaviour vectors of items by row: each normalised to norm 1, zero where an item has none.

    Args:
        files: vectors by item id. item_ids: ids of the N items. path: scratch file.
    Attributes:
        present: (N,) bool, items that have a vector.
        notes: counts of unknown ids and of unusable rows.
    Raises:
        CatalogError: no id of the file is among the items.
    """

    def __init__(self, files: VectorFiles, item_ids: pa.ChunkedArray, path: Path) -> None:
        found = pc.index_in(item_ids, value_set=files.ids.combine_chunks())
        self._row = pc.fill_null(found, -1).to_numpy().astype(np.int64)
        known = int((self._row >= 0).sum())
        if not known:
            raise no_known_id(files.parts[0].path, "item_id", files.ids, item_ids.slice(0, 3).to_pylist())
        faulty = np.zeros(len(files), dtype=np.int8)
        with MatrixWriter(path, files.dim) as writer:
            for block in _progress(files, "behaviour"):
                writer.append(unit_rows(block.values))
                faulty[block.start : block.start + len(block.faults)] = block.faults
            self._values = writer.finish()
        self._row[(self._row >= 0) & (faulty[self._row] > 0)] = -1
        self.dim, self.present = files.dim, self._row >= 0
        counts = {reason: int((faulty == code).sum()) for code, reason in REASONS.items()}
        unusable = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
        self.notes = [
            *files.notes,
            f"behaviour: {int(self.present.sum()):,} of {len(item_ids):,} items have a vector, the others are read by content alone"
            + (f"; {len(files) - known:,} rows belong to no item" if len(files) > known else "")
            + (f"; unusable rows: {unusable}" if unusable else ""),
        ]

    def of(self, rows: np.ndarray) -> np.ndarray:
        """(n,) item rows -> (n, M) float32."""
        at = self._row[rows]
        found = np.zeros((len(rows), self.dim), dtype=np.float32)
        found[at >= 0] = self._values[at[at >= 0]]
        return found


def write_space(files: VectorFiles, path: Path, behaviour: BehaviourLookup | None = None, weight: float = 1.0) -> VectorSpace:
    """Read all vectors once, and write the usable ones to `path`.

    Raises:
        CatalogError: more than half of the vectors are unusable.
    """
    dim = files.dim + (0 if behaviour is None else behaviour.dim)
    faults, lengths = np.zeros(len(files), dtype=np.int8), np.zeros(len(files), dtype=np.int64)
    digests = bytearray()
    with MatrixWriter(path, dim) as writer:
        for block in _progress(files, "reading vectors"):
            span = slice(block.start, block.start + len(block.values))
            faults[span], lengths[span] = block.faults, block.lengths
            usable = np.flatnonzero(block.faults == 0)
            values = unit_rows(block.values[usable])
            if behaviour is not None:
                values = fuse(values, behaviour.of(block.start + usable), weight)
            values = np.ascontiguousarray(values + np.float32(0))  # turns -0.0 into 0.0
            writer.append(values)
            digests += b"".join(hashlib.blake2b(row, digest_size=_DIGEST_BYTES).digest() for row in values)
        problems = _problems(files, np.flatnonzero(faults), faults, lengths)
        if 2 * len(problems) > len(files):
            raise _too_many(files, problems)
        values = writer.finish()
    rows = np.flatnonzero(faults == 0)
    return VectorSpace(values, rows, _ranks(digests), problems, None if behaviour is None else behaviour.present[rows])


def _progress(files: VectorFiles, what: str) -> Iterator:
    return track(files.blocks(), what, total=len(files), unit="vectors", size=lambda block: len(block.values))


def _ranks(digests: bytearray) -> np.ndarray:
    """Number digests: (n,) int64, in the order of the digests."""
    first, second = np.frombuffer(digests, dtype=">u8").reshape(-1, 2).T.astype(np.uint64)
    order = np.lexsort((second, first))
    changed = np.zeros(len(order), dtype=bool)
    for words in (first[order], second[order]):
        changed[1:] |= words[1:] != words[:-1]
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.cumsum(changed)
    return ranks


def _problems(files: VectorFiles, rows: np.ndarray, faults: np.ndarray, lengths: np.ndarray) -> pa.Table:
    paths, numbers = files.places(rows)
    return pa.table(
        {
            "item_id": id_array(files.ids.take(pa.array(rows)).combine_chunks(), files.integer_ids),
            "file": pa.array(paths, pa.string()),
            "row": pa.array(numbers, pa.int64()),
            "reason": pa.array([REASONS[int(code)] for code in faults[rows]], pa.string()),
            "length": pa.array(lengths[rows], pa.int64()),
        }
    )


def problem_counts(problems: pa.Table) -> dict[str, int]:
    """Reason -> number of vectors."""
    counted = pc.value_counts(problems["reason"])
    return {one["values"]: one["counts"] for one in sorted(counted.to_pylist(), key=lambda one: one["values"])}


def example_rows(files: VectorFiles, problems: pa.Table, reason: str, count: int = 3) -> str:
    """The first rows with a reason, for messages."""
    found = problems.filter(pc.equal(problems["reason"], reason)).slice(0, count).to_pylist()
    detail = f" ({{length}} numbers, expected {files.dim})" if reason == "wrong_length" else ""
    return ", ".join(f"{one['file']} row {one['row']}" + detail.format(**one) for one in found)


def _too_many(files: VectorFiles, problems: pa.Table) -> CatalogError:
    parts = [f"{count:,} {reason} ({example_rows(files, problems, reason)})" for reason, count in problem_counts(problems).items()]
    return CatalogError(
        f"{len(problems):,} of {len(files):,} vectors cannot be used: {'; '.join(parts)}; more than half is taken for a mistake in the "
        "file or in the column, correct it"
    )
