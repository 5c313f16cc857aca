"""Reader of csv, tsv and other delimited text files. Every cell is a text.

Files without quotes are parsed by Arrow. Others are parsed by Python's csv module, because Arrow accepts torn quotes.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from mmsid.catalog.sources.batch import BYTES, Batch, stripped_header
from mmsid.catalog.sources.contents import Contents, table_suffix
from mmsid.catalog.sources.csv_dialect import Dialect, detect_dialect
from mmsid.catalog.sources.text_encoding import TextEncoding, detect_encoding, open_text, open_utf8, undecodable
from mmsid.errors import CatalogError

MISSING = pa.array(["\\N", "NULL", "null", "nan", "NaN", "<NA>", "None"], pa.large_string())  # texts of cells that hold no value
_SAMPLE, _LONGEST_SAMPLE, _FIRST_ROWS, _BLOCK = 1 << 18, 1 << 25, 1024, 1 << 22
_USUAL = {".tsv": "\t", ".txt": "\t"}


class DelimitedFile:
    """A csv, tsv or txt file. `TableFile` describes the attributes. Empty lines are neither rows nor counted."""

    format = "csv"

    def __init__(self, contents: Contents) -> None:
        self.path, self._contents = contents.path, contents
        self.num_rows = None
        self._encoding = detect_encoding(contents)
        self._dialect = self._detect_dialect()
        self._positions = _positions(self.path, self._dialect.header)
        self.columns = tuple(self._positions)
        self.empty = not self._dialect.has_rows
        self._facts = [note for note in [*self._dialect.notes(_usual(self.path)), self._encoding.note] if note]
        if unnamed := sum(not name.strip() for name in self._dialect.header):
            self._facts.append(f"{unnamed} column{'s' if unnamed > 1 else ''} without a name not read")
        self._missing: Counter[str] = Counter()

    @property
    def notes(self) -> list[str]:
        """What was detected. After `batches`, also how many cells hold a text like NULL."""
        cells = f"{sum(self._missing.values()):,} cells hold {', '.join(sorted(self._missing))}: missing"
        return self._facts + ([cells] if self._missing else [])

    def _detect_dialect(self) -> Dialect:
        at = self._encoding.escaped_quote
        length = _SAMPLE if at < _SAMPLE else min(at + _SAMPLE, _LONGEST_SAMPLE)
        with open_text(self._contents, self._encoding, "mmsid_mark") as text:
            sample = text.read(length)
            whole = not text.read(1)
        if self._encoding.damaged:
            raise undecodable(self._contents, self._encoding, _cells(self._contents, self._encoding, detect_dialect(sample, ",", whole)))
        return detect_dialect(sample, _usual(self.path), whole)

    def batches(self, selected: Sequence[str], rows: int) -> Iterator[Batch]:
        """Batches of at most `rows` rows with the `selected` columns that exist, as large_string."""
        self._missing.clear()
        kept, done = {name: self._positions[name] for name in selected if name in self._positions}, 0
        if not self._encoding.quotes and kept:
            try:
                for table in self._arrow_tables(list(kept.values()), rows):
                    yield self._batch(table.rename_columns(list(kept)), done)
                    done += table.num_rows
                return
            except (pa.ArrowException, UnicodeDecodeError, OSError):
                pass  # the other reader names the row, or can read it
        yield from self._rows(kept, done, rows)

    def _arrow_tables(self, positions: list[int], rows: int) -> Iterator[pa.Table]:
        names = [str(position) for position in range(len(self._dialect.header))]
        kept = [names[position] for position in positions]
        with open_utf8(self._contents, self._encoding) as stream:
            reader = pyarrow.csv.open_csv(
                stream,
                pyarrow.csv.ReadOptions(column_names=names, skip_rows=self._dialect.header_lines, block_size=_BLOCK),
                pyarrow.csv.ParseOptions(delimiter=self._dialect.separator, quote_char=False),
                pyarrow.csv.ConvertOptions(include_columns=kept, column_types=dict.fromkeys(kept, pa.large_string())),
            )
            for batch in reader:
                for start in range(0, batch.num_rows, rows):
                    yield pa.Table.from_batches([batch.slice(start, rows)])

    def _rows(self, kept: dict[str, int], done: int, rows: int) -> Iterator[Batch]:
        width, size = len(self._dialect.header), min(rows, _FIRST_ROWS)
        with open_text(self._contents, self._encoding) as text:
            reader = self._dialect.reader(text)
            waiting = done
            while True:
                cells: list[list[str]] = []
                try:
                    cells.extend(islice(reader, size))
                    failure = None
                except UnicodeDecodeError as error:
                    raise undecodable(self._contents, self._encoding, _cells(self._contents, self._encoding, self._dialect)) from error
                except csv.Error as error:
                    failure = error
                last = failure is not None or not cells
                if cells and min(map(len, cells)) == 0:
                    cells = [row for row in cells if row]
                if waiting:  # rows that were read by Arrow
                    skipped = min(waiting, len(cells))
                    cells, waiting = cells[skipped:], waiting - skipped
                if cells:
                    if set(map(len, cells)) != {width}:
                        raise self._ragged(cells, done, width)
                    columns = list(zip(*cells))
                    table = pa.table({name: _texts(columns[position]) for name, position in kept.items()})
                    yield self._batch(table, done, len(cells))
                    done += len(cells)
                    size = max(1, min(rows, 4 * size, BYTES * len(cells) // max(1, table.nbytes)))
                if failure is not None:
                    raise CatalogError(f"{self.path}, row {done + 1}: not valid csv ({failure}); correct the quoting") from failure
                if last:
                    return

    def _ragged(self, cells: list[list[str]], done: int, width: int) -> CatalogError:
        at = next(index for index, row in enumerate(cells) if len(row) != width)
        mark = {",": "commas", ";": "semicolons", "\t": "tabs"}.get(self._dialect.separator, repr(self._dialect.separator))
        return CatalogError(
            f"{self.path}, row {done + at + 1}: {len(cells[at])} cells, expected {width}; quote cells that contain {mark} or line breaks"
        )

    def _batch(self, table: pa.Table, done: int, rows: int | None = None) -> Batch:
        rows = table.num_rows if rows is None else rows
        columns = []
        for column in table.columns:
            found = pc.is_in(column, value_set=MISSING)
            if pc.any(found).as_py():
                for pair in pc.value_counts(column.filter(found)).to_pylist():
                    self._missing[pair["values"]] += pair["counts"]
                column = pc.if_else(found, pa.scalar(None, pa.large_string()), column)
            columns.append(column)
        table = pa.table(columns, names=table.column_names)
        return Batch(table, {}, True, self.path, range(done + 1, done + rows + 1))


def _usual(path: Path) -> str:
    return _USUAL.get(table_suffix(path), ",")


def _texts(values: Sequence[str]) -> pa.Array:
    try:
        return pa.array(values, pa.large_string())
    except UnicodeEncodeError:  # lone surrogates, which UTF-16 can hold
        return pa.array([value.encode("utf-8", "replace").decode() for value in values], pa.large_string())


def _positions(path: Path, header: list[str]) -> dict[str, int]:
    """Column name without white space -> position. Columns without a name are left out."""
    stripped_header(path, [name for name in header if name.strip()])
    return {name.strip(): at for at, name in enumerate(header) if name.strip()}


def _cells(contents: Contents, encoding: TextEncoding, dialect: Dialect) -> Iterator[tuple[str, int, str | None, str]]:
    header = dialect.header
    with open_text(contents, encoding, "mmsid_mark") as text:
        for name in header:
            yield "header", 1, None, name
        number = 0
        for row in dialect.reader(text):
            number += bool(row)
            for at, cell in enumerate(row):
                yield "row", number, header[at].strip() if at < len(header) else None, cell
