"""Vectors of items that the user brings: embeddings of a two-tower model, a graph model or another encoder, read from parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmsid.catalog.columns import id_texts, no_known_id, rows_of
from mmsid.catalog.logs.times import is_number
from mmsid.errors import CatalogError

ID, VECTOR, INTERACTIONS = "item_id", "vector", "interactions"
_BATCH_ROWS = 65_536


@dataclass(frozen=True)
class ItemVectors:
    """Vectors of N items, in the order of the ids that they were read for.

    Attributes:
        values: (N, D) float32, rows of zeros where there is no vector.
        present: (N,) bool, whether the item has a vector that is not zero.
        counts: (N,) float64, the number of interactions that the vector is based on, 0 where it is absent. None if the file has no
            column `interactions`.
        unknown: rows of the file whose id is not among the items.
        widths: dimension of each family of vectors; their sum is D.
    """

    values: np.ndarray
    present: np.ndarray
    counts: np.ndarray | None = None
    unknown: int = 0
    widths: tuple[int, ...] = ()

    def take(self, rows: np.ndarray) -> ItemVectors:
        """The vectors of the items `rows`, in this order."""
        counts = None if self.counts is None else self.counts[rows]
        return replace(self, values=self.values[rows], present=self.present[rows], counts=counts)

    def normalised(self) -> ItemVectors:
        """Each family normalised to unit rows and divided by the square root of the number of families; zeros stay zeros."""
        scale = np.float32(np.sqrt(len(self.widths)))
        return replace(self, values=np.concatenate([unit_rows(family) / scale for family in self._families()], 1))

    def of_items(self) -> list[tuple[np.ndarray, ...]]:
        """Vectors of each item, one (D_f,) array per family."""
        return list(zip(*self._families(), strict=True))

    def _families(self) -> list[np.ndarray]:
        return np.split(self.values, np.cumsum(self.widths)[:-1], axis=1)

    def summary(self) -> str:
        """One sentence: how many items have a vector, and how many rows belong to no item."""
        items, found = len(self.present), int(self.present.sum())
        share, others = 100 * found / max(items, 1), f"; {self.unknown:,} rows belong to no item of the catalogue" if self.unknown else ""
        return f"{found:,} of {items:,} items ({share:.1f} %) have a vector of dimension {self.values.shape[1]}{others}"


def read_vectors(path: str | Path, item_ids: Sequence[str]) -> ItemVectors:
    """Read the vectors of the items `item_ids` from a parquet file.

    The file has the columns `item_id` and `vector` (a list of D numbers, of fixed or variable size, of any width) and may have
    `interactions`. It is read in batches of rows. A null or zero vector counts as absent.

    Raises:
        CatalogError: the file cannot be read, a column is missing, vectors have unequal lengths or values that are not finite, an id
            is missing or occurs twice, or no id is among `item_ids`.
    """
    path = Path(path)
    if not path.is_file():
        raise CatalogError(f"vectors: {path} does not exist or is not a file (working folder {Path.cwd()}); correct the path")
    try:
        with pq.ParquetFile(path) as file:
            return _read(path, file, item_ids)
    except (OSError, pa.ArrowException) as error:
        raise CatalogError(f"{path} cannot be read as parquet ({type(error).__name__}: {error}); write the file again") from error


def several(paths: Sequence[str | Path], item_ids: Sequence[str]) -> ItemVectors:
    """Read several families of vectors and concatenate them, (N, D_1 + D_2 + ...).

    Each family is normalised to unit rows and divided by the square root of the number of families. An item that lacks a family has
    zeros there. `counts` is the largest count of the files that have counts.

    Raises:
        CatalogError: as `read_vectors`, or there is no path.
    """
    if not paths:
        raise CatalogError("vectors: no file is named; name at least one parquet file with item_id and vector")
    return concatenated([read_vectors(path, item_ids) for path in paths]).normalised()


def concatenated(families: Sequence[ItemVectors]) -> ItemVectors:
    """Vectors of several families beside each other, (N, D_1 + D_2 + ...), unchanged.

    An item has a vector if one family has one. `counts` is the largest count of the families that have counts.
    """
    counts = [family.counts for family in families if family.counts is not None]
    return ItemVectors(
        np.concatenate([family.values for family in families], 1),
        np.any([family.present for family in families], 0),
        np.max(counts, 0) if counts else None,
        sum(family.unknown for family in families),
        tuple(width for family in families for width in family.widths),
    )


def unit_rows(values: np.ndarray) -> np.ndarray:
    """Rows (N, D) divided by their norms; zero rows stay zero."""
    largest = np.abs(values).max(1, keepdims=True)
    scaled = values / np.where(largest > 0, largest, 1)  # the squares of huge and tiny values neither overflow nor vanish
    return scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1)  # 1 or more where the row is not zero


def _read(path: Path, file: pq.ParquetFile, item_ids: Sequence[str]) -> ItemVectors:
    columns = file.schema_arrow.names
    for name in (ID, VECTOR):
        if columns.count(name) != 1:
            raise CatalogError(f"{path}: expected one column {name!r}, found the columns {', '.join(columns)}; rename or add it")
    ids = id_texts(file.read(columns=[ID])[ID], f"{path}, field {ID!r}")
    rows = _checked_rows(path, ids, item_ids)
    kind = file.schema_arrow.field(VECTOR).type
    if not (_is_list(kind) and is_number(kind.value_type)):
        raise CatalogError(f"{path}, field {VECTOR!r}: holds {kind}, expected a list of numbers; write one list of numbers per item")
    values = present = None
    start = 0
    for batch in file.iter_batches(_BATCH_ROWS, columns=[VECTOR]):
        given, block = _block(path, batch.column(0), start, ids, None if values is None else values.shape[1])
        if block is not None:
            if values is None:
                values, present = np.zeros((len(item_ids), block.shape[1]), np.float32), np.zeros(len(item_ids), bool)
            target = rows[start : start + len(given)][given]
            kept = (target >= 0) & np.any(block != 0, 1)
            values[target[kept]], present[target[kept]] = block[kept], True
        start += len(given)
    if values is None:
        raise CatalogError(f"{path}, field {VECTOR!r}: no row has a vector; expected at least one, write the file again")
    counts = _counts(path, file, rows, ids, present) if INTERACTIONS in columns else None
    return ItemVectors(values, present, counts, int((rows < 0).sum()), (values.shape[1],))


def _checked_rows(path: Path, ids: pa.ChunkedArray, item_ids: Sequence[str]) -> np.ndarray:
    """Catalogue row (R,) of each row of the file, or -1."""
    if ids.null_count:
        row = int(np.flatnonzero(pc.is_null(ids).to_numpy())[0]) + 1
        raise CatalogError(f"{path}, row {row}, field {ID!r}: empty, expected an id; fill it in or remove the row")
    if pc.count_distinct(ids).as_py() < len(ids):
        counted = pc.value_counts(ids)
        doubled = counted.filter(pc.greater(counted.field("counts"), 1))
        item_id, count = doubled[0]["values"].as_py(), doubled[0]["counts"].as_py()
        places = ", ".join(str(row + 1) for row in np.flatnonzero(pc.equal(ids, item_id).to_numpy())[:5])
        raise CatalogError(
            f"{path}, rows {places}: {ID} {item_id!r} occurs {count} times ({len(doubled)} ids occur repeatedly), expected one vector per "
            "item; remove the extra rows"
        )
    rows = rows_of(ids, item_ids)
    if not (rows >= 0).any():
        raise no_known_id(path, ID, ids, item_ids)
    return rows


def _block(path: Path, column: pa.Array, start: int, ids: pa.ChunkedArray, width: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Which rows of a batch have a vector (R,) bool, and these vectors (G, D) float32, or None if there are none."""
    given = pc.is_valid(column).to_numpy(zero_copy_only=False)
    if not given.any():
        return given, None
    column = column.filter(pa.array(given))
    numbers = start + np.flatnonzero(given)  # rows of the file, counted from 0
    lengths = pc.list_value_length(column).to_numpy()
    width = int(lengths[0]) if width is None else width
    if width == 0:
        raise CatalogError(f"{_at(path, numbers[0], ids)}: the vector is empty, expected at least one number; write null for no vector")
    if (lengths != width).any():
        other = int(np.flatnonzero(lengths != width)[0])
        raise CatalogError(
            f"{_at(path, numbers[other], ids)}: the vector has {lengths[other]} numbers, those before it have {width}; "
            "write vectors of one length"
        )
    with np.errstate(over="ignore"):
        block = np.asarray(column.flatten().to_numpy(zero_copy_only=False)).astype(np.float32).reshape(-1, width)
    if not np.isfinite(block).all():
        bad = int(np.flatnonzero(~np.isfinite(block).all(1))[0])
        value = column[bad].as_py()[int(np.flatnonzero(~np.isfinite(block[bad]))[0])]
        raise CatalogError(f"{_at(path, numbers[bad], ids)}: the vector contains {value}, expected finite float32 numbers; correct it")
    return given, block


def _counts(path: Path, file: pq.ParquetFile, rows: np.ndarray, ids: pa.ChunkedArray, present: np.ndarray) -> np.ndarray:
    column = file.read(columns=[INTERACTIONS])[INTERACTIONS]
    if not is_number(column.type):
        raise CatalogError(f"{path}, field {INTERACTIONS!r}: holds {column.type}, expected numbers; write a count per item")
    found = pc.fill_null(pc.cast(column, pa.float64()), 0.0).to_numpy()
    bad = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    if len(bad):
        raise CatalogError(f"{_at(path, bad[0], ids)}: {INTERACTIONS} is {found[bad[0]]:g}, expected a count of 0 or more; correct it")
    counts = np.zeros(len(present))
    counts[rows[rows >= 0]] = found[rows >= 0]
    return np.where(present, counts, 0.0)


def _at(path: Path, row: int, ids: pa.ChunkedArray) -> str:
    return f"{path}, row {row + 1}, {ID} {ids[int(row)].as_py()!r}"


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
