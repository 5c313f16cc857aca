"""Codes of the items by content alone, and by the behaviour of shortened histories (`mmsid.sids.readings`), without encoding them again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mmsid.catalog import Catalog, Split
from mmsid.sids import SidTable
from mmsid.sids.readings import Readings
from mmsid.tokenizer.behaviour import BehaviourInput, ItemBehaviour, behaviour_of_catalog
from mmsid.tokenizer.heads import ResidualHead

_ROWS = 4096  # items whose states are held at once


def shortened_behaviour(behaviour: BehaviourInput | None, catalog: Catalog, split: Split | None) -> ItemBehaviour | None:
    """Behaviour of the items in the train histories without their last items.

    None if the tokenizer reads no co-engagement: the user's own vectors cannot be computed again from fewer interactions.
    """
    if behaviour is None or behaviour.settings.source != "coengagement" or split is None:
        return None
    shortened = split.with_train([slice(-1)] * len(split.train), split.valid)
    found = behaviour_of_catalog(behaviour, catalog, shortened)
    count = len(catalog.items)
    return found or ItemBehaviour(np.zeros((count, behaviour.settings.dim), np.float32), np.zeros(count))


@torch.no_grad()
def further_readings(
    head: ResidualHead, scores_of: Callable[[np.ndarray], Tensor], read: ItemBehaviour, shortened: ItemBehaviour, table: SidTable
) -> Readings:
    """Raw codes of N items in both further readings. Where they equal the raw codes of the table, its published codes are taken.

    Args:
        scores_of: projected states (n, L, D) of item rows (n,), computed with the behaviour `read`.
        table: the published SIDs, rows as in `read` and `shortened`.
    """
    device, found = head.vectors.device, np.zeros((2, *table.codes.shape), np.int64)
    known, other = (torch.from_numpy(each.rows()) for each in (read, shortened))
    nothing = torch.zeros_like(other)
    for start in range(0, len(table), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(table)))
        s, before = scores_of(rows).to(device), known[rows].to(device)
        for place, after in enumerate((other, nothing)):
            codes = head.greedy(head.behaviour.replaced(s, before, after[rows].to(device))).codes.cpu().numpy()
            same = (codes == table.raw_codes[rows]).all(1, keepdims=True)
            found[place, rows] = np.where(same, table.codes[rows], codes)
    return Readings(*found)
