"""Tables as Arrow columns, for tables with so many rows that a Python object per row is too slow.

Ids become the same texts and times the same numbers as in `tables.Cells`, which reads the other tables row by row.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.sources.locate import Source
from mmsid.catalog.sources.opened import open_table
from mmsid.errors import CatalogError

_WHOLE_NUMBERS = 2.0**53  # a float64 holds every whole number up to this one


@dataclass(frozen=True)
class Columns:
    """Columns of a table. Row i is called `f"{unit} {numbers[i]}"` in messages, counted from 1 in its file.

    Attributes:
        path: the file. For several files, the source as the configuration names it.
        names: all columns of the files.
        table: those that were selected.
        starts, files: first row of each file of several, and the file.
        notes: what was detected while reading, one line per fact.
    """

    path: Path
    names: Sequence[str]
    table: pa.Table
    numbers: Sequence[int]
    unit: str
    starts: Sequence[int] = ()
    files: Sequence[Path] = ()
    notes: Sequence[str] = ()

    def place(self, row: int) -> str:
        """Location of a row for messages: `file, row n`."""
        path = self.files[bisect.bisect_right(self.starts, row) - 1] if self.files else self.path
        return f"{path}, {self.unit} {self.numbers[row]}"


def read_columns(path: Source | Sequence[Source], selected: Sequence[str], *, config_key: str) -> Columns:
    """Read the `selected` columns (those that exist) of a table in any format of `mmsid.catalog.sources`. Cells of csv files are texts.

    A column whose values have several types, in one file or in several, becomes texts.

    Raises:
        CatalogError: a file is missing, damaged or no table, or there are no rows.
    """
    opened = open_table(path, config_key=config_key)
    names = [name for name in dict.fromkeys(selected) if name in opened.columns]
    parts: dict[str, list[pa.Array | list]] = {name: [] for name in names}
    numbers: list[Sequence[int]] = []
    starts: list[int] = []
    files: list[Path] = []
    rows, unit = 0, "row"
    for batch in opened.batches(names):
        if not files or files[-1] != batch.file:
            starts.append(rows)
            files.append(batch.file)
        for name in names:
            found = batch.column(name)
            parts[name].append(pa.nulls(len(batch)) if found is None else found)
        numbers.append(batch.numbers)
        rows, unit = rows + len(batch), batch.unit
    several = len(files) > 1
    return Columns(
        Path(opened.name) if several else files[0],
        opened.columns,
        pa.table({name: _joined(found) for name, found in parts.items()}),
        _joined_numbers(numbers),
        unit,
        starts if several else (),
        files if several else (),
        opened.notes,
    )


def _joined(parts: list[pa.Array | list]) -> pa.ChunkedArray:
    """The parts of a column as one column, as texts if they have several types."""
    if not any(isinstance(part, list) for part in parts):
        try:
            tables = [pa.table({"column": part}) for part in parts]
            return pa.concat_tables(tables, promote_options="permissive")["column"]
        except pa.ArrowException:
            pass
    return pa.chunked_array([_texts(part) for part in parts], pa.large_string())


def _texts(values: pa.Array | list) -> pa.Array:
    values = values if isinstance(values, list) else values.to_pylist()
    texts = [None if value is None else str(value).encode("utf-8", "replace").decode() for value in values]
    return pa.array(texts, pa.large_string())


def _joined_numbers(parts: list[Sequence[int]]) -> Sequence[int]:
    ranges = all(isinstance(part, range) for part in parts)
    if ranges and all(one.stop == other.start for one, other in itertools.pairwise(parts)):
        return range(parts[0].start, parts[-1].stop)
    return np.concatenate([np.asarray(part) for part in parts])


def id_texts(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    """Ids (R,) as texts without surrounding white space. Empty texts and NaN become null. Whole floats lose their `.0`.

    Bytes are read as UTF-8, UUIDs are written with hyphens.

    Args:
        place: file and field, for messages.

    Raises:
        CatalogError: the column holds neither texts nor numbers.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if isinstance(column.type, pa.UuidType):
        column = pa.chunked_array([pa.array([None if each is None else str(each) for each in column.to_pylist()], pa.large_string())])
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        column = _decoded(column, place)
    kind = column.type
    if pa.types.is_floating(kind):
        column = _float_texts(column)
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        column = column.cast(pa.large_string())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        column = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    else:
        raise CatalogError(f"{place}: holds {kind}, expected texts or whole numbers; map another column or convert it")
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.large_string()), column)


def _decoded(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    try:
        return column.cast(pa.large_binary()).cast(pa.large_string())
    except pa.ArrowException as error:
        raise CatalogError(f"{place}: holds bytes that are not UTF-8 text; map another column or write the ids as text") from error


def _float_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    values = pc.cast(column, pa.float64())
    whole = pc.and_(pc.equal(pc.trunc(values), values), pc.less_equal(pc.abs(values), _WHOLE_NUMBERS))
    numbers = pc.cast(pc.if_else(whole, values, 0.0), pa.int64()).cast(pa.large_string())
    texts = pc.if_else(whole, numbers, pc.cast(values, pa.large_string()))
    return pc.if_else(pc.is_nan(values), pa.scalar(None, pa.large_string()), texts)


def rows_of(ids: pa.ChunkedArray, item_ids: Sequence[str]) -> np.ndarray:
    """Index (R,) int64 of each id in `item_ids`; -1 where it is null or does not occur."""
    known = pa.array(item_ids, pa.large_string())
    return pc.fill_null(pc.index_in(ids, value_set=known, skip_nulls=True), -1).to_numpy().astype(np.int64)


def no_known_id(path: Path, column: str, ids: pa.ChunkedArray, item_ids: Sequence[str]) -> CatalogError:
    """The error for a table of which no id occurs in the catalogue, with examples of both."""
    theirs = ", ".join(map(repr, pc.drop_null(ids).unique().slice(0, 3).to_pylist())) or "none"
    ours = ", ".join(map(repr, item_ids[:3])) or "none"
    return CatalogError(
        f"{path}, field {column!r}: none of its ids is an item of the catalogue; it holds {theirs}, the catalogue {ours}; "
        "name the file that belongs to this catalogue, or write the ids in the same way"
    )
