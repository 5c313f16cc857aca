"""Tables as Python rows, whole or in pieces, for tables of moderate size. All formats of `mmsid.catalog.sources` give the same rows."""

from __future__ import annotations

import bisect
import datetime
import decimal
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmsid.catalog.sources.batch import Batch
from mmsid.catalog.sources.contents import recognise
from mmsid.catalog.sources.literal_cells import literal_cell, starts_like_literal
from mmsid.catalog.sources.locate import Source, locate
from mmsid.catalog.sources.opened import OpenedTable, open_table
from mmsid.errors import CatalogError


@dataclass
class Table:
    """Table rows as dictionaries. Row i is called `f"{unit} {numbers[i]}"` in messages, counted from 1 in its file.

    Attributes:
        path: the file. For several files, the source as the configuration names it.
        is_csv: cells are texts, so that lists and mappings are written inside a cell.
        parts: first row of each run of rows of one file, and a batch of this file. Used where the rows come from several files.
    """

    path: Path
    columns: list[str]
    rows: list[dict[str, Any]]
    numbers: Sequence[int]
    unit: str
    is_csv: bool
    parts: list[tuple[int, Batch]] = field(default_factory=list)

    def place(self, index: int) -> str:
        """Location of a row for messages: `file, row n`."""
        part = self._part(index)
        path, unit = (self.path, self.unit) if part is None else (part.file, part.unit)
        return f"{path}, {unit} {self.numbers[index]}"

    def textual(self, index: int) -> bool:
        """Whether the cells of a row are texts, as in csv files."""
        part = self._part(index)
        return self.is_csv if part is None else part.textual

    def _part(self, index: int) -> Batch | None:
        return self.parts[bisect.bisect_right(self.parts, index, key=lambda part: part[0]) - 1][1] if self.parts else None


def read_table_rows(path: Source | Sequence[Source], selected: Sequence[str], *, config_key: str) -> Table:
    """Read the `selected` columns (those that exist) of a table in any format of `mmsid.catalog.sources`.

    Raises:
        CatalogError: a file is missing, damaged or no table, or there are no rows.
    """
    opened = open_table(path, config_key=config_key)
    return _table(opened, list(opened.batches(selected)))


def table_pieces(path: Source | Sequence[Source], selected: Sequence[str], rows: int, *, config_key: str) -> tuple[int, Iterator[Table]]:
    """Number of rows of a table, and its consecutive pieces of `rows` rows (the last one may be shorter).

    The pieces are read one by one. Delimited text is read once more before, to count its rows.

    Raises:
        CatalogError: as `read_table_rows`. Damage inside a parquet file is noticed when its piece is read.
    """
    opened = open_table(path, config_key=config_key)
    total = opened.num_rows
    if total is None:
        total = sum(len(batch) for batch in opened.batches([]))
    return total, _pieces(opened, selected, rows)


def _pieces(opened: OpenedTable, selected: Sequence[str], rows: int) -> Iterator[Table]:
    waiting: list[Batch] = []
    held = 0
    for batch in opened.batches(selected, rows):
        start = 0
        while held + len(batch) - start >= rows:
            taken = rows - held
            yield _table(opened, [*waiting, batch.slice(start, taken)])
            waiting, held, start = [], 0, start + taken
        if start < len(batch):
            waiting.append(batch.slice(start, len(batch) - start))
            held += len(batch) - start
    if waiting:
        yield _table(opened, waiting)


def _table(opened: OpenedTable, batches: Sequence[Batch]) -> Table:
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    parts: list[tuple[int, Batch]] = []
    for batch in batches:
        if not parts or parts[-1][1].file != batch.file:
            parts.append((len(rows), Batch(batch.table.slice(0, 0), {}, batch.textual, batch.file, (), batch.unit)))
        rows += batch.rows()
        numbers += batch.numbers
    first = parts[0][1]
    path = first.file if len(opened.files) == 1 else Path(opened.name)
    return Table(path, list(opened.columns), rows, numbers, first.unit, first.textual, parts if len(parts) > 1 else [])


