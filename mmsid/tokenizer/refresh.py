"""Refresh of published Semantic IDs: items that were published by their content move once their behaviour has become sure.

Published codes never move by themselves. A refresh encodes such items with their behaviour, and moves those whose published codes fit the
new reading worst, up to a share of the published items.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mmsid.sids.table import BEHAVIOUR
from mmsid.tokenizer.behaviour import BehaviourInput, ItemBehaviour
from mmsid.tokenizer.heads import CodeHead
from mmsid.tokenizer.published_sids import Published

SURE = 0.5  # trust g at which behaviour counts as sure: the item's own behaviour then weighs as much as its prediction


def sure_items(published: Published, rows: np.ndarray, behaviour: BehaviourInput, known: ItemBehaviour) -> np.ndarray:
    """Published items (N,) bool that were read by content and whose behaviour is now sure.

    Args:
        rows: (N,) row of each item in `published.table`, -1 for new items.
    """
    by_content = np.ones(len(rows), bool)
    if published.table.source is not None:
        by_content = published.table.source[np.maximum(rows, 0)] != BEHAVIOUR
    trust = behaviour.trust(torch.from_numpy(known.interactions).to(behaviour.kappa)).cpu().numpy()
    return (rows >= 0) & by_content & (trust >= SURE)


@torch.no_grad()
def misfit(head: CodeHead, scores: Tensor, raw_codes: np.ndarray, published_codes: np.ndarray) -> np.ndarray:
    """Loss of log-probability (n,), in nats, of the published codes against the raw codes (n, L), given projected states (n, L, D)."""
    codes = torch.from_numpy(np.stack([raw_codes, published_codes], 1))
    log_prob = head.log_prob(scores, codes.to(scores.device)).sum(-1)
    return (log_prob[:, 0] - log_prob[:, 1]).cpu().numpy()


def moving_items(misfits: np.ndarray, raw_codes: np.ndarray, published_codes: np.ndarray, most: int) -> np.ndarray:
    """Items (n,) bool that move: those with other raw codes than published, the largest misfits first, at most `most`. Ties go to the
    first item."""
    differs = (raw_codes != published_codes).any(1)
    order = np.argsort(-np.where(differs, misfits, -math.inf), kind="stable")[: min(most, int(differs.sum()))]
    moving = np.zeros(len(differs), bool)
    moving[order] = True
    return moving
