"""Catalogue of items and user histories in canonical order.

Items are sorted by content hash. Items with equal content are sorted by the histories that contain them, and by id as the last
resort. Users are sorted by the content of their histories. Row order and ids in the files therefore do not change seeded results.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmsid.catalog.config import CatalogConfig
from mmsid.catalog.histories import Histories
from mmsid.catalog.history_order import engagement_of_duplicates, sorted_by_content, update_hash
from mmsid.catalog.items import Item, read_items
from mmsid.catalog.user_logs import read_histories
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
            `timestamp_of_other_unit` (times in another unit than most), `user_in_several_rows` (users whose rows were merged),
            `repeated_row` (rows dropped that repeat another one of their user), `duplicate_event` (events that repeat user, item and time),
            `repeated_item` (interactions with an item that the user has engaged with before), and the codes of
            `mmsid.catalog.events`. `vector_of_unknown_item` counts the vectors of items that the catalogue does not have.
        vectors: vectors of the items in their order, the families beside each other; None if the configuration names none.
        notes: what was detected while reading, one line per fact.
    """

    items: list[Item]
    row_of: dict[str, int]
    histories: Histories
    sha256: str
    problems: Counter[str]
    vectors: ItemVectors | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.histories = Histories.of(self.histories)

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
    notes: list[str] = []
    items, vectors = _read_vectors(config, items, problems)
    histories = Histories.of([])
    if config.users_file is not None:
        item_ids = pa.array([item.item_id for item in items], pa.large_string())
        histories = read_histories(config, item_ids, _content_rank(items), problems, notes)
    position = {item.item_id: row for row, item in enumerate(items)}
    items, histories = _in_canonical_order(items, histories, config.max_items)
    if vectors is not None:
        vectors = vectors.take(np.array([position[item.item_id] for item in items], dtype=np.int64))
    catalog = Catalog(items, {item.item_id: row for row, item in enumerate(items)}, histories, "", problems, vectors, notes)
    catalog.histories = sorted_by_content(histories, [item.content_sha256 for item in items])[: config.max_users]
    catalog.problems.update(code for item in items for code in item.problems)
    catalog.problems.update(repeated_item=int(catalog.histories.repeated().sum()))
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


def _in_canonical_order(items: list[Item], histories: Histories, max_items: int | None) -> tuple[list[Item], Histories]:
    """Sort the items, keep the first `max_items`, and map the histories to the new rows. Empty histories are dropped."""
    engagement = engagement_of_duplicates(histories, [item.content_sha256 for item in items])
    order = sorted(range(len(items)), key=lambda row: (items[row].content_sha256, engagement.get(row, ""), items[row].item_id))
    order = order[:max_items]
    new_row = np.full(len(items), -1, dtype=np.int64)
    new_row[order] = np.arange(len(order))
    return [items[row] for row in order], histories.mapped(new_row)


def _content_rank(items: list[Item]) -> np.ndarray:
    """Position (N,) of each item in the order of content, with the id as the last resort."""
    order = sorted(range(len(items)), key=lambda row: (items[row].content_sha256, items[row].item_id))
    rank = np.empty(len(items), dtype=np.int64)
    rank[order] = np.arange(len(items))
    return rank


def _catalog_sha256(catalog: Catalog) -> str:
    digest = hashlib.sha256()
    for item in catalog.items:
        digest.update(f"{item.item_id}\n{item.content_sha256}\n".encode())
    update_hash(digest, catalog.histories)
    return digest.hexdigest()
