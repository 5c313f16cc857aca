"""Histories of users, read from a table of typed events: one row per event with user, item, time, and optionally type and weight.

The rows may have any order. Arrow and numpy group them: 10^7 rows take well under a minute, and no Python object is made per event.
Rows that are left out are counted in `Catalog.problems` as `event_without_...`, `event_of_weight_zero` and `unknown_item`.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.columns import Columns, id_texts, no_known_id, numbers, read_columns, rows_of
from mmsid.catalog.config import CatalogConfig
from mmsid.catalog.histories import UserHistory
from mmsid.catalog.item import Item
from mmsid.errors import CatalogError

_WITHOUT = ("event_without_user", "event_without_item", "event_without_time", "event_without_type", "event_without_weight")
_OF_WEIGHT_ZERO = "event_of_weight_zero"


def read_events(config: CatalogConfig, items: list[Item], problems: Counter[str]) -> list[UserHistory]:
    """Read the histories of `config.events`, in time order, with item rows that index `items`.

    Events of equal time are ordered by the content of their items, then by weight, so that the order of the rows has no influence.

    Raises:
        CatalogError: the table is unreadable, a column is absent or holds other values than expected, a type is not listed in
            `config.event_types`, a weight is negative, or no event is of an item of the catalogue.
    """
    fields, item_ids = config.fields, [item.item_id for item in items]
    selected = [fields.user_id, fields.event_item, fields.event_time, fields.event_type, fields.event_weight]
    columns = read_columns(config.events, selected, config_key="catalog.events")
    _check_columns(columns, config)
    users, event_items = _ids(columns, fields.user_id), _ids(columns, fields.event_item)
    times = numbers(columns, fields.event_time)
    factors = (_type_weights(columns, config), _given_weights(columns, config))
    absent = [pc.is_null(users).to_numpy(), pc.is_null(event_items).to_numpy(), ~np.isfinite(times), *map(np.isnan, factors)]
    complete = np.ones(len(times), dtype=bool)
    for code, rows in zip(_WITHOUT, absent, strict=True):
        problems[code] += int((rows & complete).sum())
        complete &= ~rows
    weights = factors[0] * factors[1]
    item_of = rows_of(event_items, item_ids)
    if complete.any() and not (item_of >= 0).any():
        raise no_known_id(columns.path, fields.event_item, event_items, item_ids)
    counted = complete & (weights > 0)
    kept = counted & (item_of >= 0)
    problems[_OF_WEIGHT_ZERO] += int((complete & ~counted).sum())
    problems["unknown_item"] += int((counted & ~kept).sum())
    encoded = users.combine_chunks().dictionary_encode()
    user_of = pc.fill_null(encoded.indices, -1).to_numpy()
    problems["user_without_items"] += len(np.unique(user_of[complete])) - len(np.unique(user_of[kept]))
    return _grouped(encoded.dictionary, user_of[kept], item_of[kept], times[kept], weights[kept], _content_rank(items))


def _check_columns(columns: Columns, config: CatalogConfig) -> None:
    """Raise CatalogError when a column is absent that the configuration sets or that events need."""
    fields = config.fields
    needed = {"user_id", "event_item", "event_time"} | (fields.model_fields_set & {"event_type", "event_weight"})
    for field in sorted(needed | ({"event_type"} if config.event_types else set())):
        column = getattr(fields, field)
        if column not in columns.names:
            found = ", ".join(columns.names)
            raise CatalogError(
                f"{columns.path}: no column {column!r} (catalog.fields.{field}); found: {found}; correct the mapping or add the column"
            )


def _ids(columns: Columns, field: str) -> pa.ChunkedArray:
    return id_texts(columns.table[field], f"{columns.path}, field {field!r}")


def _type_weights(columns: Columns, config: CatalogConfig) -> np.ndarray:
    """Weight (R,) of the type of each event, NaN where the type is missing; 1 if the configuration lists no types."""
    listed = config.event_types
    if not listed:
        return np.ones(columns.table.num_rows)
    types = _ids(columns, config.fields.event_type)
    index = rows_of(types, list(listed))
    unlisted = np.flatnonzero((index < 0) & pc.is_valid(types).to_numpy())
    if len(unlisted):
        found = types[int(unlisted[0])].as_py()
        raise CatalogError(
            f"{columns.place(int(unlisted[0]))}, field {config.fields.event_type!r}: type {found!r} is not listed in catalog.event_types "
            f"({', '.join(listed)}); list it with its weight, or with 0 to leave its events out"
        )
    return np.append(np.array(list(listed.values()), dtype=np.float64), np.nan)[index]


def _given_weights(columns: Columns, config: CatalogConfig) -> np.ndarray:
    """Weight (R,) in the weight column, NaN where it is missing; 1 without such a column."""
    field = config.fields.event_weight
    if field not in columns.names:
        return np.ones(columns.table.num_rows)
    weights = numbers(columns, field).astype(np.float64)
    wrong = np.flatnonzero((weights < 0) | np.isinf(weights))
    if len(wrong):
        raise CatalogError(
            f"{columns.place(int(wrong[0]))}, field {field!r}: the weight is {weights[wrong[0]]:g}, expected a finite number of 0 or more; "
            "correct it"
        )
    return weights


def _grouped(
    names: pa.Array, user_of: np.ndarray, item_of: np.ndarray, times: np.ndarray, weights: np.ndarray, content_rank: np.ndarray
) -> list[UserHistory]:
    """Histories of the users `names` from their events (E,), which index users and items."""
    order = np.lexsort((weights, content_rank[item_of], times, user_of))
    user_of, item_of, times, weights = user_of[order], item_of[order], times[order], weights[order]
    starts = np.flatnonzero(np.diff(user_of, prepend=-1))
    uniform = bool((weights == 1.0).all())
    return [
        UserHistory(name, item_of[start:end], times[start:end], None if uniform else weights[start:end])
        for name, start, end in zip(
            names.take(pa.array(user_of[starts])).to_pylist(), starts.tolist(), [*starts[1:].tolist(), len(user_of)], strict=True
        )
    ]


def _content_rank(items: list[Item]) -> np.ndarray:
    """Position (N,) of each item in the order of content, with the id as the last resort."""
    order = sorted(range(len(items)), key=lambda row: (items[row].content_sha256, items[row].item_id))
    rank = np.empty(len(items), dtype=np.int64)
    rank[order] = np.arange(len(items))
    return rank
