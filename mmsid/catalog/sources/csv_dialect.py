"""Dialect of a delimited text file: separator, quoting and header, found by reading a sample with each candidate."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

SEPARATORS = (",", ";", "\t", "|")
_SAMPLE_ROWS = 1000
_LONGEST_CELL = 16_000_000
_DECLARED = re.compile(r"sep=(.)\r?\n?", re.IGNORECASE)

DOUBLED: dict[str, Any] = {"doublequote": True, "strict": True}  # "" stands for a quote inside quotes
ESCAPED: dict[str, Any] = {"doublequote": False, "escapechar": "\\", "strict": True}  # \" stands for it, as Spark writes
UNQUOTED: dict[str, Any] = {"quoting": csv.QUOTE_NONE}  # quotes are ordinary characters


@dataclass(frozen=True)
class Dialect:
    """How a delimited file is written.

    Attributes:
        quoting: `DOUBLED`, `ESCAPED` or `UNQUOTED`, arguments of `csv.reader`.
        declared: the first line is `sep=...`, as Excel writes it.
        header: cells of the header.
        header_lines: lines of text before the first data row.
        has_rows: the sample holds a data row.
    """

    separator: str
    quoting: dict[str, Any]
    declared: bool
    header: list[str]
    header_lines: int
    has_rows: bool

    def reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        """Rows of cells below the header, [] for empty lines."""
        csv.field_size_limit(_LONGEST_CELL)
        lines = iter(lines)
        if self.declared:
            next(lines, None)
        rows = csv.reader(lines, delimiter=self.separator, **self.quoting)
        for row in rows:
            if row:
                break
        return rows

    def notes(self, usual: str) -> list[str]:
        """What differs from a plain file with the separator `usual`."""
        notes = [f"separator {self.separator!r}"] if self.separator != usual else []
        if self.quoting is ESCAPED:
            notes.append('quotes inside cells are written \\"')
        if self.quoting is UNQUOTED:
            notes.append("quotes are ordinary characters")
        return notes


def detect_dialect(sample: str, usual: str, whole: bool) -> Dialect:
    """The dialect under which most rows of the sample have as many cells as the header.

    Args:
        sample: beginning of the file.
        usual: separator that wins where several fit equally.
        whole: the sample is the whole file. The last row of any other sample may be torn.
    """
    csv.field_size_limit(_LONGEST_CELL)
    declared = _DECLARED.match(sample)
    body = sample[declared.end() :] if declared else sample
    separators = [declared[1]] if declared else [usual, *(one for one in SEPARATORS if one != usual)]
    best: tuple[Any, ...] | None = None
    for order, separator in enumerate(separators):
        for mode, quoting in enumerate((DOUBLED, ESCAPED, UNQUOTED)):
            if (quoting is ESCAPED and '\\"' not in body) or (quoting is UNQUOTED and (separator not in "\t|" or '"' not in body)):
                continue
            rows, lines, share = _trial(body, separator, quoting, whole)
            header = rows[0] if rows else []
            score = (len(header) > 1, share, len(header), -mode, -order)
            if best is None or score > best[0]:
                best = score, separator, quoting, header, lines, len(rows) > 1 or share < 1 or not whole
    _, separator, quoting, header, lines, has_rows = best
    return Dialect(separator, quoting, declared is not None, header, lines + (declared is not None), has_rows)


def _trial(body: str, separator: str, quoting: dict[str, Any], whole: bool) -> tuple[list[list[str]], int, float]:
    """Rows with the header first, lines of the header, and the share of rows with as many cells as the header."""
    reader = csv.reader(io.StringIO(body, newline=""), delimiter=separator, **quoting)
    rows: list[list[str]] = []
    lines, broken, complete = 0, False, False
    limit = None if quoting is ESCAPED or '\\"' in body else _SAMPLE_ROWS  # a backslash before a quote decides wherever it is
    try:
        for row in reader:
            if not row:
                continue
            if not rows:
                lines = reader.line_num
            rows.append(row)
            if limit is not None and len(rows) > limit:
                break
        else:
            complete = True
    except csv.Error as error:
        broken = whole or "unexpected end of data" not in str(error)
        complete = False
    data = rows[1:-1] if complete and not whole and len(rows) > 2 else rows[1:]
    fitting = sum(len(row) == len(rows[0]) for row in data)
    return rows, lines, fitting / (len(data) + broken) if data or broken else 1.0
