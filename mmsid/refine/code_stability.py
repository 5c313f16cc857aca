"""How easily raw codes flip: items read once more with a tenth of their words missing, as a caption written anew may leave them out.

Only texts are made noisy; items without one are left out. DRQ (2606.01844) calls the probability that noise flips a code the expected
overlap rate; the noise here is of the input and not of the embedding, because that is what changes between two runs of a captioner.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmsid.refine.evidence import Codes
from mmsid.refine.policy import BATCH
from mmsid.tokenizer.heads import CodeHead
from mmsid.tokenizer.inputs import ItemInput

SAMPLE = 256
MISSING = 0.1


def noisy_sample(inputs: Sequence[ItemInput], hashes: Sequence[str]) -> tuple[list[int], list[ItemInput]]:
    """Rows of at most `SAMPLE` items, the first by content hash, and how they are read with noise."""
    order = sorted((row for row in range(len(inputs)) if inputs[row].text), key=lambda row: hashes[row])
    rows = order[:SAMPLE]
    return rows, [ItemInput(drop_words(inputs[row].text, MISSING), inputs[row].pictures) for row in rows]


def noisy_inputs(inputs: Sequence[ItemInput], turn: int) -> list[ItemInput]:
    """All items as the policy may be trained on them, other words missing every turn, and others than in `noisy_sample`, which judges."""
    return [ItemInput(drop_words(item.text, MISSING, f"train {turn} "), item.pictures) for item in inputs]


def drop_words(text: str, share: float, lottery_name: str = "") -> str:
    """`text` without about `share` of its words, the same ones every time under the same name."""
    kept = []
    for place, word in enumerate(text.split()):
        lottery = int.from_bytes(hashlib.sha256(f"{lottery_name}{place} {text}".encode()).digest()[:8])
        if lottery >= share * 2**64:
            kept.append(word)
    return " ".join(kept)


@torch.no_grad()
def flipped(head: CodeHead, states: Tensor, clean: Codes) -> NDArray[np.bool_]:
    """Noisy states (n, L, H), raw codes (n, L) of the clean reading -> (n,): whether any code differs."""
    head = copy.deepcopy(head).to(states.device)
    codes = torch.cat([head.greedy(head.project(piece)).codes for piece in states.split(BATCH)])
    return (codes.cpu().numpy() != clean).any(axis=1)
