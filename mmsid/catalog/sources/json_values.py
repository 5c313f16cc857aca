"""JSON rows as Python dictionaries, and their columns as Arrow arrays where all cells have one type."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmsid.catalog.sources.batch import Batch
from mmsid.errors import CatalogError

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that may be a lone surrogate
MAX_KEYS = 256  # of the objects of a column. Arrow stores a cell for each key and row, so more keys stay Python dictionaries


def load_lines(lines: Sequence[bytes]) -> list[dict[str, Any]] | None:
    """The rows of many lines, decoded together, or None if one of them is not one plain object. `load_line` then says which."""
    joined = b",\n".join(lines)
    try:
        rows = json.loads(f"[{joined.decode()}]")
    except (ValueError, RecursionError):
        return None
    if len(rows) != len(lines) or not all(type(row) is dict for row in rows):
        return None
    return without_surrogates(rows) if SURROGATE.search(joined) else rows


def load_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The row of one line. Lines of Python literals are read too, as in the Amazon files of 2014.

    Raises:
        CatalogError: the line holds no object.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        row = _literal(line)
        if row is None:
            raise CatalogError(f"{path}, line {number}: not valid JSON ({error}); write one JSON object per line") from error
    if not isinstance(row, dict):
        raise CatalogError(f"{path}, line {number}: holds a {type(row).__name__}, expected an object; write one JSON object per line")
    return without_surrogates(row) if SURROGATE.search(line) else row


def _literal(line: bytes) -> dict[str, Any] | None:
    if not line.lstrip().startswith(b"{'"):
        return None
    try:
        return ast.literal_eval(line.decode().strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def without_surrogates(value: Any) -> Any:
    """The JSON value with lone surrogates replaced by question marks, because neither Arrow nor UTF-8 can hold them."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [without_surrogates(one) for one in value]
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(one) for key, one in value.items()}
    return value


def batch_of_rows(
    rows: Sequence[dict[str, Any]], columns: Iterable[tuple[str, str]], path: Path, numbers: Sequence[int], unit: str
) -> Batch:
    """Batch of Python rows.

    Args:
        columns: column name and key in the rows. Columns that no row has are left out.
    """
    arrays: dict[str, pa.Array] = {}
    mixed: dict[str, list[Any]] = {}
    for name, key in columns:
        values = [row.get(key) for row in rows]
        if not any(key in row for row in rows):
            continue
        array = None if _has_many_keys(values) else one_type(values)
        if array is None:
            mixed[name] = values
        else:
            arrays[name] = array
    return Batch(pa.table(arrays), mixed, False, path, numbers, unit)


def one_type(values: Sequence[Any]) -> pa.Array | None:
    """The values as an Arrow array, or None if they have several types."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, ValueError, TypeError, RecursionError):
        return None


def _has_many_keys(values: Sequence[Any]) -> bool:
    keys: set[str] = set()
    for value in values:
        if isinstance(value, dict):
            keys.update(value)
            if len(keys) > MAX_KEYS:
                return True
    return False
