"""Numbers and times of a column: numbers in any unit, dates, timestamps, and texts of all these, as seconds since 1970.

The unit of a number follows from its size: seconds from 1979 to 2128 are smaller than milliseconds of the same years, and so on.
"""

from __future__ import annotations

import bisect
import datetime
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.errors import CatalogError

MIXED_UNITS = "timestamp_of_other_unit"

_READINGS = (pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC"))  # of a text, in this order
_WRITTEN = ("%Y/%m/%d", "%d.%m.%Y", "%m %d, %Y", "%Y-%m-%d")  # dates, alone or before one of `_CLOCKS`
_EITHER = ("%m/%d/%Y", "%d/%m/%Y")  # dates whose day and month could be exchanged
_CLOCKS = ("", " %H:%M:%S", " %H:%M", "T%H:%M:%S")
_MISSING = ("", "\\N", "NULL", "null", "None", "nan", "NaN", "<NA>", "NA", "N/A")

_UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")
_EDGES = np.array([edge * 1000**unit for unit in range(4) for edge in (3 * 10**8, 5 * 10**9)], dtype=np.float64)  # 1979 and 2128
_SURE = 0.9  # share of values with a known unit, from which each value of a column of several units is read in its own


@dataclass(frozen=True)
class Field:
    """A column of numbers or times, and how messages name it.

    Attributes:
        column: values (R,).
        name: of the column.
        table: the file or files.
        place: row index -> `file, row n`.
    """

    column: pa.ChunkedArray
    name: str
    table: str
    place: Callable[[int], str]


def read_numbers(field: Field) -> np.ndarray:
    """Numbers (R,): int64 if all are whole numbers, otherwise float64 with NaN where one is missing.

    Dates, times and texts of them become seconds since 1970, in UTC if they name no zone.

    Raises:
        CatalogError: a value is none of these; the message names its row.
    """
    return _numbers(field)[0]


def read_times(field: Field, problems: Counter[str], notes: list[str]) -> np.ndarray:
    """Times (R,) as `read_numbers`, in seconds since 1970 if they are written as dates or if their unit is known from their size.

    Where a column holds several units, each value is read in its own, and those of the rarer units are counted in `problems`.
    Other numbers, like positions in a sequence, stay as they are.

    Raises:
        CatalogError: as `read_numbers`.
    """
    values, is_date = _numbers(field)
    return values if is_date else _in_seconds(values, field, problems, notes)


def _numbers(field: Field) -> tuple[np.ndarray, bool]:
    """The numbers, and whether they were written as dates or times."""
    column = field.column
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_text(column.type):
        column = _parsed(column, field)
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        microseconds = column.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        return pc.divide(microseconds.cast(pa.float64(), safe=False), 1e6).to_numpy(), True
    if pa.types.is_signed_integer(kind) and not column.null_count:
        return column.cast(pa.int64()).to_numpy(), False
    if is_number(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        return column.cast(pa.float64(), safe=False).to_numpy(), False
    raise CatalogError(f"{field.table}, field {field.name!r}: holds {kind}, expected numbers or times; map another column or convert it")


def is_number(kind: pa.DataType) -> bool:
    """Whether the type holds integers or floating-point numbers."""
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether the type holds texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _parsed(column: pa.ChunkedArray, field: Field) -> pa.ChunkedArray:
    """Texts as the first type that reads all of them."""
    texts = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    texts = pc.if_else(pc.is_in(texts, pa.array(_MISSING, texts.type)), pa.scalar(None, texts.type), texts)
    for kind in _READINGS:
        if (found := _cast(texts, kind)) is not None:
            return found
    plain = pc.replace_substring_regex(texts, r"\s*(UTC|GMT|Z)$", "")
    found = _cast(plain, pa.timestamp("us"))
    found = _with_and_without_zone(plain) if found is None else found
    found = _written(plain, field) if found is None else found
    if found is not None:
        return found
    row = max(_rows_read(texts, kind) for kind in _READINGS)
    raise CatalogError(
        f"{field.place(row)}, field {field.name!r}: {texts[row].as_py()[:80]!r} is neither a number nor a time like "
        "2026-11-28T09:30:00, or the rows before it are written in another way; correct the cell"
    )


def _cast(texts: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray | None:
    try:
        return texts.cast(kind)
    except pa.ArrowException:
        return None


def _with_and_without_zone(texts: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """ISO texts of which some end in a zone like +01:00; the others are in UTC."""
    zoned = pc.fill_null(pc.match_substring_regex(texts, r":\d{2}(\.\d+)?\s*[+-]\d{2}(:?\d{2})?$"), False)
    kind, nothing = pa.timestamp("us", "UTC"), pa.scalar(None, texts.type)
    with_zone = _cast(pc.replace_substring_regex(pc.if_else(zoned, texts, nothing), r"\s+([+-])", r"\1"), kind)
    without = _cast(pc.if_else(zoned, nothing, texts), pa.timestamp("us"))
    return None if with_zone is None or without is None else pc.coalesce(with_zone, without.cast(kind))


def _written(texts: pa.ChunkedArray, field: Field) -> pa.ChunkedArray | None:
    """Dates in another notation than ISO, alone or before the time of day."""
    for clock in _CLOCKS:
        for date in _WRITTEN:
            if (found := _in_notation(texts, date + clock)) is not None:
                return found
        both = [found for date in _EITHER if (found := _in_notation(texts, date + clock)) is not None]
        if len(both) > 1 and not both[0].equals(both[1]):
            raise CatalogError(
                f"{field.place(0)}, field {field.name!r}: {texts[0].as_py()!r} may be month/day/year or day/month/year, and no row "
                "decides it; write the dates as 2026-11-28"
            )
        if both:
            return both[0]
    return None


def _in_notation(texts: pa.ChunkedArray, notation: str) -> pa.ChunkedArray | None:
    found = pc.strptime(texts, format=notation, unit="us", error_is_null=True)
    return found if found.null_count == texts.null_count else None


def _rows_read(texts: pa.ChunkedArray, kind: pa.DataType) -> int:
    """Length of the longest beginning of the column that can be read as `kind`, by bisection."""
    return bisect.bisect_left(range(len(texts)), True, key=lambda row: _cast(texts.slice(0, row + 1), kind) is None)


def _in_seconds(values: np.ndarray, field: Field, problems: Counter[str], notes: list[str]) -> np.ndarray:
    size = np.abs(values[np.isfinite(values)]) if values.dtype.kind == "f" else np.abs(values)
    if not len(size) or size.max() < _EDGES[0]:
        return values
    band = np.searchsorted(_EDGES, size, side="right")  # odd: within the years of a unit
    counts = np.bincount(band, minlength=len(_EDGES) + 1)[1::2]
    main, known = int(counts.argmax()), counts.sum() / len(size)
    if not counts[main] or known < 0.5:
        return values
    others = int(counts.sum() - counts[main])
    where = f"{field.table}, field {field.name!r}"
    if others and known < _SURE:
        notes.append(f"{where}: the unit of the times is unclear; the numbers are used as they are")
        return values
    units = np.full(len(values), main)
    if others:
        problems[MIXED_UNITS] += others
        all_bands = np.searchsorted(_EDGES, np.abs(np.nan_to_num(values)), side="right")
        units = np.where(all_bands % 2 == 1, all_bands // 2, main)
    found = _divided(values, units if others else main)
    first, last = (datetime.datetime.fromtimestamp(float(end(found)), datetime.UTC).date() for end in (np.nanmin, np.nanmax))
    mixed = f", {others:,} of {len(size):,} values in another unit" if others else ""
    converted = ", converted to seconds" if main or others else ""
    notes.append(f"{where}: {_UNITS[main]} since 1970 ({first} to {last}){mixed}{converted}")
    return found


def _divided(values: np.ndarray, units: np.ndarray | int) -> np.ndarray:
    """Values in `units` (0 for seconds, 3 for nanoseconds) as seconds, int64 if all are whole."""
    if isinstance(units, int) and units == 0:
        return values
    factors = 1000 ** np.asarray(units, dtype=np.int64)
    if values.dtype.kind != "f" and not (values % factors).any():
        return values // factors
    return values / factors
