"""Files of vectors, one after another in memory-bounded blocks: parquet, `.npy`, and folders of `datasets.save_to_disk`.

A part is one such file or folder. It knows its columns and its number of rows without reading the vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmsid.catalog.logs.times import is_number
from mmsid.errors import CatalogError

ITEM_ID, VECTOR = "item_id", "vector"
MISSING, WRONG_LENGTH = 1, 2  # faults of a row; 0: none
_STREAM_BYTES = 2**20  # read-ahead per parquet column, instead of a whole row group
_PEEK_ROWS = 1024


class Part(Protocol):
    """One source of vectors.

    Attributes:
        path: for messages.
        files: the files whose hashes identify the source; empty for vectors in memory.
        num_rows: number of rows.
        columns: columns that may hold ids; empty for a bare matrix.
        dim: numbers per vector (of most of the first rows, if they differ).
    """

    path: Path
    files: tuple[Path, ...]
    num_rows: int
    columns: tuple[str, ...]
    dim: int

    def ids(self, column: str) -> pa.ChunkedArray:
        """The column of ids, as it is stored."""

    def blocks(self, rows: int, dim: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Blocks of at most `rows` rows: vectors (n, dim) float32, faults (n,) int8 and lengths (n,) int64 of the vectors found.

        A row with a fault is zero."""


