"""Catalogue of items and user histories in canonical order, read from an ingested catalogue or from the user's sources."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmsid.artifacts import read_manifest
from mmsid.catalog.config import CatalogConfig
from mmsid.catalog.histories import Histories
from mmsid.catalog.ingest.build import build as build_files
from mmsid.catalog.ingest.built import Built
from mmsid.catalog.ingest.writing import HISTORIES, ITEMS, PRESENT, VECTORS
from mmsid.catalog.item import Item
from mmsid.catalog.item_table import ItemTable
from mmsid.catalog.vectors import ItemVectors
from mmsid.config import build


@dataclass
class Catalog:
    """A catalogue in canonical order (`canonical_order`).

    Attributes:
        items: N items. The index in this sequence is the item's row everywhere else. An ingested catalogue is memory-mapped.
        histories: users with at least one known item, sorted by content.
        sha256: hash of item ids, content and histories. It does not depend on row order or user ids.
        problems: count of each code of `Item.problems`, of rows that are no items (`no_id`, `duplicate_id`), and of the problems of
            histories: `unknown_item` (interactions dropped), `user_without_items` (users dropped), `timestamps_out_of_order` (users
            whose interactions were sorted), `timestamp_of_other_unit` (times in another unit than most), `user_in_several_rows` (users
            whose rows were merged), `repeated_row` (rows dropped that repeat another one of their user), `duplicate_event` (events that
            repeat user, item and time), `repeated_item` (interactions with an item that the user has engaged with before), and the
            codes of `mmsid.catalog.logs.events`. `vector_of_unknown_item` counts the vectors of items that the catalogue does not have.
        vectors: vectors of the items in their order, the families beside each other; None if the configuration names none.
        notes: facts on the sources for the user, one line each.
        not_read: columns of the items table that no field refers to.
        integer_ids, integer_user_ids: whether the ids are whole numbers in the user's tables. They are texts here, and become numbers
            again in the tables that stages write.
    """

    items: Sequence[Item]
    histories: Histories = field(default_factory=lambda: Histories.of([]))
    sha256: str = ""
    problems: Counter[str] = field(default_factory=Counter)
    vectors: ItemVectors | None = None
    notes: Sequence[str] = ()
    not_read: Sequence[str] = ()
    integer_ids: bool = False
    integer_user_ids: bool = False

    def __post_init__(self) -> None:
        self.histories = Histories.of(self.histories)

    @classmethod
    def read(cls, catalog: CatalogConfig | Mapping[str, Any] | str | Path) -> Catalog:
        """Read a catalogue from the keys of a `catalog:` section, from its items table, or from a folder that `mmsid ingest` wrote.

        Raises:
            ConfigError: an unknown key or a value of the wrong type.
            CatalogError: as `read_catalog`.
        """
        if isinstance(catalog, (str, Path)):
            catalog = catalog_settings(catalog)
        if not isinstance(catalog, CatalogConfig):
            catalog = build(CatalogConfig, dict(catalog), source="Catalog.read", section="catalog")
        return read_catalog(catalog)

    @cached_property
    def item_ids(self) -> list[str]:
        """Ids of all items."""
        return self.items.item_ids if isinstance(self.items, ItemTable) else [item.item_id for item in self.items]

    @cached_property
    def content_hashes(self) -> list[str]:
        """`content_sha256` of all items."""
        return self.items.content_hashes if isinstance(self.items, ItemTable) else [item.content_sha256 for item in self.items]

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Item id -> row."""
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    def content_hash(self, rows: np.ndarray) -> str:
        """SHA-256 (hex) of the content of the items `rows`, in the given order. It identifies a history without ids."""
        hashes = self.content_hashes
        return hashlib.sha256("".join([hashes[row] for row in rows]).encode()).hexdigest()


def catalog_settings(source: str | Path) -> dict[str, Any]:
    """Keys of a `catalog:` section that reads `source`, an items table or a folder that `mmsid ingest` wrote."""
    if (Path(source) / ITEMS).is_file():
        manifest = read_manifest(Path(source), "ingest")
        return {**manifest["config"]["catalog"], "ingested": source, "picture_cache": manifest["extra"]["picture_cache"]}
    return {"items": source}


def read_catalog(config: CatalogConfig) -> Catalog:
    """Open the ingested catalogue of `config`. Where there is none, the sources are read now.

    Raises:
        CatalogError: the catalogue is unusable. The message names file, row, field and remedy. Missing or bad pictures, missing texts
            and interactions with unknown items do not raise. They are counted in `Catalog.problems`.
    """
    folder = config.artefact()
    if folder is not None:
        return _open(folder, config, Built.from_json(read_manifest(folder, "ingest")["extra"]))
    folder = Path(tempfile.mkdtemp(prefix="mmsid-catalogue-"))
    try:
        return _open(folder, config, build_files(config, folder))
    finally:
        shutil.rmtree(folder)  # the files stay mapped


def _open(folder: Path, config: CatalogConfig, built: Built) -> Catalog:
    items = ItemTable.open(folder / ITEMS, config.root.absolute())
    users = config.users_file is not None
    histories = Histories.open(folder / HISTORIES) if users else Histories.of([])
    problems = built.problems + (built.history_problems if users else Counter())
    vectors = None
    if built.vector_widths:
        values, present = np.load(folder / VECTORS, mmap_mode="r"), np.load(folder / PRESENT)
        vectors = ItemVectors(values, present, unknown=built.problems["vector_of_unknown_item"], widths=built.vector_widths)
    facts = (built.notes, built.not_read, built.integer_ids, built.integer_user_ids)
    return Catalog(items, histories, built.catalog_sha256, problems, vectors, *facts)
