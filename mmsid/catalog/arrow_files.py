"""Arrow files of one schema: whole or absent, read in chunks, and rewritten in another order with bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmsid.disk import replacing

CHUNK_ROWS = 65_536
_MOST_BUCKETS = 256  # files that are open at once


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write an Arrow IPC file. A process that is killed leaves no half-written file under this name."""
    with replacing(path) as temporary, pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=CHUNK_ROWS)


def read_arrow(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read an Arrow IPC file into memory, all columns or those named."""
    with pa.OSFile(str(path), "rb") as source:
        names = pa.ipc.open_file(source).schema.names
        chosen = None if columns is None else [names.index(name) for name in columns]
        return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=chosen)).read_all()


def arrow_rows(path: Path) -> int:
    """Number of rows of an Arrow IPC file."""
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        return sum(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))


def reordered(files: Sequence[Path], position: np.ndarray, scratch: Path) -> Iterator[pa.Table]:
    """Rows of Arrow files in another order, in chunks of about `CHUNK_ROWS` rows.

    The rows are first distributed over files that each hold a range of positions, so that memory holds one chunk at a time.

    Args:
        files: Arrow files of one schema, R rows together.
        position: (R,) place of each row in the output, from 0 without gaps, or -1 for a row that is left out.
        scratch: folder for temporary files; it is emptied.
    """
    kept = int((position >= 0).sum())
    if kept <= CHUNK_ROWS:
        tables = [read_arrow(path) for path in files]
        if tables:
            whole = pa.concat_tables(tables)
            order = np.empty(kept, dtype=np.int64)
            order[position[position >= 0]] = np.flatnonzero(position >= 0)
            yield whole.take(pa.array(order)) if kept else whole.slice(0, 0)
        return
    width = max(CHUNK_ROWS, -(-kept // _MOST_BUCKETS))
    scratch.mkdir(parents=True, exist_ok=True)
    buckets = [scratch / f"{number}.arrow" for number in range(-(-kept // width))]
    _distribute(files, position, buckets, width)
    for path in buckets:
        with pa.OSFile(str(path), "rb") as source:
            table = pa.ipc.open_stream(source).read_all()
        path.unlink()
        order = np.argsort(np.asarray(table[_POSITION]))
        table = table.drop_columns([_POSITION]).combine_chunks().take(pa.array(order))
        yield from (table.slice(start, CHUNK_ROWS) for start in range(0, table.num_rows, CHUNK_ROWS))
    scratch.rmdir()


_POSITION = "position"  # column of the temporary files


def _distribute(files: Sequence[Path], position: np.ndarray, buckets: Sequence[Path], width: int) -> None:
    """Append each row to the bucket of its position. Bucket b holds the positions from b * width."""
    first = 0
    with contextlib.ExitStack() as stack:
        writers: list[pa.ipc.RecordBatchStreamWriter] = []
        for path in files:
            table = read_arrow(path)
            places = position[first : first + table.num_rows]
            first += table.num_rows
            order = np.argsort(places, kind="stable")
            order = order[places[order] >= 0]
            table = table.take(pa.array(order)).append_column(_POSITION, pa.array(places[order])).combine_chunks()
            if not writers:
                sinks = [stack.enter_context(pa.OSFile(str(bucket), "wb")) for bucket in buckets]
                writers += [stack.enter_context(pa.ipc.new_stream(sink, table.schema)) for sink in sinks]
            cuts = np.searchsorted(places[order], np.arange(len(buckets) + 1) * width)
            for writer, start, end in zip(writers, cuts[:-1].tolist(), cuts[1:].tolist()):
                if end > start:
                    writer.write_table(table.slice(start, end - start))