class MatrixPart:
    """A matrix (N, D) of numbers: a memory-mapped `.npy` file, or an array in memory (`path` is then only a name)."""

    columns: tuple[str, ...] = ()

    def __init__(self, path: Path, values: np.ndarray | None = None) -> None:
        self.path, self.files = path, (path,) if values is None else ()
        if values is None:
            try:
                values = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise CatalogError(f"{path} cannot be read as .npy ({type(error).__name__}: {error}); write it with numpy.save") from error
        if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "fiu" or not values.shape[1]:
            found = f"{values.dtype} of shape {values.shape}" if isinstance(values, np.ndarray) else "an archive of several arrays"
            raise CatalogError(f"{path}: holds {found}, expected a matrix of numbers (items, dimensions); write one row per item")
        self._values, (self.num_rows, self.dim) = values, values.shape

    def ids(self, column: str) -> pa.ChunkedArray:
        """A matrix has no column of ids."""
        raise CatalogError(f"{self.path}: a matrix has no column {column!r}; pass a file of ids")

    def blocks(self, rows: int, dim: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """See `Part`."""
        for start in range(0, self.num_rows, rows):
            with np.errstate(over="ignore"):  # a value beyond float32 becomes infinite, which is counted as not finite
                block = np.array(self._values[start : start + rows], dtype=np.float32)
            yield block, np.zeros(len(block), dtype=np.int8), np.full(len(block), self.dim)


class _ListPart(ABC):
    """A table with a column of lists of numbers."""

    path: Path
    files: tuple[Path, ...]
    num_rows: int

    def _resolve(self, schema: pa.Schema, vector_column: str | None) -> None:
        lists = [field.name for field in schema if _is_vector(field.type)]
        if vector_column is None:
            vector_column = VECTOR if VECTOR in lists else lists[0] if len(lists) == 1 else None
        if vector_column not in lists:
            named = f"no column {vector_column!r} of vectors" if vector_column else "no single column of vectors"
            raise CatalogError(
                f"{self.path}: {named}; columns with lists of numbers: {', '.join(lists) or 'none'}; all columns: "
                f"{', '.join(schema.names)}; name one with --vector-column (vector_column)"
            )
        self.vector_column = vector_column
        self.columns = tuple(field.name for field in schema if field.name not in lists)
        kind = schema.field(vector_column).type
        if self.num_rows:
            self.dim = kind.list_size if pa.types.is_fixed_size_list(kind) else self._usual_length()
        else:
            self.dim = 0

    @abstractmethod
    def _lists(self, rows: int) -> Iterator[pa.Array]:
        """Batches of the column of vectors."""

    def _usual_length(self) -> int:
        for column in self._lists(_PEEK_ROWS):
            lengths = pc.drop_null(pc.list_value_length(column)).to_numpy(zero_copy_only=False)
            if lengths.any():
                return int(np.bincount(lengths[lengths > 0]).argmax())
        raise CatalogError(f"{self.path}, field {self.vector_column!r}: no row has a vector; expected one list of numbers per item")

    def blocks(self, rows: int, dim: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """See `Part`."""
        for column in self._lists(rows):
            lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
            faults = np.select([lengths == 0, lengths != dim], [MISSING, WRONG_LENGTH], 0).astype(np.int8)
            flat = column.filter(pa.array(faults == 0)).flatten()
            values = pc.fill_null(pc.cast(flat, pa.float32(), safe=False), np.nan).to_numpy(zero_copy_only=False)
            block = np.zeros((len(column), dim), dtype=np.float32)
            block[faults == 0] = values.reshape(-1, dim)
            yield block, faults, lengths


class ParquetPart(_ListPart):
    """A parquet file."""

    def __init__(self, path: Path, vector_column: str | None) -> None:
        self.path, self.files = path, (path,)
        with self._open() as file:
            self.num_rows = file.metadata.num_rows
            schema = file.schema_arrow
        self._resolve(schema, vector_column)

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path, buffer_size=_STREAM_BYTES)
        except (OSError, pa.ArrowException) as error:
            raise CatalogError(f"{self.path} cannot be read as parquet ({type(error).__name__}: {error}); write it again") from error

    def _lists(self, rows: int) -> Iterator[pa.Array]:
        try:
            with self._open() as file:
                for batch in file.iter_batches(rows, columns=[self.vector_column]):
                    yield batch.column(0)
        except (OSError, pa.ArrowException) as error:
            raise CatalogError(f"{self.path} cannot be read as parquet ({type(error).__name__}: {error}); write it again") from error

    def ids(self, column: str) -> pa.ChunkedArray:
        """See `Part`."""
        with self._open() as file:
            return file.read(columns=[column])[column]


class DatasetPart(_ListPart):
    """A folder written by `datasets.save_to_disk`: a Dataset, or a DatasetDict with one split."""

    def __init__(self, path: Path, vector_column: str | None) -> None:
        import datasets  # imported here because the import takes a second

        self.path = path
        try:
            found = datasets.load_from_disk(str(path))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise CatalogError(f"{path} cannot be read as a saved dataset ({type(error).__name__}: {error}); save it again") from error
        if isinstance(found, datasets.DatasetDict):
            if len(found) != 1:
                raise CatalogError(
                    f"{path}: holds the splits {', '.join(found)}; name the folder of one of them, e.g. {path / next(iter(found))}"
                )
            (found,) = found.values()
        self.files = tuple(sorted(file for file in path.rglob("*") if file.is_file()))
        self._dataset, self.num_rows = found.with_format("arrow"), len(found)
        self._resolve(found.features.arrow_schema, vector_column)

    def _lists(self, rows: int) -> Iterator[pa.Array]:
        for table in self._dataset.select_columns([self.vector_column]).iter(rows):
            yield from table[self.vector_column].chunks

    def ids(self, column: str) -> pa.ChunkedArray:
        """See `Part`."""
        tables = [table[column] for table in self._dataset.select_columns([column]).iter(65_536)]
        return pa.chunked_array([chunk for one in tables for chunk in one.chunks], type=tables[0].type if tables else pa.string())


def open_parts(paths: Sequence[Path], vector_column: str | None, *, config_key: str) -> list[Part]:
    """Open files and folders of vectors; a folder is a saved dataset or holds parquet files (read in the order of their names).

    Raises:
        CatalogError: a path does not exist or has another format, or a column of vectors is missing or ambiguous.
    """
    parts: list[Part] = []
    for path in paths:
        if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
            parts.append(DatasetPart(path, vector_column))
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*.parquet") if not file.name.startswith((".", "_")))
            if not files:
                raise CatalogError(f"{config_key}: {path} holds no parquet file and no saved dataset; name files of vectors")
            parts += [ParquetPart(file, vector_column) for file in files]
        elif not path.is_file():
            raise CatalogError(f"{config_key}: {path} does not exist (working folder {Path.cwd()}); correct the path")
        elif path.suffix.lower() == ".npy":
            parts.append(MatrixPart(path))
        elif path.suffix.lower() in (".parquet", ".pq"):
            parts.append(ParquetPart(path, vector_column))
        else:
            raise CatalogError(
                f"{config_key}: {path} ends in {path.suffix!r}; name a .parquet or .npy file, a folder of parquet files, or a folder of "
                "datasets.save_to_disk"
            )
    return parts


def _is_vector(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and is_number(kind.value_type)
