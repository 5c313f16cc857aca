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
from mmsid.catalog.events import read_events
from mmsid.catalog.histories import UserHistory, read_sequences
from mmsid.catalog.items import Item, read_items
from mmsid.catalog.vectors import ItemVectors, concatenated, read_vectors
from mmsid.config import build


@dataclass
class Catalog:
    """A catalogue in canonical order.

    Attributes:
        items: sorted by content hash. The index in this list is the item's row everywhere else.
        row_of: item id -> row.
        histories: users with at least one known item, sorted by content.
        sha256: hash of item ids, content and histories. It does not depend on row order or user ids.
        problems: count of each code of `Item.problems`, and of the problems of histories: `unknown_item` (interactions dropped),
            `user_without_items` (users dropped), `timestamps_out_of_order` (users whose interactions were sorted),
            `repeated_item` (interactions with an item that the user has engaged with before), and the codes of
            `mmsid.catalog.events`; `vector_of_unknown_item` counts the vectors of items that the catalogue does not have.
        vectors: vectors of the items in their order, the families beside each other; None if the configuration names none.
    """

    items: list[Item]
    row_of: dict[str, int]
    histories: list[UserHistory]
    sha256: str
    problems: Counter[str]
    vectors: ItemVectors | None = None

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
    items, vectors = _read_vectors(config, items, problems)
    read_histories = read_events if config.events is not None else read_sequences
    histories = read_histories(config, items, problems) if config.users_file is not None else []
    position = {item.item_id: row for row, item in enumerate(items)}
    items, histories = _in_canonical_order(items, histories, config.max_items)
    if vectors is not None:
        vectors = vectors.take(np.array([position[item.item_id] for item in items], dtype=np.int64))
    catalog = Catalog(items, {item.item_id: row for row, item in enumerate(items)}, [], "", problems, vectors)
    catalog.histories = sorted(histories, key=lambda user: _user_key(catalog, user))[: config.max_users]
    catalog.problems.update(code for item in items for code in item.problems)
    catalog.problems.update(repeated_item=sum(len(user.rows) - len(np.unique(user.rows)) for user in catalog.histories))
    catalog.problems += Counter()  # adding an empty counter removes zero counts
    catalog.sha256 = _catalog_sha256(catalog)
    return catalog


def _read_vectors(config: CatalogConfig, items: list[Item], problems: Counter[str]) -> tuple[list[Item], ItemVectors | None]:
    """The items, whose content now includes their vectors, and the vectors of all families beside each other."""
    if not config.vectors:
        return items, None
    item_ids = [item.item_id for item in items]
    vectors = concatenated([read_vectors(path, item_ids) for path in config.vectors])
    problems["vector_of_unknown_item"] += vectors.unknown
    found = []
    for item, values, present in zip(items, vectors.values.astype("<f4"), vectors.present, strict=True):
        if present:
            digest = hashlib.sha256(item.content_sha256.encode() + values.tobytes()).hexdigest()
            found.append(replace(item, content_sha256=digest))
        else:
            found.append(replace(item, problems=(*item.problems, "no_vector")))
    return found, vectors


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
            times, weights = (None if values is None else values[kept] for values in (user.timestamps, user.weights))
            mapped.append(replace(user, rows=rows[kept], timestamps=times, weights=weights))
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
                weight = "" if user.weights is None else f":{user.weights[position]}"
                occurrences[int(user.rows[position])].append(f"{history}:{position}:{time}{weight}")
    return {row: hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest() for row, found in occurrences.items()}


def _user_key(catalog: Catalog, user: UserHistory) -> tuple[str, list[int], list[float], list[float], str]:
    times, weights = ([] if values is None else values.tolist() for values in (user.timestamps, user.weights))
    return catalog.content_hash(user.rows), user.rows.tolist(), times, weights, user.user_id


def _catalog_sha256(catalog: Catalog) -> str:
    digest = hashlib.sha256()
    for item in catalog.items:
        digest.update(f"{item.item_id}\n{item.content_sha256}\n".encode())
    for user in catalog.histories:
        weights = "" if user.weights is None else f"{user.weights.tolist()}\n"
        digest.update(f"{user.rows.tolist()}\n{None if user.timestamps is None else user.timestamps.tolist()}\n{weights}".encode())
    return digest.hexdigest()
