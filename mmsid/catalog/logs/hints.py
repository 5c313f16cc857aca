"""Hints for a log that names no item of the catalogue: the column of the log or of the items table that holds the right ids."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from mmsid.catalog.columns import Columns, read_columns
from mmsid.catalog.config import CatalogConfig
from mmsid.catalog.logs.item_ids import ItemIds, in_column
from mmsid.errors import CatalogError

_LIKE_IDS = ("id", "asin", "sku", "code", "key", "isbn", "gtin", "ean", "mpn", "item", "product", "handle", "name")


def other_column(config: CatalogConfig, log: Columns, items: ItemIds, unknown: pa.Array, *, used: Sequence[str]) -> str | None:
    """Cause and remedy if another column of the log holds ids of items, or another column of the items table the ids of the log.

    Args:
        unknown: ids of the log that no item has.
        used: columns of the log that cannot be meant.
    """
    key = "sequences" if config.events is None else "events"
    field = "event_item" if config.events is not None else "sequence"
    for name in _candidates(log.names, used):
        column = _column(getattr(config, key), name, f"catalog.{key}")
        if column is not None and in_column(name, pa.chunked_array([items.ids]), _distinct(column)):
            return f"the column {name!r} of the same file holds ids of items; set catalog.fields.{field}: {name}"
    try:
        names = read_columns(config.items, [config.fields.item_id], config_key="catalog.items").names
    except CatalogError:
        return None
    for name in _candidates(names, [config.fields.group_by or config.fields.item_id]):
        column = _column(config.items, name, "catalog.items")
        if column is not None and in_column(name, column, unknown):
            return f"they are values of the column {name!r} of the items table; set catalog.fields.item_id: {name}"
    return None


def _candidates(names: Sequence[str], used: Sequence[str]) -> list[str]:
    return [name for name in names if name not in used and any(part in name.lower() for part in _LIKE_IDS)]


def _column(source: object, name: str, config_key: str) -> pa.ChunkedArray | None:
    try:
        return read_columns(source, [name], config_key=config_key).table[name]
    except CatalogError:
        return None


def _distinct(column: pa.ChunkedArray) -> pa.Array:
    """Some distinct values of a column as texts; none for a column of lists or other nested values."""
    if pa.types.is_nested(column.type):
        return pa.array([], pa.large_string())
    values = column.slice(0, 20_000).unique()
    return pa.array([str(value).strip() for value in values.to_pylist() if value is not None][:10_000], pa.large_string())
