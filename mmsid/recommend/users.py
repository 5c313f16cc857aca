"""Users with their whole histories, read in shards for recommending. Rows that cannot be used are listed with their reasons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from mmsid.catalog import Catalog, Fields
from mmsid.catalog.items import require_column
from mmsid.catalog.sources.locate import Source
from mmsid.catalog.tables import Cells, Table, table_pieces
from mmsid.errors import CatalogError

PROBLEMS = pa.schema({"row": pa.int64(), "user_id": pa.string(), "reason": pa.string()})


@dataclass
class Users:
    """Users of one shard, in the order of their table.

    Attributes:
        ids: user ids. One id may occur several times.
        histories: per user, item ids in time order.
        problems: rows that cannot be used, with the columns of `PROBLEMS`: number of the row in the file (from 1), user id (None if it
            is missing), reason.
    """

    ids: list[str] = field(default_factory=list)
    histories: list[tuple[str, ...]] = field(default_factory=list)
    problems: list[dict[str, Any]] = field(default_factory=list)


def users_of_file(path: Source | Sequence[Source], fields: Fields, rows: int, *, config_key: str) -> tuple[int, Iterator[Users]]:
    """Number of rows of a table of users, and its users in shards of `rows` rows.

    The table has the columns `fields.user_id` and `fields.sequence`, as `catalog.sequences`. Histories are sorted by the times in
    `fields.timestamps`, if the table has this column. A missing history counts as empty.

    Raises:
        CatalogError: the file is unreadable or empty, or a column is absent. Shards may raise it, too.
    """
    selected = [name for name in (fields.user_id, fields.sequence, fields.timestamps) if name is not None]
    total, pieces = table_pieces(path, selected, rows, config_key=config_key)
    return total, (_users(table, fields) for table in pieces)


def users_of_catalog(catalog: Catalog, rows: int) -> tuple[int, Iterator[Users]]:
    """Number of users of a catalogue, and its users in shards of `rows` users."""
    item_ids, histories = [item.item_id for item in catalog.items], catalog.histories
    parts = (histories[start : start + rows] for start in range(0, len(histories), rows))
    return len(histories), (
        Users([user.user_id for user in part], [tuple(item_ids[row] for row in user.rows) for user in part]) for part in parts
    )


def _users(table: Table, fields: Fields) -> Users:
    for name in ("user_id", "sequence"):
        require_column(table, getattr(fields, name), f"catalog.fields.{name}")
    cells, users = Cells(table, fields.list_separator), Users()
    for index in range(len(table.rows)):
        user_id = None
        try:
            user_id = cells.text(index, fields.user_id)
            history = _history(table, cells, index, fields)
            if not user_id:
                raise CatalogError(f"field {fields.user_id!r}: empty, expected an id")
        except CatalogError as error:
            reason = str(error).removeprefix(table.place(index)).lstrip(",: ")
            users.problems.append({"row": table.numbers[index], "user_id": user_id or None, "reason": reason})
        else:
            users.ids.append(user_id)
            users.histories.append(history)
    return users


def _history(table: Table, cells: Cells, index: int, fields: Fields) -> tuple[str, ...]:
    """Item ids of one row in time order. Raises CatalogError if the row has no usable history."""
    value = table.rows[index].get(fields.sequence)
    if not table.textual(index) and not isinstance(value, (list, tuple, type(None))):
        raise CatalogError(f"field {fields.sequence!r}: holds a {type(value).__name__}, expected a list of item ids")
    item_ids = cells.texts(index, fields.sequence)
    if fields.timestamps not in table.columns:
        return item_ids
    times = cells.numbers(index, fields.timestamps)
    if len(times) != len(item_ids):
        raise CatalogError(
            f"{fields.timestamps} holds {len(times)} values, {fields.sequence} {len(item_ids)}; give one time per interaction"
        )
    return tuple(item_ids[place] for place in sorted(range(len(times)), key=times.__getitem__))
