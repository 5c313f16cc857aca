"""Histories of users, read from a table with one row per user and the items in time order."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pyarrow as pa

from mmsid.catalog.columns import Columns
from mmsid.catalog.config import CatalogConfig
from mmsid.catalog.histories import Histories
from mmsid.catalog.logs.columns import LogColumns
from mmsid.catalog.logs.hints import other_column
from mmsid.catalog.logs.item_ids import Encoded, ItemIds, encode
from mmsid.catalog.logs.list_cells import Lists, best_separator, is_list, of_lists, of_scalars, of_texts
from mmsid.catalog.logs.times import Field, is_text, read_times
from mmsid.errors import CatalogError

_LARGEST = 2.0**63  # of a time; larger numbers do not fit into int64


def read_sequences(
    log: LogColumns,
    config: CatalogConfig,
    items: ItemIds,
    content_rank: np.ndarray,
    problems: Counter[str],
    notes: list[str],
    max_unknown: float,
) -> Histories:
    """Histories of a table with one row per user, in the order in which the users first occur in it.

    The rows of one user are merged: by time if the table has times, else joined in the order of their content, so that the order of
    the rows has no influence. A row that repeats another one of its user is dropped.

    Raises:
        CatalogError: a user id is missing, a cell has the wrong type, times and items differ in number, or more than the share
            `max_unknown` of the interactions is of unknown items.
    """
    columns = log.columns
    users = encode(columns.table[log.user], f"{columns.path}, field {log.user!r}", with_nulls=True)
    if (users.codes < 0).any():
        place = columns.place(int(np.flatnonzero(users.codes < 0)[0]))
        raise CatalogError(f"{place}, field {log.user!r}: empty, expected an id; fill it in or remove the row")
    where = f"{columns.path}, field {log.sequence!r}"
    lists = _item_lists(log, config, items, notes)
    found = encode(lists.values, where)
    items.refuse_unknown(
        found, where, limit=max_unknown, elsewhere=partial(other_column, config, columns, items, used=[log.user, log.sequence])
    )
    item_of = items.rows_of(found, where, notes)
    times = None if log.time is None else _times(log, config, lists, found, problems, notes)
    row_of = np.repeat(np.arange(len(users.codes)), lists.lengths)
    problems["event_without_item"] += int((found.codes < 0).sum())
    problems["unknown_item"] += int(((item_of < 0) & (found.codes >= 0)).sum())
    known = item_of >= 0
    row_of, item_of, times = row_of[known], item_of[known], None if times is None else times[known]
    parts = _Parts(users.codes, row_of, item_of, times, content_rank, np.flatnonzero(known))
    histories = parts.histories(users, problems)
    if problems["user_in_several_rows"]:
        order = "merged by time" if times is not None else "joined in the order of their content, because the table has no times"
        notes.append(f"{columns.path}: {problems['user_in_several_rows']:,} users have several rows; these are {order}")
    problems["user_without_items"] += len(histories.without_items)
    return histories


def _item_lists(log: LogColumns, config: CatalogConfig, items: ItemIds, notes: list[str]) -> Lists:
    """Item ids of each row. Texts are split at the separator that makes most of the parts known."""
    columns, column = log.columns, _plain_column(log.columns, log.sequence)
    if is_list(column.type):
        return of_lists(column)
    if not is_text(column.type):
        return of_scalars(column)
    place = columns.place
    if "list_separator" in config.fields.model_fields_set:
        return of_texts(column, config.fields.list_separator, place, log.sequence)

    def share(lists: Lists, _: np.ndarray) -> float:
        counted = encode(lists.values, log.sequence)
        return float((np.append(items.rows(counted.ids), -1)[counted.codes] >= 0).mean()) if len(lists.values) else 0.0

    usual = config.fields.list_separator
    separator = best_separator(column, share, usual, place, log.sequence)
    if separator != usual:
        named = {" ": "white space", "\t": "tabs"}.get(separator, repr(separator))
        notes.append(f"{columns.path}, field {log.sequence!r}: the item ids are separated by {named}")
    return of_texts(column, separator, place, log.sequence)


def _plain_column(columns: Columns, name: str) -> pa.ChunkedArray:
    column = columns.table[name]
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _times(log: LogColumns, config: CatalogConfig, lists: Lists, found: Encoded, problems: Counter[str], notes: list[str]) -> np.ndarray:
    """Time (E,) of each interaction."""
    columns, column = log.columns, _plain_column(log.columns, log.time)
    if is_list(column.type):
        times = of_lists(column)
    elif is_text(column.type):
        usual = config.fields.list_separator
        separator = best_separator(column, partial(_share_of_equal_lengths, lists), usual, columns.place, log.time)
        times = of_texts(column, separator, columns.place, log.time)
    else:
        times = of_scalars(column)
    wrong = np.flatnonzero(times.lengths != lists.lengths)
    if len(wrong):
        row = int(wrong[0])
        raise CatalogError(
            f"{columns.place(row)}: {log.time} holds {times.lengths[row]} values, {log.sequence} {lists.lengths[row]}; "
            "give one time per interaction"
        )
    field = Field(times.values, log.time, str(columns.path), lambda value: columns.place(times.cell_of(value)))
    values = read_times(field, problems, notes)
    bad = np.flatnonzero((found.codes >= 0) & ~(np.abs(values) < _LARGEST))
    if len(bad):
        value = times.values[int(bad[0])].as_py()
        raise CatalogError(
            f"{field.place(int(bad[0]))}, field {log.time!r}: {str(value)[:80]!r} is not a time; give one time per interaction"
        )
    return values


def _share_of_equal_lengths(lists: Lists, sample: Lists, rows: np.ndarray) -> float:
    return float((sample.lengths == lists.lengths[rows]).mean())


class _Parts:
    """Known interactions (E,) of the rows (R,) of a table, of which one user may have several."""

    def __init__(
        self,
        user_of: np.ndarray,
        row_of: np.ndarray,
        item_of: np.ndarray,
        times: np.ndarray | None,
        content_rank: np.ndarray,
        position: np.ndarray,
    ) -> None:
        self.user_of, self.row_of, self.item_of, self.times = user_of, row_of, item_of, times
        self.content_rank, self.position = content_rank, position

    def histories(self, users: Encoded, problems: Counter[str]) -> Histories:
        """One history per user that has an interaction."""
        place = np.zeros(len(self.user_of), dtype=np.int64)  # of each row among the rows of its user
        kept = np.ones(len(self.row_of), dtype=bool)
        rows_per_user = np.bincount(self.user_of, minlength=len(users.ids))
        if (rows_per_user > 1).any():
            problems["user_in_several_rows"] += int((rows_per_user > 1).sum())
            dropped = self._order_rows(place, np.flatnonzero(rows_per_user[self.user_of] > 1))
            problems["repeated_row"] += len(dropped)
            kept = ~np.isin(self.row_of, dropped)
        user_of = self.user_of[self.row_of]
        untimed = np.lexsort((self.position, place[self.row_of], user_of))
        order = untimed if self.times is None else np.lexsort((self.position, place[self.row_of], self.times, user_of))
        untimed, order = untimed[kept[untimed]], order[kept[order]]
        if self.times is not None:
            single = rows_per_user[user_of] == 1
            moved = untimed[(untimed != order) & single[order]]
            problems["timestamps_out_of_order"] += len(np.unique(user_of[moved]))
        present, lengths = np.unique(user_of[order], return_counts=True)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        ids = users.ids.take(pa.array(present))
        found = Histories(ids, offsets, self.item_of[order], None if self.times is None else self.times[order])
        found.without_items = users.ids.take(pa.array(np.setdiff1d(self.user_of, present)))
        return found

    def _order_rows(self, place: np.ndarray, rows: np.ndarray) -> list[int]:
        """Number the rows of each user by their content, in `place`. -> rows that repeat another one of their user."""
        starts = np.searchsorted(self.row_of, np.arange(len(self.user_of) + 1)).tolist()
        keys = []
        for row in rows.tolist():
            part = slice(starts[row], starts[row + 1])
            times = [] if self.times is None else self.times[part].tolist()
            keys.append((int(self.user_of[row]), self.content_rank[self.item_of[part]].tolist(), times, row))
        keys.sort()
        dropped, before = [], None
        for number, (*key, row) in enumerate(keys):
            place[row] = number
            if key == before and starts[row] < starts[row + 1]:
                dropped.append(row)
            before = key
        return dropped
