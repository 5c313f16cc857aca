"""Code stability: share of items whose raw codes change when a tenth of the words of their text is missing.

The noise imitates a caption that is written again. Only texts are perturbed; items without text are left out. DRQ (2606.01844) defines
the same probability for noise of the embedding (expected overlap rate).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmsid.refine.evidence import Codes
from mmsid.refine.item_states import ItemStates
from mmsid.refine.policy import BATCH
from mmsid.tokenizer.heads import CodeHead
from mmsid.tokenizer.inputs import ItemInput

SAMPLE = 256
MISSING = 0.1


def noisy_sample(inputs: Sequence[ItemInput], hashes: Sequence[str]) -> tuple[list[int], list[ItemInput]]:
    """Rows of at most `SAMPLE` items with text, the first by content hash, and their inputs with missing words."""
    order = sorted((row for row in range(len(inputs)) if inputs[row].text), key=lambda row: hashes[row])
    rows = order[:SAMPLE]
    return rows, [replace(inputs[row], text=drop_words(inputs[row].text, MISSING)) for row in rows]


def drop_words(text: str, share: float) -> str:
    """`text` without about `share` of its words. The same words are dropped in every call."""
    kept = []
    for place, word in enumerate(text.split()):
        draw = int.from_bytes(hashlib.sha256(f"{place} {text}".encode()).digest()[:8])
        if draw >= share * 2**64:
            kept.append(word)
    return " ".join(kept)


@torch.no_grad()
def changed_codes(head: CodeHead, states: Tensor | ItemStates, clean: Codes) -> NDArray[np.bool_]:
    """Whether any raw code of an item changes under noise: noisy states (n, L, H), codes of the clean inputs (n, L) -> (n,)."""
    head = copy.deepcopy(head).to(states.device)
    codes = torch.cat([head.greedy(head.project(piece)).codes for piece in states.split(BATCH)])
    return (codes.cpu().numpy() != clean).any(axis=1)
