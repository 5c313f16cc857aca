"""Output files of a refinement: moved items, tokenizer and SID folders, near ties."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from mmsid.artifacts import write_json, write_table, write_tensors
from mmsid.catalog import Catalog, adjacent_pairs
from mmsid.id_columns import id_array
from mmsid.refine.evidence import Floats
from mmsid.sids.folder import write_sid_folder
from mmsid.sids.intrinsic import intrinsic_metrics
from mmsid.sids.table import SidTable
from mmsid.tokenizer.model import ItemTokenizer

NEAR_TIE = 0.05  # nats between the best and the second-best code


def write_moved(folder: Path, start: SidTable, refined: SidTable, gained: Mapping[str, Floats], accepted: bool) -> int:
    """Write `moved.parquet`, one row per item whose codes differ, with what it gained of every reward component. -> number of rows.

    Args:
        gained: component -> (M,), in the order of the rows. `reward_gained` is that of `sid_reward`.
    """
    rows = np.flatnonzero((start.codes != refined.codes).any(axis=1))
    columns = {
        "item_id": id_array([start.item_ids[row] for row in rows], start.integer_ids),
        "codes_before": pa.array(start.codes[rows].tolist(), pa.list_(pa.int64())),
        "codes_after": pa.array(refined.codes[rows].tolist(), pa.list_(pa.int64())),
        "reward_gained": pa.array(gained["sid_reward"], pa.float64()),
    }
    columns |= {f"{name}_gained": pa.array(values, pa.float64()) for name, values in gained.items() if name != "sid_reward"}
    write_table(folder / "moved.parquet", pa.table(columns), {"accepted": str(accepted).lower()})
    return len(rows)


def write_near_ties(folder: Path, table: SidTable) -> int:
    """Write `near_ties.json`: items whose raw codes may change with the order of additions (processes, machine). -> number of items."""
    close = np.flatnonzero(np.asarray(table.margin) < NEAR_TIE)
    write_json(folder / "near_ties.json", {"margin": NEAR_TIE, "items": [table.item_ids[row] for row in close]})
    return len(close)


def write_tokenizer(folder: Path, tokenizer: ItemTokenizer, outcome: str) -> None:
    """Write a tokenizer folder whose model card describes the `outcome` of the refinement."""
    folder.mkdir()
    (folder / "README.md").write_text(f"# Item tokenizer\n\n{tokenizer.describe()}\n\n{outcome}\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)


def write_sids(folder: Path, table: SidTable, embedding: np.ndarray, catalog: Catalog, held_out: list[np.ndarray], seed: int) -> None:
    """Write a SID folder with intrinsic metrics on the held-out users and the embeddings (N, D)."""
    categories = [item.categories for item in catalog.items]
    metrics = intrinsic_metrics(
        table,
        categories if any(categories) else None,
        adjacent_pairs(held_out) if held_out else None,
        embeddings=embedding,
        content_hashes=catalog.content_hashes,
        seed=seed,
    )
    write_sid_folder(folder, table, metrics)
    write_tensors(folder / "embeddings.safetensors", {"embeddings": torch.from_numpy(embedding)})
