"""Vectors and their item ids, from files of any size: opened in seconds, read in blocks, every faulty row counted with its number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.columns import id_texts, read_columns
from mmsid.catalog.vector_parts import ITEM_ID, MISSING, WRONG_LENGTH, MatrixPart, Part, open_parts
from mmsid.errors import CatalogError
from mmsid.id_columns import holds_integers

NOT_FINITE, ZERO = 3, 4
REASONS = {MISSING: "missing", WRONG_LENGTH: "wrong_length", NOT_FINITE: "not_finite", ZERO: "zero"}
_BLOCK_BYTES = 32 * 2**20
_IN_MEMORY = Path("vectors")  # name of an array in messages


class VectorBlock(NamedTuple):
    """Consecutive rows of vectors.

    Attributes:
        start: row of the first one, from 0.
        values: (n, D) float32; zero where there is a fault.
        faults: (n,) int8, 0 or a key of `REASONS`.
        lengths: (n,) int64, numbers that the vector has in the file.
    """

    start: int
    values: np.ndarray
    faults: np.ndarray
    lengths: np.ndarray


@dataclass
class VectorFiles:
    """Vectors of N items in one or several files.

    Attributes:
        parts: the files, in order; their rows are numbered through.
        ids: (N,) distinct texts.
        dim: D, numbers per vector.
        notes: what a user should know of how the files were read.
        integer_ids: whether the ids are whole numbers in the files.
    """

    parts: Sequence[Part]
    ids: pa.ChunkedArray
    dim: int
    notes: list[str] = field(default_factory=list)
    integer_ids: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def files(self) -> tuple[Path, ...]:
        """All files that are read."""
        return tuple(path for part in self.parts for path in part.files)

    def sha256(self) -> str:
        """Hash of all vectors and ids, for those that are no files."""
        digest = hashlib.sha256(str(self.dim).encode())
        for block in self.blocks():
            digest.update(block.values)
        for chunk in self.ids.chunks:
            digest.update("\n".join(chunk.to_pylist()).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def blocks(self) -> Iterator[VectorBlock]:
        """Read all rows in order, in blocks of about 32 MB. NaN, infinite and zero vectors are faults."""
        start = 0
        for part in self.parts:
            for values, faults, lengths in part.blocks(max(_BLOCK_BYTES // (4 * self.dim), 256), self.dim):
                finite = np.isfinite(values).all(axis=1)
                faults[~finite] = NOT_FINITE
                values[~finite] = 0
                faults[(faults == 0) & ~values.any(axis=1)] = ZERO
                yield VectorBlock(start, values, faults, lengths)
                start += len(values)

    def places(self, rows: np.ndarray) -> tuple[list[str], np.ndarray]:
        """File of each row, and its number in the file, from 1."""
        starts = np.cumsum([0, *(part.num_rows for part in self.parts)])
        part = np.searchsorted(starts, rows, side="right") - 1
        return [str(self.parts[one].path) for one in part], rows - starts[part] + 1

    def place(self, row: int) -> str:
        """`file, row n`, for messages."""
        (path,), (number,) = self.places(np.array([row]))
        return f"{path}, row {number}"


def open_vectors(
    paths: Sequence[Path],
    ids: Path | None = None,
    *,
    id_column: str | None = None,
    vector_column: str | None = None,
    config_key: str = "vectors",
) -> VectorFiles:
    """Open vectors without reading them: schema, number of rows and ids.

    Args:
        paths: parquet files, `.npy` matrices, folders of parquet files, folders of `datasets.save_to_disk`; read one after another.
        ids: a file with the ids of all rows in order: .parquet, .csv, .jsonl, .txt (one per line) or .npy. Default: the column
            `id_column` (`item_id`) of the files; the row numbers from 0 for matrices, and for tables that have no other column.

    Raises:
        CatalogError: a file is missing or has another format, columns are missing or ambiguous, files have vectors of different
            dimensions, or ids are missing, doubled or of another number than the rows.
    """
    parts = open_parts([Path(path) for path in paths], vector_column, config_key=config_key)
    if not parts:
        raise CatalogError(f"{config_key}: no file is named; name at least one file of vectors")
    return _opened(parts, None if ids is None else _ids_of_file(Path(ids), id_column), ids, id_column)


def vectors_in_memory(values: np.ndarray, ids: Sequence[str] | None = None) -> VectorFiles:
    """Vectors (N, D) that are arrays already, with N ids; without ids the row numbers from 0.

    Raises:
        CatalogError: as `open_vectors`.
    """
    given = None
    if ids is not None:
        integers = all(isinstance(one, (int, np.integer)) and not isinstance(one, bool) for one in ids)
        given = _Ids(pa.chunked_array([pa.array([str(one) for one in ids], pa.large_string())]), integers)
    return _opened([MatrixPart(_IN_MEMORY, np.asarray(values))], given, None if ids is None else "ids", None)


class _Ids(NamedTuple):
    """Ids of all rows as texts, and whether they are whole numbers where they come from."""

    texts: pa.ChunkedArray
    integers: bool


def _opened(parts: list[Part], ids: _Ids | None, ids_name: Path | str | None, id_column: str | None) -> VectorFiles:
    first, notes = parts[0], [f"{part.path}: no rows, skipped" for part in parts if not part.num_rows]
    parts = [part for part in parts if part.num_rows]
    if not parts:
        raise CatalogError(f"{first.path}: holds no rows; expected at least one vector, write the file again")
    first = parts[0]
    for part in parts[1:]:
        if part.dim != first.dim:
            raise CatalogError(
                f"{part.path}: vectors have {part.dim} numbers, those of {first.path} have {first.dim}; name files of one encoder"
            )
    num_rows = sum(part.num_rows for part in parts)
    if ids is None:
        ids = _ids_of_parts(parts, id_column)
        ids_name = None
        if ids is None:
            ids = _Ids(pa.chunked_array([pc.cast(pa.array(np.arange(num_rows)), pa.large_string())]), False)
            notes.append(f"{first.path}: no ids were given, so the row numbers 0 to {num_rows - 1} are the item ids; --ids names others")
    if len(ids.texts) != num_rows:
        raise CatalogError(f"{ids_name}: {len(ids.texts):,} ids, but {num_rows:,} vectors; give one id per row, in the order of the rows")
    files = VectorFiles(parts, ids.texts, first.dim, notes, ids.integers)
    _check_ids(files, None if ids_name is None else str(ids_name))
    return files


def _ids_of_parts(parts: Sequence[Part], id_column: str | None) -> _Ids | None:
    """Ids of all parts, or None for the row numbers."""
    chunks: list[pa.Array] = []
    integers = True
    for part in parts:
        column = id_column or ITEM_ID
        if column not in part.columns:
            if id_column is None and not any(other.columns for other in parts):
                return None
            raise CatalogError(
                f"{part.path}: no column {column!r} of item ids; its other columns: {', '.join(part.columns) or 'none'}; name one with "
                "--id-column (id_column), or a file of ids with --ids"
            )
        found = part.ids(column)
        integers &= holds_integers(found.type)
        chunks += id_texts(found, f"{part.path}, field {column!r}").chunks
    return _Ids(pa.chunked_array(chunks, type=pa.large_string()), integers)


def _ids_of_file(path: Path, id_column: str | None) -> _Ids:
    kind = path.suffix.lower()
    if kind in (".npy", ".txt"):
        if not path.is_file():
            raise CatalogError(f"ids: {path} does not exist (working folder {Path.cwd()}); correct the path")
        try:
            column = pa.array(np.load(path, allow_pickle=False)) if kind == ".npy" else _lines(path)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise CatalogError(f"ids: {path} cannot be read as {kind} ({type(error).__name__}: {error}); write one id per row") from error
        return _Ids(id_texts(pa.chunked_array([column]), f"ids: {path}"), holds_integers(column.type))
    column = id_column or ITEM_ID
    found = read_columns(path, [column], config_key="ids")
    if column not in found.names and len(found.names) == 1:
        (column,) = found.names
        found = read_columns(path, [column], config_key="ids")
    if column not in found.names:
        raise CatalogError(f"ids: {path}: no column {column!r}, it has {', '.join(found.names)}; name one with --id-column (id_column)")
    return _Ids(id_texts(found.table[column], f"ids: {path}, field {column!r}"), holds_integers(found.table[column].type))


def _lines(path: Path) -> pa.Array:
    text = path.read_text(encoding="utf-8-sig")
    return pc.split_pattern(pa.array([text.removesuffix("\n")], pa.large_string()), "\n").flatten()


def _check_ids(files: VectorFiles, ids_name: str | None) -> None:
    def places(rows: np.ndarray) -> str:
        shown = [files.place(int(row)) if ids_name is None else f"{ids_name}, id {row + 1}" for row in rows[:3]]
        return "; ".join(shown) + (f" and {len(rows) - 3:,} more" if len(rows) > 3 else "")

    ids = files.ids
    if ids.null_count:
        rows = np.flatnonzero(pc.is_null(ids).to_numpy())
        raise CatalogError(f"{places(rows)}: the item id is empty; fill it in or remove the rows")
    if pc.count_distinct(ids).as_py() < len(ids):
        counted = pc.value_counts(ids)
        doubled = counted.filter(pc.greater(counted.field("counts"), 1))
        item_id = doubled[0]["values"].as_py()
        rows = np.flatnonzero(pc.equal(ids, item_id).to_numpy())
        raise CatalogError(
            f"{places(rows)}: item id {item_id!r} occurs {len(rows)} times ({len(doubled):,} ids occur repeatedly), expected one vector "
            "per item; remove the extra rows"
        )
