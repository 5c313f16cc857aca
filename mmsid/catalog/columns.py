"""Tables as Arrow columns, for tables with so many rows that a Python object per row is too slow.

Ids become the same texts and times the same numbers as in `tables.Cells`, which reads the other tables row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from mmsid.catalog.tables import read_table_rows, refuse_doubled, table_kind
from mmsid.errors import CatalogError

_WHOLE_NUMBERS = 2.0**53  # a float64 holds every whole number up to this one


@dataclass(frozen=True)
class Columns:
    """Columns of a table. Row i is called `f"{unit} {numbers[i]}"` in messages, counted from 1.

    Attributes:
        names: all columns of the file.
        table: those that were selected.
    """

    path: Path
    names: Sequence[str]
    table: pa.Table
    numbers: Sequence[int]
    unit: str

    def place(self, row: int) -> str:
        """Location of a row for messages: `file, row n`."""
        return f"{self.path}, {self.unit} {self.numbers[row]}"


def read_columns(path: Path, selected: Sequence[str], *, config_key: str) -> Columns:
    """Read the `selected` columns (those that exist) of a .parquet, .jsonl or .csv file. Cells of csv files are texts.

    Raises:
        CatalogError: the file is missing, has another suffix, is damaged, or has no rows.
    """
    path = Path(path)
    kind = table_kind(path, config_key)
    if kind == ".jsonl":
        rows = read_table_rows(path, selected, config_key=config_key)
        names = [name for name in rows.columns if name in selected]
        table = pa.table({name: _column([row.get(name) for row in rows.rows]) for name in names})
        return Columns(path, rows.columns, table, rows.numbers, rows.unit)
    try:
        names, table = _parquet(path, selected) if kind == ".parquet" else _csv(path, selected)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise CatalogError(f"{path} cannot be read as {kind[1:]} ({type(error).__name__}: {error}); write the file again") from error
    if not table.num_rows:
        raise CatalogError(f"{config_key}: {path} holds no rows; expected at least one, write the table again")
    return Columns(path, names, table, range(1, table.num_rows + 1), "row")


def _parquet(path: Path, selected: Sequence[str]) -> tuple[list[str], pa.Table]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        refuse_doubled(path, names)
        return names, file.read(columns=[name for name in selected if name in names])


def _csv(path: Path, selected: Sequence[str]) -> tuple[list[str], pa.Table]:
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with pyarrow.csv.open_csv(path, parse_options=parse) as reader:
        names = reader.schema.names
    refuse_doubled(path, names)
    kept = [name for name in selected if name in names]
    types = pyarrow.csv.ConvertOptions(include_columns=kept, column_types=dict.fromkeys(kept, pa.large_string()), strings_can_be_null=False)
    return names, pyarrow.csv.read_csv(path, parse_options=parse, convert_options=types)


def _column(values: list) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):  # values of several types, or lone surrogates
        texts = [None if value is None else str(value).encode("utf-8", "replace").decode() for value in values]
        return pa.array(texts, pa.large_string())


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
