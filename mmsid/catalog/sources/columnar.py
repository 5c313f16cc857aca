"""Readers of parquet and Arrow IPC files (.arrow, .feather, shards of Hugging Face `datasets`). Batches are bounded in rows and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmsid.catalog.sources.batch import BYTES, Batch, stripped_header
from mmsid.catalog.sources.contents import Contents


class ParquetFile:
    """A parquet file. `TableFile` describes the attributes."""

    format = "parquet"

    def __init__(self, contents: Contents) -> None:
        self.path, self._contents, self.notes = contents.path, contents, []
        with contents.open_seekable() as stream, pq.ParquetFile(stream) as file:
            self._names = stripped_header(self.path, file.schema_arrow.names)
            self.num_rows = file.metadata.num_rows
            self._bytes = _column_bytes(file)
        self.columns = tuple(self._names)
        self.empty = not self.num_rows

    def batches(self, selected: Sequence[str], rows: int) -> Iterator[Batch]:
        """Batches of at most `rows` rows with the `selected` columns that exist."""
        kept = {name: self._names[name] for name in selected if name in self._names}
        if not kept:
            yield from _without_columns(self.path, self.num_rows, rows)
            return
        size = sum(self._bytes.get(name, 0) for name in kept.values()) / max(1, self.num_rows)
        rows, first = max(1, min(rows, int(BYTES / max(size, 1)))), 1
        with self._contents.open_seekable() as stream, pq.ParquetFile(stream) as file:
            for batch in file.iter_batches(rows, columns=list(kept.values())):
                yield _batch(batch, kept, self.path, first)
                first += batch.num_rows


class ArrowFile:
    """An Arrow IPC file or stream. `TableFile` describes the attributes. An uncompressed file is mapped into memory."""

    format = "arrow"

    def __init__(self, contents: Contents) -> None:
        self.path, self._contents, self.notes = contents.path, contents, []
        self._is_file = contents.head.startswith(b"ARROW1")
        with contents.open_seekable() as stream:
            self._positions: dict[str, int] = {}
            schema = self._open(stream, []).schema
            self._names = stripped_header(self.path, schema.names)
            self._positions = {name: at for at, name in enumerate(schema.names)}
        with contents.open_seekable() as stream:
            self.num_rows = sum(batch.num_rows for batch in self._record_batches(stream, list(self._positions)[:1]))
        self.columns = tuple(self._names)
        self.empty = not self.num_rows

    def batches(self, selected: Sequence[str], rows: int) -> Iterator[Batch]:
        """Batches of at most `rows` rows with the `selected` columns that exist."""
        kept = {name: self._names[name] for name in selected if name in self._names}
        if not kept:
            yield from _without_columns(self.path, self.num_rows, rows)
            return
        with self._contents.open_seekable() as stream:
            yield from batches_of(self._record_batches(stream, list(kept.values())), kept, self.path, rows)

    def _open(self, stream: pa.NativeFile, names: list[str]) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
        options = pa.ipc.IpcReadOptions(included_fields=[self._positions[name] for name in names])
        return pa.ipc.open_file(stream, options=options) if self._is_file else pa.ipc.open_stream(stream, options=options)

    def _record_batches(self, stream: pa.NativeFile, names: list[str]) -> Iterator[pa.RecordBatch]:
        reader = self._open(stream, names)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if self._is_file else reader
        for batch in batches:
            batch.validate(full=True)  # Arrow trusts the offsets in a file, and a damaged one would end the process
            yield batch


def batches_of(found: Iterator[pa.RecordBatch], kept: dict[str, str], path: Path, rows: int) -> Iterator[Batch]:
    """Slices of record batches as batches of at most `rows` rows. `kept` maps column names to names in the record batches."""
    first = 1
    for record_batch in found:
        chosen = record_batch.select(list(kept.values()))
        if not chosen.num_rows:
            continue
        size = max(1, min(rows, BYTES * chosen.num_rows // max(1, chosen.nbytes)))
        for start in range(0, chosen.num_rows, size):
            batch = chosen.slice(start, size)
            yield _batch(batch, kept, path, first)
            first += batch.num_rows


def _batch(batch: pa.RecordBatch, kept: dict[str, str], path: Path, first: int) -> Batch:
    arrays = [_storage(batch.column(name)) for name in kept.values()]
    return Batch(pa.table(arrays, names=list(kept)), {}, False, path, range(first, first + batch.num_rows))


def _storage(column: pa.Array) -> pa.Array:
    """The values of an extension array, for example the nested lists of `datasets.Array2D`; UUIDs and other arrays unchanged."""
    return column.storage if isinstance(column, pa.ExtensionArray) and not isinstance(column.type, pa.UuidType) else column


def _without_columns(path: Path, num_rows: int, rows: int) -> Iterator[Batch]:
    for start in range(0, num_rows, rows):
        yield Batch(pa.table({}), {}, False, path, range(start + 1, min(start + rows, num_rows) + 1))


def _column_bytes(file: pq.ParquetFile) -> dict[str, int]:
    """Column -> bytes of its cells in memory, as the file states them."""
    found: dict[str, int] = {}
    for group in range(file.metadata.num_row_groups):
        row_group = file.metadata.row_group(group)
        for at in range(row_group.num_columns):
            column = row_group.column(at)
            name = column.path_in_schema.split(".")[0]
            found[name] = found.get(name, 0) + column.total_uncompressed_size
    return found
