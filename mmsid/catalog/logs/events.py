"""Histories of users, read from a table of typed events: one row per event with user, item, time, and optionally type and weight.

The rows may have any order. Arrow and numpy group them, and no Python object is made per event.
Rows that are left out are counted in `Catalog.problems` as `event_without_...`, `event_of_weight_zero` and `unknown_item`.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.columns import Columns
from mmsid.catalog.config import CatalogConfig
from mmsid.catalog.histories import Histories
from mmsid.catalog.logs.columns import LogColumns
from mmsid.catalog.logs.hints import other_column
from mmsid.catalog.logs.item_ids import Encoded, ItemIds, encode
from mmsid.catalog.logs.times import Field, read_numbers, read_times
from mmsid.errors import CatalogError

_WITHOUT = ("event_without_user", "event_without_item", "event_without_time", "event_without_type", "event_without_weight")
_OF_WEIGHT_ZERO = "event_of_weight_zero"


def read_events(
    log: LogColumns,
    config: CatalogConfig,
    items: ItemIds,
    content_rank: np.ndarray,
    problems: Counter[str],
    notes: list[str],
    max_unknown: float,
) -> Histories:
    """Histories of a table with one row per event, in time order, with users in the order in which they first occur.

    Events of equal time are ordered by the content of their items, then by weight, so that the order of the rows has no influence.
    Events that repeat user, item and time of another one stay, and are counted as `duplicate_event`.

    Raises:
        CatalogError: a column holds other values than expected, a type is not listed in `config.event_types`, a weight is negative,
            or more than the share `max_unknown` of the interactions is of unknown items.
    """
    columns = log.columns
    where = f"{columns.path}, field {log.item!r}"
    users, event_items = _ids(columns, log.user), encode(columns.table[log.item], where)
    times = read_times(_field(columns, log.time), problems, notes)
    factors = [_type_weights(log, config, notes), _given_weights(log)]
    complete = np.ones(len(times), dtype=bool)
    absent = (users.codes < 0, event_items.codes < 0, ~np.isfinite(times), *(None if each is None else np.isnan(each) for each in factors))
    for code, rows in zip(_WITHOUT, absent, strict=True):
        if rows is not None:
            problems[code] += int((rows & complete).sum())
            complete &= ~rows
    items.refuse_unknown(
        event_items, where, complete, limit=max_unknown, elsewhere=partial(other_column, config, columns, items, used=[log.user, log.item])
    )
    item_of = items.rows_of(event_items, where, notes)
    given = [each for each in factors if each is not None]
    weights = np.prod(given, axis=0) if given else None
    counted = complete if weights is None else complete & (weights > 0)
    kept = counted & (item_of >= 0)
    problems[_OF_WEIGHT_ZERO] += int((complete & ~counted).sum())
    problems["unknown_item"] += int((counted & ~kept).sum())
    without = (users.counts(complete) > 0) & (users.counts(kept) == 0)
    problems["user_without_items"] += int(without.sum())
    weights = None if weights is None else weights[kept]
    if weights is not None and (weights == 1.0).all():
        weights = None
    histories = _grouped(users.ids, users.codes[kept], item_of[kept], times[kept], weights, content_rank, problems)
    histories.without_items = users.ids.filter(pa.array(without))
    return histories


def _ids(columns: Columns, field: str) -> Encoded:
    return encode(columns.table[field], f"{columns.path}, field {field!r}", with_nulls=True)


def _field(columns: Columns, name: str) -> Field:
    return Field(columns.table[name], name, str(columns.path), columns.place)


def _type_weights(log: LogColumns, config: CatalogConfig, notes: list[str]) -> np.ndarray | None:
    """Weight (R,) of the type of each event, NaN where the type is missing; None if the configuration lists no types."""
    listed, columns = config.event_types, log.columns
    if log.type is None or log.type not in columns.table.column_names:
        return None
    types = _ids(columns, log.type)
    if not listed:
        counts = types.counts()
        if len(counts) > 1:
            common = ", ".join(f"{types.ids[int(index)].as_py()} {counts[index]:,}" for index in np.argsort(-counts, kind="stable")[:5])
            notes.append(
                f"{columns.path}, field {log.type!r}: all {len(counts)} types count alike ({common}); "
                "set catalog.event_types to weight them"
            )
        return None
    known = pc.fill_null(pc.index_in(types.ids, pa.array([*listed], pa.large_string())), -1).to_numpy(zero_copy_only=False)
    unlisted = np.flatnonzero(np.append(known, 0)[types.codes] < 0)
    if len(unlisted):
        found = types.ids[int(types.codes[unlisted[0]])].as_py()
        raise CatalogError(
            f"{columns.place(int(unlisted[0]))}, field {log.type!r}: type {found!r} is not listed in catalog.event_types "
            f"({', '.join(listed)}); list it with its weight, or with 0 to leave its events out"
        )
    weights = np.array(list(listed.values()), dtype=np.float64)[known]
    return np.append(weights, np.nan)[types.codes]


def _given_weights(log: LogColumns) -> np.ndarray | None:
    """Weight (R,) in the weight column, NaN where it is missing; None without such a column."""
    if log.weight is None:
        return None
    weights = read_numbers(_field(log.columns, log.weight)).astype(np.float64)
    wrong = np.flatnonzero((weights < 0) | np.isinf(weights))
    if len(wrong):
        raise CatalogError(
            f"{log.columns.place(int(wrong[0]))}, field {log.weight!r}: the weight is {weights[wrong[0]]:g}, expected a finite number of 0 "
            "or more; correct it"
        )
    return weights


def _grouped(
    ids: pa.Array,
    user_of: np.ndarray,
    item_of: np.ndarray,
    times: np.ndarray,
    weights: np.ndarray | None,
    content_rank: np.ndarray,
    problems: Counter[str],
) -> Histories:
    """Histories of the users `ids` from their events (E,), which index users and items."""
    keys = (content_rank[item_of], times, user_of)
    order = np.lexsort(keys if weights is None else (weights, *keys))
    user_of, item_of, times = user_of[order], item_of[order], times[order]
    same = (user_of[1:] == user_of[:-1]) & (item_of[1:] == item_of[:-1]) & (times[1:] == times[:-1])
    problems["duplicate_event"] += int(same.sum())
    starts = np.flatnonzero(np.diff(user_of, prepend=-1))
    offsets = np.append(starts, len(user_of)).astype(np.int64)
    users = ids.take(pa.array(user_of[starts]))
    return Histories(users, offsets, item_of, times, None if weights is None else weights[order])
