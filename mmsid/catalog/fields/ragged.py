"""Lists of different lengths as one array of values and the bounds of the rows in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Ragged:
    """One list per row. Row i holds `values[offsets[i] : offsets[i + 1]]`.

    Attributes:
        offsets: (N + 1,) int64, from 0 to the number of values.
        values: (V,) Arrow array.
    """

    offsets: np.ndarray
    values: pa.Array

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64 number of values per row."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """(V,) int64 row of each value."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)

    def row_of(self, position: int) -> int:
        """Row of the value at `position`."""
        return int(np.searchsorted(self.offsets, position, side="right")) - 1

    def kept(self, mask: np.ndarray) -> Ragged:
        """The lists without the values whose `mask` (V,) is False."""
        if mask.all():
            return self
        before = np.concatenate([[0], np.cumsum(mask)])
        return Ragged(before[self.offsets], self.values.filter(pa.array(mask)))

    def to_list_array(self) -> pa.LargeListArray:
        """The lists as an Arrow array."""
        return pa.LargeListArray.from_arrays(pa.array(self.offsets, pa.int64()), self.values)


def bounds(lengths: np.ndarray) -> np.ndarray:
    """(N + 1,) bounds of lists of the given (N,) lengths."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def ragged_of(lists: Sequence[Sequence[str]]) -> Ragged:
    """Lists of texts as Ragged."""
    values = [text for texts in lists for text in texts]
    return Ragged(bounds(np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))), pa.array(values, pa.large_string()))


def one_per_row(values: pa.Array, present: np.ndarray) -> Ragged:
    """Lists of one value, or of none where `present` (N,) is False."""
    return Ragged(bounds(present), values if present.all() else values.filter(pa.array(present)))


def joined_rows(parts: Sequence[Ragged]) -> Ragged:
    """Row by row, the values of all parts one after the other. All parts have the same number of rows and one type of values."""
    parts = [part for part in parts if len(part.values)] or list(parts[:1])
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(np.concatenate([part.rows for part in parts]), kind="stable")
    values = pa.concat_arrays([part.values for part in parts])
    return Ragged(np.sum([part.offsets for part in parts], axis=0), values.take(pa.array(order)))


def stacked(parts: Sequence[Ragged]) -> Ragged:
    """The rows of all parts, one part after the other."""
    return Ragged(bounds(np.concatenate([part.lengths for part in parts])), pa.concat_arrays([part.values for part in parts]))


def is_list(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of the list types."""
    return any(
        test(kind)
        for test in (
            pa.types.is_list,
            pa.types.is_large_list,
            pa.types.is_fixed_size_list,
            pa.types.is_list_view,
            pa.types.is_large_list_view,
        )
    )


def one_level(lists: pa.Array) -> Ragged:
    """An Arrow array of lists as Ragged. A null list is empty."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return Ragged(bounds(lengths), lists.flatten())


def all_levels(array: pa.Array) -> Ragged:
    """An Arrow array of lists, of lists of lists and so on, with the inner lists flattened. Scalars are lists of one."""
    found = Ragged(np.arange(len(array) + 1), array)
    while is_list(found.values.type):
        inner = one_level(found.values)
        found = Ragged(inner.offsets[found.offsets], inner.values)
    return found
