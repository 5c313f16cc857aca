"""A retrained tokenizer keeps the old vocabulary: its codes are renamed to agree with what was published, level by level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmsid.errors import ConfigError
from mmsid.sids import SidTable
from mmsid.sids.churn import best_renaming, rename
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import ItemTokenizer


def check_sizes(old: SidTable, num_levels: int, codebook_size: int) -> None:
    """Refuse before training what cannot be renamed after it.

    Raises:
        ConfigError: the old table has other codebooks.
    """
    if old.codebook_sizes != (codebook_size,) * num_levels:
        raise ConfigError(
            f"train_tokenizer.align_codes_to: the published table has codebooks {old.codebook_sizes}, this tokenizer {num_levels} of "
            f"{codebook_size}; set num_levels and codebook_size to the published ones, or leave `against` out"
        )


def rename_codes(
    tokenizer: ItemTokenizer, inputs: Sequence[ItemInput], item_ids: Sequence[str], old: SidTable, batch_size: int
) -> dict[str, Any]:
    """Permute the codes of every level in place, so that the raw codes agree with the old published codes for most shared items.

    Returns `shared` items, and per level the share of them whose code agrees before and after. Nothing happens where no item is
    shared.
    """
    row_of = old.row_of
    shared = [row for row, item_id in enumerate(item_ids) if item_id in row_of]
    if not shared:
        return {"shared": 0}
    published = old.codes[[row_of[item_ids[row]] for row in shared]]
    raw = tokenizer.encode([inputs[row] for row in shared], batch_size).raw_codes.numpy()
    permutations = best_renaming(published, raw, old.codebook_sizes)
    tokenizer.head.rename(permutations)
    agreeing = {
        name: np.mean(codes == published, axis=0).tolist() for name, codes in (("before", raw), ("after", rename(raw, permutations)))
    }
    return {"shared": len(shared), "agreement": agreeing}
