"""Reader of parquet, jsonl and csv tables, whole or in pieces. All formats give the same rows; errors name the file and the row."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmsid.errors import CatalogError

_LONGEST_CSV_CELL = 16_000_000


@dataclass
class Table:
    """Table rows as dictionaries. Row i is called `f"{unit} {numbers[i]}"` in messages, counted from 1."""

    path: Path
    columns: list[str]
    rows: list[dict[str, Any]]
    numbers: Sequence[int]
    unit: str
    is_csv: bool

    def place(self, index: int) -> str:
        """Location of a row for messages: `file, row n`."""
        return f"{self.path}, {self.unit} {self.numbers[index]}"


def read_table_rows(path: Path, selected: Sequence[str], *, config_key: str) -> Table:
    """Read the `selected` columns (those that exist) of a .parquet, .jsonl or .csv file.

    Raises:
        CatalogError: the file is missing, has another suffix, is damaged, or has no rows.
    """
    path = Path(path)
    table = _READERS[table_kind(path, config_key)](path, selected)
    _refuse_empty(path, len(table.rows), config_key)
    return table


def table_pieces(path: Path, selected: Sequence[str], rows: int, *, config_key: str) -> tuple[int, Iterator[Table]]:
    """Number of rows of a table, and its consecutive pieces of `rows` rows (the last one may be shorter).

    A parquet file is read piece by piece. Other files are read at once.

    Raises:
        CatalogError: as `read_table_rows`. Damage inside a parquet file is noticed when its piece is read.
    """
    path = Path(path)
    if table_kind(path, config_key) != ".parquet":
        table = read_table_rows(path, selected, config_key=config_key)
        starts = range(0, len(table.rows), rows)
        return len(table.rows), (
            replace(table, rows=table.rows[start : start + rows], numbers=table.numbers[start : start + rows]) for start in starts
        )
    try:
        total = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        raise _unreadable_parquet(path, error) from error
    _refuse_empty(path, total, config_key)
    return total, _parquet_pieces(path, selected, rows)


def _refuse_empty(path: Path, rows: int, config_key: str) -> None:
    if not rows:
        raise CatalogError(f"{config_key}: {path} holds no rows; expected at least one, write the table again")


def _unreadable_parquet(path: Path, error: Exception) -> CatalogError:
    return CatalogError(f"{path} cannot be read as parquet ({type(error).__name__}); write the file again")


def table_kind(path: Path, config_key: str) -> str:
    """Suffix of a table: ".parquet", ".jsonl" or ".csv".

    Raises:
        CatalogError: the file is missing or has another suffix.
    """
    if not path.is_file():
        raise CatalogError(f"{config_key}: {path} does not exist or is not a file (working folder {Path.cwd()}); correct the path")
    if path.suffix.lower() not in _READERS:
        raise CatalogError(f"{config_key}: {path} ends in {path.suffix!r}; name a .parquet, .jsonl or .csv file")
    return path.suffix.lower()


def _read_parquet(path: Path, selected: Sequence[str]) -> Table:
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            refuse_doubled(path, columns)
            rows = file.read(columns=[name for name in selected if name in columns]).to_pylist(maps_as_pydicts="strict")
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise _unreadable_parquet(path, error) from error
    return Table(path, columns, rows, range(1, len(rows) + 1), "row", is_csv=False)


def _parquet_pieces(path: Path, selected: Sequence[str], rows: int) -> Iterator[Table]:
    first, waiting = 1, []
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            refuse_doubled(path, columns)
            for batch in file.iter_batches(rows, columns=[name for name in selected if name in columns]):
                waiting += batch.to_pylist(maps_as_pydicts="strict")
                while len(waiting) >= rows:  # batches need not have `rows` rows
                    yield Table(path, columns, waiting[:rows], range(first, first + rows), "row", is_csv=False)
                    first, waiting = first + rows, waiting[rows:]
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise _unreadable_parquet(path, error) from error
    if waiting:
        yield Table(path, columns, waiting, range(first, first + len(waiting)), "row", is_csv=False)


def _read_jsonl(path: Path, selected: Sequence[str]) -> Table:
    rows, numbers, columns = [], [], {}
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise CatalogError(f"{path}, line {number}: not valid JSON ({error}); write one JSON object per line") from error
                if not isinstance(row, dict):
                    raise CatalogError(
                        f"{path}, line {number}: holds a {type(row).__name__}, expected an object; write one JSON object per line"
                    )
                columns.update(dict.fromkeys(row))
                rows.append({name: row[name] for name in selected if name in row})
                numbers.append(number)
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path} cannot be read as UTF-8 text ({type(error).__name__}); save it as UTF-8") from error
    return Table(path, list(columns), rows, numbers, "line", is_csv=False)


def _read_csv(path: Path, selected: Sequence[str]) -> Table:
    rows, numbers = [], []
    csv.field_size_limit(_LONGEST_CSV_CELL)
    try:
        with open(path, encoding="utf-8-sig", newline="") as text:
            lines = csv.reader(text, strict=True)
            columns = next(lines, [])
            refuse_doubled(path, columns)
            for number, cells in enumerate(lines, start=1):
                if not cells:
                    continue
                if len(cells) != len(columns):
                    raise CatalogError(
                        f"{path}, row {number}: {len(cells)} cells, expected {len(columns)}; quote cells that contain commas"
                    )
                row = dict(zip(columns, cells, strict=True))
                rows.append({name: row[name] for name in selected if name in row})
                numbers.append(number)
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path} cannot be read as UTF-8 text ({type(error).__name__}); save it as UTF-8") from error
    except csv.Error as error:
        raise CatalogError(f"{path}, row {len(rows) + 1}: not valid csv ({error}); correct the quoting") from error
    return Table(path, columns, rows, numbers, "row", is_csv=True)


_READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".csv": _read_csv}


def require_column(table: Table, column: str, config_key: str) -> None:
    """Raise CatalogError when the table has no column `column`, which the configuration sets as `config_key`."""
    if column not in table.columns:
        found = ", ".join(table.columns)
        raise CatalogError(f"{table.path}: no column {column!r} ({config_key}); found: {found}; correct the mapping or add the column")


def refuse_doubled(path: Path, columns: Sequence[str]) -> None:
    """Raise CatalogError when a column occurs twice in the header."""
    doubled = sorted({name for name in columns if list(columns).count(name) > 1})
    if doubled:
        raise CatalogError(f"{path}: column {', '.join(map(repr, doubled))} occurs twice in the header; rename one of them")


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
        if self._table.is_csv and isinstance(value, str) and value.lstrip().startswith("{"):
            value = self._json(value, index, column)
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
        if self._table.is_csv and isinstance(value, str):
            if value.lstrip().startswith("["):
                return self._json(value, index, column)
            return [part for part in value.split(self._separator) if part.strip()]
        return [] if value is None else [value]

    def _json(self, text: str, index: int, column: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
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
