"""Batches of rows: some columns of consecutive rows of one file, as Arrow arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from mmsid.errors import CatalogError

ROWS, BYTES = 65_536, 64_000_000  # upper bound of rows in a batch, and of bytes where a reader can choose


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one file.

    Attributes:
        table: the selected columns that the file has, one chunk each. Columns in `mixed` are not in it.
        mixed: columns whose cells have several JSON types, or objects with very many keys, as Python values.
        textual: cells are texts, as in csv. Lists and mappings are then written inside a cell.
        file: the file, or the name of the data set, for messages.
        numbers: (R,) number of each row in the file, counted from 1.
        unit: what `numbers` counts, "row" or "line".
    """

    table: pa.Table
    mixed: dict[str, list[Any]] = field(default_factory=dict)
    textual: bool = False
    file: Path = Path()
    numbers: Sequence[int] = range(0)
    unit: str = "row"

    def __len__(self) -> int:
        return len(self.numbers)

    def place(self, index: int) -> str:
        """Location of a row for messages: `file, row n` or `file, line n`."""
        return f"{self.file}, {self.unit} {self.numbers[index]}"

    def column(self, name: str) -> pa.Array | list[Any] | None:
        """Cells (R,) of a column, Python values if the column is mixed, or None if the file does not have the column."""
        if name in self.mixed:
            return self.mixed[name]
        at = self.table.schema.get_field_index(name)
        if at < 0:
            return None
        column = self.table.column(at)
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def rows(self) -> list[dict[str, Any]]:
        """The rows as dictionaries of Python values."""
        rows = self.table.to_pylist(maps_as_pydicts="strict") if self.table.num_columns else [{} for _ in self.numbers]
        for name, values in self.mixed.items():
            for row, value in zip(rows, values, strict=True):
                row[name] = value
        return rows

    def values(self, name: str) -> list[Any]:
        """Cells (R,) of a column as Python values, None where the file does not have the column."""
        column = self.column(name)
        return [None] * len(self) if column is None else column if isinstance(column, list) else column.to_pylist()

    def take(self, indices: Sequence[int]) -> Batch:
        """The rows `indices`, in this order."""
        mixed = {name: [values[index] for index in indices] for name, values in self.mixed.items()}
        numbers = [self.numbers[index] for index in indices]
        return Batch(self.table.take(pa.array(indices, pa.int64())), mixed, self.textual, self.file, numbers, self.unit)

    def slice(self, start: int, length: int) -> Batch:
        """The rows `start` to `start + length`."""
        end = start + length
        mixed = {name: values[start:end] for name, values in self.mixed.items()}
        return Batch(self.table.slice(start, length), mixed, self.textual, self.file, self.numbers[start:end], self.unit)


class TableFile(Protocol):
    """One opened file of a table.

    Attributes:
        columns: names in the header, without surrounding white space.
        num_rows: number of rows, or None where it is only known after reading.
        empty: the file has no rows.
        notes: what was detected, without the file's name.
        format: word for messages, for example "csv".
    """

    path: Path
    columns: tuple[str, ...]
    num_rows: int | None
    empty: bool
    notes: list[str]
    format: str

    def batches(self, selected: Sequence[str], rows: int) -> Iterator[Batch]:
        """Batches of at most `rows` rows with the `selected` columns that exist."""
        ...


def stripped_header(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Column name without surrounding white space -> name in the file.

    Raises:
        CatalogError: two columns have the same name.
    """
    found: dict[str, str] = {}
    doubled = set()
    for name in names:
        if name.strip() in found:
            doubled.add(name.strip())
        found.setdefault(name.strip(), name)
    if doubled:
        listed = ", ".join(map(repr, sorted(doubled)))
        raise CatalogError(f"{path}: column {listed} occurs twice in the header; rename one of them")
    return found
