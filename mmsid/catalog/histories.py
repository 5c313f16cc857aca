"""Histories of users, read from a table with one row per user."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from mmsid.catalog.config import CatalogConfig
from mmsid.catalog.items import Item, require_column
from mmsid.catalog.tables import Cells, read_table_rows
from mmsid.errors import CatalogError


@dataclass
class UserHistory:
    """History of one user.

    Attributes:
        rows: (T,) int64, item rows in time order.
        timestamps: (T,), or None.
        weights: (T,) float64, weights of the events. None for sequences, and for events that all have the weight 1.
    """

    user_id: str
    rows: np.ndarray
    timestamps: np.ndarray | None
    weights: np.ndarray | None = None


def read_sequences(config: CatalogConfig, items: list[Item], problems: Counter[str]) -> list[UserHistory]:
    """Read the histories of `config.sequences`, with item rows that index `items`.

    Dropped interactions and users are counted in `problems`.

    Raises:
        CatalogError: the table is unreadable, a column is absent, a cell has the wrong type, or a user id is missing or occurs twice.
    """
    fields = config.fields
    columns = [name for name in (fields.user_id, fields.sequence, fields.timestamps) if name is not None]
    table = read_table_rows(config.sequences, columns, config_key="catalog.sequences")
    for field in ("user_id", "sequence", "timestamps"):
        if getattr(fields, field) is not None:
            require_column(table, getattr(fields, field), f"catalog.fields.{field}")
    cells = Cells(table, fields.list_separator)
    row_of = {item.item_id: row for row, item in enumerate(items)}
    first_seen: dict[str, int] = {}
    histories = []
    for index in range(len(table.rows)):
        user_id = cells.text(index, fields.user_id)
        if not user_id:
            raise CatalogError(f"{table.place(index)}, field {fields.user_id!r}: empty, expected an id; fill it in or remove the row")
        if user_id in first_seen:
            rows = f"{table.numbers[first_seen[user_id]]} and {table.numbers[index]}"
            raise CatalogError(f"{table.path}, {table.unit}s {rows}: {fields.user_id} {user_id!r} occurs twice; write one row per user")
        first_seen[user_id] = index
        item_ids = cells.texts(index, fields.sequence)
        times = None
        if fields.timestamps is not None:
            times = cells.numbers(index, fields.timestamps)
            if len(times) != len(item_ids):
                raise CatalogError(
                    f"{table.place(index)}: {fields.timestamps} holds {len(times)} values, {fields.sequence} {len(item_ids)}; "
                    "give one time per interaction"
                )
        history = _history(user_id, item_ids, times, row_of, problems)
        if history is not None:
            histories.append(history)
    return histories


def _history(
    user_id: str, item_ids: tuple[str, ...], times: list[int | float] | None, row_of: dict[str, int], problems: Counter[str]
) -> UserHistory | None:
    known = [position for position, item_id in enumerate(item_ids) if item_id in row_of]
    problems["unknown_item"] += len(item_ids) - len(known)
    if not known:
        problems["user_without_items"] += 1
        return None
    rows = np.array([row_of[item_ids[position]] for position in known], dtype=np.int64)
    if times is None:
        return UserHistory(user_id, rows, None)
    stamps = np.array([times[position] for position in known])
    if np.any(np.diff(stamps) < 0):
        problems["timestamps_out_of_order"] += 1
        order = np.argsort(stamps, kind="stable")
        rows, stamps = rows[order], stamps[order]
    return UserHistory(user_id, rows, stamps)
