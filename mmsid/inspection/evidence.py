"""Evidence beside a mapping: how often items occur in logs, which items follow each other, categories, contents and vectors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmsid.catalog import Catalog, CatalogConfig, Fields, adjacent_pairs, read_catalog, split_histories
from mmsid.catalog.logs.read import read_histories
from mmsid.catalog.sources.opened import open_table
from mmsid.catalog.vector_files import open_vectors
from mmsid.errors import CatalogError
from mmsid.sids.table import SidTable


@dataclass(frozen=True)
class Logs:
    """What logs say of N items.

    Attributes:
        counts: (N,) interactions of each item.
        pairs: (P, 2) rows of consecutive items of the histories.
        notes: what was detected, one line per fact.
    """

    counts: np.ndarray
    pairs: np.ndarray
    notes: list[str]


@dataclass(frozen=True)
class Vectors:
    """Vectors of some items: `rows` (n,) of the table, `values` (n, D)."""

    rows: np.ndarray
    values: np.ndarray
    notes: list[str]


def logs_of_file(path: Path, table: SidTable) -> Logs:
    """Logs of a table of histories (`user_id`, `items`) or of events (`user_id`, `item_id`, `timestamp`).

    Raises:
        CatalogError: the file is unreadable, columns are absent, or most interactions are of items without a Semantic ID.
    """
    columns = open_table(path, config_key="--histories").columns
    if "items" in columns:
        fields = Fields(timestamps="timestamps") if "timestamps" in columns else Fields()
        config = CatalogConfig(items=path, sequences=path, fields=fields)
    elif {"user_id", "item_id", "timestamp"} <= set(columns):
        config = CatalogConfig(items=path, events=path)
    else:
        raise CatalogError(
            f"{path}: found the columns {', '.join(columns)}; expected user_id and items (histories), or user_id, item_id and timestamp "
            "(events); rename them, or describe your logs in a configuration and give --config"
        )
    problems: Counter[str] = Counter()
    notes: list[str] = []
    histories = read_histories(config, pa.array(table.item_ids, pa.string()), np.arange(len(table)), problems, notes)
    notes += [f"{path}: {name.replace('_', ' ')}: {count:,}" for name, count in problems.items() if count]
    return _logs(list(histories.pieces()), len(table), notes)


def catalog_of(config: CatalogConfig, table: SidTable) -> tuple[SidTable, Catalog, list[str]]:
    """The items of the table that are in a catalogue, in the order of the catalogue.

    Raises:
        CatalogError: the catalogue cannot be read, or no item of the table is in it.
    """
    catalog = read_catalog(config)
    known, row_of = table.row_of, catalog.row_of
    both = [item_id for item_id in catalog.item_ids if item_id in known]
    if not both:
        raise CatalogError(
            f"none of the {len(table):,} items is in the catalogue of {len(row_of):,} items; give the catalogue of the mapping"
        )
    notes = []
    if len(both) < len(table):
        notes.append(f"{len(table) - len(both):,} items of the mapping are not in the catalogue; they are left out")
    if len(both) < len(row_of):
        notes.append(f"{len(row_of) - len(both):,} items of the catalogue have no Semantic ID")
    return table.align(both), catalog, notes


def logs_of_catalog(config: CatalogConfig, catalog: Catalog, table: SidTable) -> Logs | None:
    """Train interactions of a catalogue, and consecutive items of its held-out users; None without histories."""
    if not len(catalog.histories):
        return None
    split = split_histories(catalog, config.split)
    row_of = table.row_of
    new_row = np.array([row_of.get(item_id, -1) for item_id in catalog.item_ids], dtype=np.int64)
    train = [kept for rows in split.train if len(kept := _known(new_row[rows]))]
    held_out = [kept for rows in split.held_out_histories() if len(kept := _known(new_row[rows]))]
    return Logs(_logs(train, len(table), []).counts, adjacent_pairs(held_out), [])


def vectors_of_file(path: Path, table: SidTable) -> Vectors:
    """Vectors of the items, from parquet (`item_id`, `vector`) or a matrix (`.npy`) whose rows are the items 0 to N-1.

    Raises:
        CatalogError: the file cannot be read, or has a vector for fewer than two items.
    """
    files = open_vectors([path], config_key="--vectors")
    row_of = table.row_of
    rows = np.array([row_of.get(item_id, -1) for item_id in files.ids.to_pylist()], dtype=np.int64)
    kept_rows, kept = [], []
    for block in files.blocks():
        at = rows[block.start : block.start + len(block.values)]
        usable = (at >= 0) & (block.faults == 0)
        kept_rows.append(at[usable])
        kept.append(block.values[usable])
    found = np.concatenate(kept_rows)
    if len(found) < 2:
        raise CatalogError(f"{path}: {len(found)} of {len(table):,} items have a usable vector; give vectors of these items, with item_id")
    notes = [] if len(found) == len(table) else [f"{len(table) - len(found):,} items have no usable vector"]
    return Vectors(found, np.concatenate(kept), notes)


def _logs(histories: list[np.ndarray], items: int, notes: list[str]) -> Logs:
    counts = np.zeros(items, dtype=np.int64)
    if histories:
        counts += np.bincount(np.concatenate(histories), minlength=items)
    return Logs(counts, adjacent_pairs(histories), notes)


def _known(rows: np.ndarray) -> np.ndarray:
    return rows[rows >= 0]
