"""Free text may refine a Semantic ID, but it may not decide alone where the SID begins.

Whoever writes titles can write a rival's keywords into them, in words that no detector can tell from honest ones. What he cannot write
as freely is what a picture shows and which category a shop put the item into. So every item is encoded twice, with and without its
title and description. Where the first code with them is much less likely without them, the item is assigned without them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmsid.tokenizer.heads import CodeHead
from mmsid.tokenizer.inputs import FieldName, ItemInput
from mmsid.tokenizer.model import Encoded, ItemTokenizer

FREE_TEXT: tuple[FieldName, ...] = ("title", "description")


def evidence_fields(use: Sequence[FieldName]) -> tuple[FieldName, ...]:
    """The fields of `use` that are no free text."""
    return tuple(name for name in use if name not in FREE_TEXT)


def disagreement(head: CodeHead, codes: Tensor, evidence: Encoded) -> Tensor:
    """(N,) nats by which the first code of `codes` (N, L) falls behind the best one when only `evidence` is read; 0 when it is the best."""
    device = next(head.parameters()).device
    prefix = torch.zeros(len(codes), 0, dtype=torch.int64, device=device)
    with torch.no_grad():
        log_prob = head.level_logits(evidence.scores.to(device), prefix).log_softmax(-1).cpu()
    return log_prob.amax(1) - log_prob.gather(1, codes[:, :1]).squeeze(1)


def held_to_evidence(
    tokenizer: ItemTokenizer, full: Encoded, evidence_items: Sequence[ItemInput], nats: float, batch_size: int = 32
) -> tuple[Encoded, Tensor]:
    """`full`, with the rows of items whose free text disagrees by more than `nats` replaced by what the evidence alone gives.

    Args:
        full: of all items, in the order of `evidence_items`, which are the same items without free text. An item that has nothing
            but free text stays as it is.

    Returns:
        the encoding, and (N,) bool: which rows were replaced.
    """
    evidence = tokenizer.encode(evidence_items, batch_size)
    has_evidence = torch.tensor([bool(item.text or item.pictures) for item in evidence_items], dtype=torch.bool)
    overruled = has_evidence & (disagreement(tokenizer.head, full.raw_codes, evidence) > nats)
    columns = []
    for ours, theirs in zip(full, evidence, strict=True):
        columns.append(torch.where(overruled.view(-1, *[1] * (ours.ndim - 1)), theirs, ours))
    return Encoded(*columns), overruled