def table_kind(path: Path, config_key: str) -> str:
    """Format of a file by its content: ".parquet", ".arrow", ".jsonl", ".json", ".csv" (also for .tsv and .txt) or ".xml".

    Raises:
        CatalogError: the file is missing or no table.
    """
    return f".{recognise(locate(path, config_key).files[0], config_key).format}"


class Cells:
    """Converts raw cells of a table to texts, lists, mappings and numbers, in the same way for every file format."""

    def __init__(self, table: Table, list_separator: str) -> None:
        self._table = table
        self._separator = list_separator

    def text(self, index: int, column: str | None) -> str:
        """The cell as text without surrounding white space, '' if missing. Raises CatalogError for lists, mappings and bytes."""
        return "" if column is None else self._plain(self._table.rows[index].get(column), index, column)

    def texts(self, index: int, column: str) -> tuple[str, ...]:
        """The cell as a tuple of non-empty texts. A single value gives a tuple of one."""
        return tuple(filter(None, (self._plain(value, index, column) for value in self._listed(index, column))))

    def mapping(self, index: int, column: str) -> dict[str, tuple[str, ...]] | None:
        """The cell as name -> values with sorted names, or None when it does not hold a mapping."""
        value = self._table.rows[index].get(column)
        if isinstance(value, str) and value.lstrip().startswith("{") and self._table.textual(index):
            value = self._literal(value, index, column)
        if not isinstance(value, dict):
            return None
        found = {}
        for key in sorted(value):
            inner = value[key] if isinstance(value[key], (list, tuple)) else [value[key]]
            values = tuple(filter(None, (self._plain(each, index, f"{column}.{key}") for each in inner)))
            if values:
                found[key] = values
        return found

    def numbers(self, index: int, column: str) -> list[int | float]:
        """The cell as a list of numbers. Dates become seconds since 1970. Raises CatalogError for other values."""
        return [self._number(value, index, column) for value in self._listed(index, column)]

    def _listed(self, index: int, column: str) -> list[Any]:
        value = self._table.rows[index].get(column)
        if isinstance(value, (list, tuple)):
            return list(value)
        if isinstance(value, str) and self._table.textual(index):
            if starts_like_literal(value) and not value.lstrip().startswith("{"):
                return self._literal(value, index, column)
            return [part for part in value.split(self._separator) if part.strip()]
        return [] if value is None else [value]

    def _literal(self, text: str, index: int, column: str) -> Any:
        try:
            return literal_cell(text)
        except ValueError as error:
            place = self._table.place(index)
            raise CatalogError(f"{place}, field {column!r}: starts like JSON but is not valid JSON ({error}); correct the cell") from error

    def _plain(self, value: Any, index: int, column: str) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if isinstance(value, str):
            # later stages cannot write lone surrogates and NUL characters
            return value.encode("utf-8", "replace").decode("utf-8").replace("\0", " ").strip()
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        if isinstance(value, (int, float, decimal.Decimal, datetime.date)):
            return str(value)
        place = self._table.place(index)
        raise CatalogError(f"{place}, field {column!r}: holds a {type(value).__name__}, expected text; map another column or convert it")

    def _number(self, value: Any, index: int, column: str) -> int | float:
        if isinstance(value, datetime.datetime):
            return value.replace(tzinfo=value.tzinfo or datetime.UTC).timestamp()
        if isinstance(value, str):
            try:
                value = float(value) if any(mark in value for mark in ".eE") else int(value)
            except ValueError:
                value = None
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 2**63:
            found = self._table.rows[index].get(column)
            place = self._table.place(index)
            raise CatalogError(f"{place}, field {column!r}: {str(found)[:80]!r} is not a list of numbers; give one time per interaction")
        return value
