"""Renaming of codes: the codes of a retrained tokenizer are permuted per level to agree with published Semantic IDs."""

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
    """Check before training that codes can be renamed after it.

    Raises:
        ConfigError: the published table has other codebook sizes.
    """
    if old.codebook_sizes != (codebook_size,) * num_levels:
        raise ConfigError(
            f"train_tokenizer.align_codes_to: the published table has codebooks {old.codebook_sizes}, this tokenizer {num_levels} of "
            f"{codebook_size}; set num_levels and codebook_size to the published values, or leave align_codes_to out"
        )


def rename_codes(
    tokenizer: ItemTokenizer, inputs: Sequence[ItemInput], item_ids: Sequence[str], old: SidTable, batch_size: int
) -> dict[str, Any]:
    """Permute the codes of every level in place, so that raw codes agree with the published codes of as many shared items as possible.

    Returns:
        `shared`, the number of items in both; and `agreement`, the share of them with equal codes per level, before and after.
        Nothing is permuted if no item is shared.
    """
    row_of = old.row_of
    shared = [row for row, item_id in enumerate(item_ids) if item_id in row_of]
    if not shared:
        return {"shared": 0}
    published = old.codes[[row_of[item_ids[row]] for row in shared]]
    raw = tokenizer.encode([inputs[row] for row in shared], batch_size).raw_codes.numpy()
    permutations = best_renaming(published, raw, old.codebook_sizes)
    tokenizer.head.rename(permutations)
    agreement = {
        name: np.mean(codes == published, axis=0).tolist() for name, codes in (("before", raw), ("after", rename(raw, permutations)))
    }
    return {"shared": len(shared), "agreement": agreement}
