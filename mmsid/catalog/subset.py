"""Write a part of a catalogue as a catalogue of its own: some of its items, and given train histories.

The new-item benchmark trains tokenizers on such a part, so that hidden items and interactions are in no file that they read.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmsid.artifacts import write_table, write_text
from mmsid.catalog.catalog import Catalog
from mmsid.catalog.config import CatalogConfig
from mmsid.catalog.sources import Batch, open_table
from mmsid.catalog.tables import Cells, Table


def write_items(config: CatalogConfig, item_ids: Collection[str], folder: Path) -> CatalogConfig:
    """Write the rows of the items table that belong to `item_ids`, and return a configuration that reads them.

    Rows of text formats such as csv are written as csv. All others are written as parquet, or as JSON Lines if a column holds values of
    several types. Pictures stay where they are. `max_items` is removed: the ids are the choice.

    Raises:
        CatalogError: the items table cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    column = config.fields.group_by or config.fields.item_id
    opened, chosen = open_table(config.items, config_key="catalog.items"), set(item_ids)
    texts: list[dict] = []
    typed: list[Batch] = []
    for batch in opened.batches(opened.columns):
        ids = [{column: value} for value in batch.values(column)]
        cells = Cells(Table(batch.file, [column], ids, batch.numbers, batch.unit, batch.textual), config.fields.list_separator)
        kept = [index for index in range(len(batch)) if cells.text(index, column) in chosen]
        if kept and batch.textual:
            texts += batch.take(kept).rows()
        elif kept:
            typed.append(batch.take(kept))
    sources = [_write_texts(folder / "items.csv", texts, opened.columns)] if texts or not typed else []
    sources += [_write_typed(folder, typed)] if typed else []
    items = sources[0] if len(sources) == 1 else tuple(sources)
    return config.model_copy(update={"items": items, "image_root": config.root, "max_items": None})


def _write_texts(path: Path, rows: list[dict], columns: Sequence[str]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    return path


def _write_typed(folder: Path, batches: list[Batch]) -> Path:
    try:
        if not any(batch.mixed for batch in batches):
            table = pa.concat_tables([batch.table for batch in batches], promote_options="permissive")
            write_table(folder / "items.parquet", table)
            return folder / "items.parquet"
    except pa.ArrowException:  # types that have nothing in common, or that parquet cannot hold
        pass
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for batch in batches for row in batch.rows())
    write_text(folder / "items.jsonl", "".join(lines))
    return folder / "items.jsonl"


def with_train_histories(
    config: CatalogConfig, catalog: Catalog, histories: Sequence[np.ndarray], folder: Path, valid: Sequence[int] | None = None
) -> CatalogConfig:
    """Write histories (item rows of `catalog`) as a sequences table, and return `config` with a split whose train part they are.

    The split is leave-one-out. It takes two interactions from the end of every history, so the last item is written twice more. No
    model reads the two copies: they are the valid and the test item.

    Args:
        valid: valid item of each history, instead of a copy; -1 for none.
    """
    targets = [-1] * len(histories) if valid is None else valid
    ends = [(history, history[-1] if target < 0 else target) for history, target in zip(histories, targets, strict=True) if len(history)]
    item_ids = catalog.item_ids
    rows = [[item_ids[row] for row in (*history, target, history[-1])] for history, target in ends]
    users = [f"user{number}" for number in range(len(rows))]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sequences.parquet"
    write_table(path, pa.table({"user_id": users, "items": pa.array(rows, pa.list_(pa.string()))}))
    fields = config.fields.model_copy(update={"user_id": "user_id", "sequence": "items", "timestamps": None})
    split = config.split.model_copy(update={"method": "leave_one_out"})
    return config.model_copy(
        update={"sequences": path, "events": None, "event_types": {}, "fields": fields, "split": split} | {"max_users": None}
    )
