"""Users with their whole histories, read in shards for recommending. Rows that cannot be used are listed with their reasons."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from mmsid.catalog import Catalog, Fields
from mmsid.catalog.logs.list_cells import SEPARATORS
from mmsid.catalog.sources.locate import Source
from mmsid.catalog.tables import Cells, Table, require_column, table_pieces
from mmsid.errors import CatalogError

_SAMPLE = 1000  # rows by which the separator of text cells is chosen
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


def users_of_file(
    path: Source | Sequence[Source], fields: Fields, rows: int, known: Collection[str], *, config_key: str
) -> tuple[int, Iterator[Users]]:
    """Number of rows of a table of users, and its users in shards of `rows` rows.

    The table has the columns `fields.user_id` and `fields.sequence`, as `catalog.sequences`. Histories are sorted by the times in
    `fields.timestamps`, if the table has this column. A missing history counts as empty. Histories in text cells are split at the
    separator of `fields.list_separator`, or, where this key is not set, at the one that makes most ids of the first rows `known`.

    Raises:
        CatalogError: the file is unreadable or empty, or a column is absent. Shards may raise it, too.
    """
    selected = [name for name in (fields.user_id, fields.sequence, fields.timestamps) if name is not None]
    total, pieces = table_pieces(path, selected, rows, config_key=config_key)
    return total, _shards(pieces, fields, known)


def users_of_catalog(catalog: Catalog, rows: int) -> tuple[int, Iterator[Users]]:
    """Number of users of a catalogue, and its users in shards of `rows` users. Users without a known item have an empty history."""
    item_ids, histories, others = catalog.item_ids, catalog.histories, catalog.histories.without_items

    def shards() -> Iterator[Users]:
        for start in range(0, len(histories) + len(others), rows):
            part = histories[start : start + rows]
            users = Users([user.user_id for user in part], [tuple(item_ids[row] for row in user.rows) for user in part])
            users.ids += others.slice(max(start - len(histories), 0), rows - len(part)).to_pylist()
            users.histories += [()] * (len(users.ids) - len(part))
            yield users

    return len(histories) + len(others), shards()


def _shards(pieces: Iterator[Table], fields: Fields, known: Collection[str]) -> Iterator[Users]:
    for number, table in enumerate(pieces):
        if number == 0 and "list_separator" not in fields.model_fields_set:
            fields = fields.model_copy(update={"list_separator": _separator(table, fields, known)})
        yield _users(table, fields)


def _separator(table: Table, fields: Fields, known: Collection[str]) -> str:
    """The separator that makes most ids known in the text cells of the first rows."""
    cells = [row.get(fields.sequence) for place, row in enumerate(table.rows[:_SAMPLE]) if table.textual(place)]
    texts = [cell for cell in cells if isinstance(cell, str) and not cell.lstrip().startswith("[")]

    def share(separator: str) -> float:
        parts = [part.strip() for text in texts for part in text.split(None if separator == " " else separator)]
        return sum(part in known for part in parts) / max(len(parts), 1)

    return max((fields.list_separator, *SEPARATORS), key=share)


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
