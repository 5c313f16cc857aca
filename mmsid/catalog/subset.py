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

from mmsid.artifacts import read_table, write_table, write_text
from mmsid.catalog.catalog import Catalog
from mmsid.catalog.config import CatalogConfig
from mmsid.catalog.tables import Cells, read_table_rows


def write_items(config: CatalogConfig, item_ids: Collection[str], folder: Path) -> CatalogConfig:
    """Write the rows of the items table that belong to `item_ids`, in the format of the source, and return a configuration that reads them.

    Pictures stay where they are. `max_items` is removed: the ids are the choice.

    Raises:
        CatalogError: the items table cannot be read.
    """
    column = config.fields.group_by or config.fields.item_id
    ids = read_table_rows(config.items, [column], config_key="catalog.items")
    cells, chosen = Cells(ids, config.fields.list_separator), set(item_ids)
    kept = [cells.text(index, column) in chosen for index in range(len(ids.rows))]
    path = folder / f"items{config.items.suffix.lower()}"
    folder.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        write_table(path, read_table(config.items).filter(pa.array(kept)))
    else:
        whole = read_table_rows(config.items, ids.columns, config_key="catalog.items")
        rows = [row for row, keep in zip(whole.rows, kept, strict=True) if keep]
        if whole.is_csv:
            text = io.StringIO()
            writer = csv.DictWriter(text, whole.columns)
            writer.writeheader()
            writer.writerows(rows)
            write_text(path, text.getvalue())
        else:
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return config.model_copy(update={"items": path, "image_root": config.root, "max_items": None})


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
    rows = [[catalog.items[row].item_id for row in (*history, target, history[-1])] for history, target in ends]
    users = [f"user{number}" for number in range(len(rows))]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sequences.parquet"
    write_table(path, pa.table({"user_id": users, "items": pa.array(rows, pa.list_(pa.string()))}))
    fields = config.fields.model_copy(update={"user_id": "user_id", "sequence": "items", "timestamps": None})
    split = config.split.model_copy(update={"method": "leave_one_out"})
    return config.model_copy(
        update={"sequences": path, "events": None, "event_types": {}, "fields": fields, "split": split} | {"max_users": None}
    )
