"""Lists in the cells of a column: list columns, and texts like `a|b`, `a b`, `["a", "b"]` and `['a' 'b']`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.errors import CatalogError

SEPARATORS = ("|", ",", ";", "\t", " ")  # " " stands for any white space
_SAMPLE = 20_000  # cells by which a separator is chosen
# a quoted text or a run of other characters; in a list, commas and white space separate
_PARTS = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^\s,\[\](){}'\"]+")
_NOTHING = ("null", "None", "nan", "NaN")


class Lists(NamedTuple):
    """Lists of R cells end to end: `values` (E,), and `offsets` (R + 1,) int64 of the cells among them."""

    values: pa.ChunkedArray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Number of values (R,) of each cell."""
        return np.diff(self.offsets)

    def cell_of(self, value: int) -> int:
        """Index of the cell that holds a value."""
        return int(np.searchsorted(self.offsets, value, side="right")) - 1


def is_list(kind: pa.DataType) -> bool:
    """Whether the type holds lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def of_lists(column: pa.ChunkedArray) -> Lists:
    """Lists of a list column; a missing cell is an empty list."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return Lists(pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type), _offsets(lengths))


def of_scalars(column: pa.ChunkedArray) -> Lists:
    """Lists of one value, and empty ones where a cell is missing."""
    return Lists(pc.drop_null(column), _offsets(pc.is_valid(column).to_numpy()))


def of_texts(column: pa.ChunkedArray, separator: str, place: Callable[[int], str], field: str) -> Lists:
    """Lists of texts, split at a separator. Cells in brackets are read as JSON, as Python literals or as numpy prints arrays.

    Raises:
        CatalogError: a cell starts with `[` and is no list; the message names its row.
    """
    texts = pc.fill_null(pc.utf8_trim_whitespace(column.cast(pa.large_string())), "")
    bracketed = pc.starts_with(texts, "[")
    if not pc.any(bracketed).as_py():
        return _split(texts, separator)
    places = np.flatnonzero(bracketed.to_numpy())
    if len(places) == len(texts):
        cells = _listed(texts.to_pylist(), places, place, field)
    else:
        plain = _split(pc.if_else(bracketed, "", texts), separator)
        values, offsets = plain.values.to_pylist(), plain.offsets.tolist()
        cells = [values[start:end] for start, end in pairwise(offsets)]
        for row, cell in zip(places.tolist(), _listed(texts.filter(bracketed).to_pylist(), places, place, field), strict=True):
            cells[row] = cell
    values = pa.chunked_array([pa.array([value for cell in cells for value in cell], pa.large_string())])
    return Lists(values, _offsets(np.fromiter(map(len, cells), np.int64, len(cells))))


def best_separator(
    column: pa.ChunkedArray, quality: Callable[[Lists, np.ndarray], float], usual: str, place: Callable[[int], str], field: str
) -> str:
    """The separator of the highest quality, judged by a sample of the cells. Of equally good ones, `usual` and then the first one.

    Args:
        quality: lists of the sample and the rows of its cells -> a number, the higher the better.
        place, field: as in `of_texts`.
    """
    step = max(1, len(column) // _SAMPLE)
    rows = np.arange(0, len(column), step)
    sample = column.take(pa.array(rows)) if step > 1 else column
    return max((usual, *SEPARATORS), key=lambda each: quality(of_texts(sample, each, lambda row: place(int(rows[row])), field), rows))


def _split(texts: pa.ChunkedArray, separator: str) -> Lists:
    lists = of_lists(pc.utf8_split_whitespace(texts) if separator == " " else pc.split_pattern(texts, separator))
    values = pc.utf8_trim_whitespace(lists.values)
    kept = pc.not_equal(values, "")
    return Lists(values.filter(kept), _offsets(kept.to_numpy())[lists.offsets])


def _listed(texts: list[str], rows: np.ndarray, place: Callable[[int], str], field: str) -> list[list[str | None]]:
    found = []
    for text, row in zip(texts, rows.tolist(), strict=True):
        try:
            found.append(_parts(text))
        except ValueError as error:
            raise CatalogError(
                f"{place(row)}, field {field!r}: starts like JSON but is not valid JSON, nor a Python list ({error}): {text[:80]!r}; "
                "correct the cell"
            ) from error
    return found


def _parts(text: str) -> list[str | None]:
    """The values of one list as texts. Raises ValueError."""
    try:
        return [_text(value) for value in json.loads(text)]
    except (ValueError, RecursionError):
        pass
    if not text.endswith("]"):
        raise ValueError("the closing bracket is missing")
    parts = _PARTS.findall(text)
    if "..." in parts or text.count("[") > 1 or re.sub(r"[\s,\[\]]", "", _PARTS.sub("", text)):
        raise ValueError("it is not a plain list of ids or numbers")
    try:
        return [None if part in _NOTHING else ast.literal_eval(part) if part[0] in "'\"" else part for part in parts]
    except SyntaxError as error:
        raise ValueError("a quoted text has a wrong escape") from error


def _text(value: object) -> str | None:
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, (list, dict)):
        raise ValueError(f"it holds a {type(value).__name__}")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
