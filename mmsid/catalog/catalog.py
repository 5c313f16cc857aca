"""Catalogue of items and user histories in canonical order.

Items are sorted by content hash. Items with equal content are sorted by the histories that contain them, and by id as the last
resort. Users are sorted by the content of their histories. Row order and ids in the files therefore do not change seeded results.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmsid.catalog.config import CatalogConfig
from mmsid.catalog.items import Item, read_items, require_column
from mmsid.catalog.tables import Cells, read_table_rows
from mmsid.config import build
from mmsid.errors import CatalogError


@dataclass
class UserHistory:
    """History of one user: `rows` (T,) int64 item rows in time order, `timestamps` (T,) or None."""

    user_id: str
    rows: np.ndarray
    timestamps: np.ndarray | None


@dataclass
class Catalog:
    """A catalogue in canonical order.

    Attributes:
        items: sorted by content hash. The index in this list is the item's row everywhere else.
        row_of: item id -> row.
        histories: users with at least one known item, sorted by content.
        sha256: hash of item ids, content and histories. It does not depend on row order or user ids.
        problems: count of each code of `Item.problems`, and of the problems of sequences: `unknown_item` (interactions dropped),
            `user_without_items` (users dropped), `timestamps_out_of_order` (users whose interactions were sorted),
            `repeated_item` (interactions with an item that the user has engaged with before).
    """

    items: list[Item]
    row_of: dict[str, int]
    histories: list[UserHistory]
    sha256: str
    problems: Counter[str]

    @classmethod
    def read(cls, catalog: CatalogConfig | Mapping[str, Any] | str | Path) -> Catalog:
        """Read a catalogue from the keys of a `catalog:` section, or from the path of its items table.

        Raises:
            ConfigError: an unknown key or a value of the wrong type.
            CatalogError: as `read_catalog`.
        """
        if isinstance(catalog, (str, Path)):
            catalog = {"items": catalog}
        if not isinstance(catalog, CatalogConfig):
            catalog = build(CatalogConfig, dict(catalog), source="Catalog.read", section="catalog")
        return read_catalog(catalog)

    def content_hash(self, rows: np.ndarray) -> str:
        """SHA-256 (hex) of the content of the items `rows`, in the given order. It identifies a history without ids."""
        joined = "".join(self.items[row].content_sha256 for row in rows)
        return hashlib.sha256(joined.encode()).hexdigest()


def read_catalog(config: CatalogConfig) -> Catalog:
    """Read and check items, pictures (bytes and headers) and sequences, and sort them into canonical order.

    Raises:
        CatalogError: the catalogue is unusable. The message names file, row, field and remedy. Missing or bad pictures,
            missing texts and interactions with unknown items do not raise. They are counted in `Catalog.problems`.
    """
    items = read_items(config)
    problems: Counter[str] = Counter()
    histories = _read_histories(config, items, problems) if config.sequences is not None else []
    items, histories = _in_canonical_order(items, histories, config.max_items)
    catalog = Catalog(items, {item.item_id: row for row, item in enumerate(items)}, [], "", problems)
    catalog.histories = sorted(histories, key=lambda user: _user_key(catalog, user))[: config.max_users]
    catalog.problems.update(code for item in items for code in item.problems)
    catalog.problems.update(repeated_item=sum(len(user.rows) - len(np.unique(user.rows)) for user in catalog.histories))
    catalog.problems += Counter()  # adding an empty counter removes zero counts
    catalog.sha256 = _catalog_sha256(catalog)
    return catalog


def _read_histories(config: CatalogConfig, items: list[Item], problems: Counter[str]) -> list[UserHistory]:
    """Read the histories, with item rows that index `items`. Dropped interactions and users are counted in `problems`."""
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


def _in_canonical_order(items: list[Item], histories: list[UserHistory], max_items: int | None) -> tuple[list[Item], list[UserHistory]]:
    """Sort the items, keep the first `max_items`, and map the histories to the new rows. Empty histories are dropped."""
    engagement = _engagement_of_duplicates(items, histories)
    order = sorted(range(len(items)), key=lambda row: (items[row].content_sha256, engagement.get(row, ""), items[row].item_id))
    order = order[:max_items]
    new_row = np.full(len(items), -1, dtype=np.int64)
    new_row[order] = np.arange(len(order))
    mapped = []
    for user in histories:
        rows = new_row[user.rows]
        kept = rows >= 0
        if kept.any():
            mapped.append(replace(user, rows=rows[kept], timestamps=None if user.timestamps is None else user.timestamps[kept]))
    return [items[row] for row in order], mapped


def _engagement_of_duplicates(items: list[Item], histories: list[UserHistory]) -> dict[int, str]:
    """Row -> hash of the histories (by content) and positions in which the item occurs, for items with equal content."""
    copies = Counter(item.content_sha256 for item in items)
    is_copy = np.array([copies[item.content_sha256] > 1 for item in items], dtype=bool)
    if not is_copy.any():
        return {}
    occurrences: dict[int, list[str]] = {int(row): [] for row in np.flatnonzero(is_copy)}
    for user in histories:
        positions = np.flatnonzero(is_copy[user.rows])
        if len(positions):
            history = hashlib.sha256("".join(items[row].content_sha256 for row in user.rows).encode()).hexdigest()
            for position in positions:
                time = "" if user.timestamps is None else user.timestamps[position]
                occurrences[int(user.rows[position])].append(f"{history}:{position}:{time}")
    return {row: hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest() for row, found in occurrences.items()}


def _user_key(catalog: Catalog, user: UserHistory) -> tuple[str, list[int], list[float], str]:
    times = [] if user.timestamps is None else user.timestamps.tolist()
    return catalog.content_hash(user.rows), user.rows.tolist(), times, user.user_id


def _catalog_sha256(catalog: Catalog) -> str:
    digest = hashlib.sha256()
    for item in catalog.items:
        digest.update(f"{item.item_id}\n{item.content_sha256}\n".encode())
    for user in catalog.histories:
        digest.update(f"{user.rows.tolist()}\n{None if user.timestamps is None else user.timestamps.tolist()}\n".encode())
    return digest.hexdigest()
