"""Columns of ids in the tables that users read: whole numbers where the ids were whole numbers in the user's own table.

Inside of mmsid every id is a text. A table with numbers as texts could not be merged with the user's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


def holds_integers(column: pa.DataType | Sequence[Any]) -> bool:
    """Whether a column, given by its Arrow type or its Python values, holds whole numbers."""
    import pyarrow as pa

    if isinstance(column, pa.DataType):
        return pa.types.is_integer(column.value_type if pa.types.is_dictionary(column) else column)
    return all(value is None or (isinstance(value, int) and not isinstance(value, bool)) for value in column)


def id_array(ids: Sequence[str | None] | pa.Array, integers: bool) -> pa.Array:
    """Column of ids, int64 if `integers` is true and every id is a whole number of 64 bits, else text."""
    import pyarrow as pa

    texts = ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string())
    if integers:
        try:
            numbers = texts.cast(pa.int64())
        except pa.ArrowInvalid:
            return texts
        if numbers.cast(texts.type).equals(texts):  # else "007" would become 7
            return numbers
    return texts


def with_id_column(table: pa.Table, integers: bool, name: str = "item_id") -> pa.Table:
    """The table with its column `name` of texts as `id_array`."""
    import pyarrow as pa

    if not integers:
        return table
    at = table.schema.get_field_index(name)
    return table.set_column(at, name, pa.chunked_array([id_array(table[name].combine_chunks(), integers)]))


def with_text_ids(table: pa.Table, name: str = "item_id") -> pa.Table:
    """The table with its column `name` as texts: the reverse of `with_id_column`. A table without the column is returned as it is."""
    import pyarrow as pa

    at = table.schema.get_field_index(name)
    return table if at < 0 or not pa.types.is_integer(table.field(at).type) else table.set_column(at, name, table[name].cast(pa.string()))
