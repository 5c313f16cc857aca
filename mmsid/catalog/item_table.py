"""Items of a catalogue as Arrow columns, memory-mapped from disk. Objects are made only for the rows that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.item import Item

_BLOCK = 1024  # items that are converted at once
_KEPT_BLOCKS = 8

LABELS = pa.struct([("name", pa.large_string()), ("labels", pa.large_list(pa.large_string()))])
CREATIVE = pa.struct(
    [
        ("path", pa.large_string()),  # relative to the image root, or absolute for a picture in the cache
        ("sha256", pa.large_string()),
        ("format", pa.large_string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("num_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
    ]
)
PROBLEM = pa.struct([("code", pa.large_string()), ("detail", pa.large_string())])
SCHEMA = pa.schema(
    [
        ("item_id", pa.large_string()),
        ("title", pa.large_string()),
        ("description", pa.large_string()),
        ("categories", pa.large_list(pa.large_string())),
        ("attributes", pa.large_list(LABELS)),
        ("creatives", pa.large_list(CREATIVE)),
        ("content_sha256", pa.large_string()),
        ("problems", pa.large_list(PROBLEM)),
        ("original", pa.large_string()),  # JSON of the texts before cleaning, null if they are unchanged
        ("file", pa.int32()),  # number of the source file, and row in it
        ("row", pa.int64()),
    ]
)


class ItemTable(Sequence[Item]):
    """Items in the rows of an Arrow table with the columns `SCHEMA`. It behaves like a list of `Item` objects.

    Args:
        table: N rows, usually memory-mapped.
        root: folder at which relative picture paths start.
    """

    def __init__(self, table: pa.Table, root: Path) -> None:
        self.table, self.root = table, Path(root)
        self._blocks: dict[int, list[Item]] = {}

    @classmethod
    def open(cls, path: Path, root: Path, rows: int | None = None) -> ItemTable:
        """Map an Arrow IPC file into memory, the first `rows` items of it."""
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        return cls(table if rows is None else table.slice(0, rows), root)

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = int(index) + len(self) if index < 0 else int(index)
        if not 0 <= row < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self._block(row // _BLOCK)[row % _BLOCK]

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self), _BLOCK):
            yield from self._converted(start)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.table.combine_chunks(), self.root)

    @cached_property
    def item_ids(self) -> list[str]:
        """Ids of all items, in order."""
        return texts(self.table["item_id"])

    @cached_property
    def content_hashes(self) -> list[str]:
        """`content_sha256` of all items, in order."""
        return texts(self.table["content_sha256"])

    def _block(self, number: int) -> list[Item]:
        if number not in self._blocks:
            if len(self._blocks) >= _KEPT_BLOCKS:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[number] = self._converted(number * _BLOCK)
        return self._blocks[number]

    def _converted(self, start: int) -> list[Item]:
        block = self.table.slice(start, _BLOCK)
        creatives = nested(block["creatives"], lambda values: texts(pc.struct_field(values, "path")))
        return [
            Item(*parts[:3], tuple(self.root / path for path in parts[3]), *parts[4:])
            for parts in zip(
                texts(block["item_id"]),
                texts(block["title"]),
                texts(block["description"]),
                creatives,
                nested(block["categories"], texts),
                map(dict, nested(block["attributes"], pairs)),
                texts(block["content_sha256"]),
                nested(block["problems"], codes),
                strict=True,
            )
        ]


def _unpickled(table: pa.Table, root: Path) -> ItemTable:
    return ItemTable(table, root)


def texts(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    """Values of a column of texts as a list, several times faster than `to_pylist`."""
    return column.to_numpy(zero_copy_only=False).tolist() if isinstance(column, pa.Array) else column.to_numpy().tolist()


def lengths(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """(R,) int64, number of entries of each list; 0 for null."""
    return np.asarray(pc.fill_null(pc.list_value_length(column), 0)).astype(np.int64)


def lists(entries: pa.Array, row_of: np.ndarray, num_rows: int) -> pa.Array:
    """List column of R rows. Entry i is in the list of row `row_of[i]`, which does not fall."""
    offsets = np.searchsorted(row_of, np.arange(num_rows + 1))
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), entries)


def nested(column: pa.ChunkedArray | pa.Array, convert: Any) -> list[tuple[Any, ...]]:
    """Entries of each list of a list column, as tuples. `convert` turns the entries of all lists (Arrow) into a Python list."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # of no chunks
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    values = convert(array.flatten())
    ends = np.cumsum(lengths(array)).tolist()
    return [tuple(values[start:end]) for start, end in zip([0, *ends], ends)]


def codes(values: pa.Array) -> list[str]:
    """Codes of problems (`PROBLEM`)."""
    return texts(pc.struct_field(values, "code"))


def pairs(values: pa.Array) -> list[tuple[str, tuple[str, ...]]]:
    """Attributes, as (name, labels)."""
    names = texts(pc.struct_field(values, "name"))
    return list(zip(names, nested(pc.struct_field(values, "labels"), texts), strict=True))
