"""Limit on how far free text (title, description) may move the first code of a Semantic ID.

An advertiser can write the keywords of a competitor into a title, and no detector separates them from normal words. Pictures and
categories are harder to forge. Each item is therefore encoded with and without free text. If the first code of the full encoding is
much less likely without free text, the item gets the encoding without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmsid.tokenizer.heads import CodeHead
from mmsid.tokenizer.inputs import FieldName, ItemInput
from mmsid.tokenizer.model import Encoded, ItemTokenizer

FREE_TEXT: tuple[FieldName, ...] = ("title", "description")


def trusted_fields(use: Sequence[FieldName]) -> tuple[FieldName, ...]:
    """The fields of `use` that are not free text."""
    return tuple(name for name in use if name not in FREE_TEXT)


def disagreement(head: CodeHead, codes: Tensor, trusted: Encoded) -> Tensor:
    """Log-probability gap (N,), in nats, between the best first code and the first of `codes` (N, L), both given `trusted`.

    `trusted` is the encoding without free text. The gap is 0 if the two codes are the same.
    """
    device = next(head.parameters()).device
    prefix = torch.zeros(len(codes), 0, dtype=torch.int64, device=device)
    with torch.no_grad():
        log_prob = head.level_logits(trusted.scores.to(device), prefix).log_softmax(-1).cpu()
    return log_prob.amax(1) - log_prob.gather(1, codes[:, :1]).squeeze(1)


def limit_free_text(tokenizer: ItemTokenizer, full: Encoded, trusted_items: Sequence[ItemInput], nats: float) -> tuple[Encoded, Tensor]:
    """Replace encodings whose `disagreement` exceeds `nats` by the encodings without free text.

    Args:
        full: encodings of all items.
        trusted_items: the same items, in the same order, without free text. An item that is empty without free text is not replaced.

    Returns:
        The encodings, and (N,) bool: the replaced rows.
    """
    trusted = tokenizer.encode(trusted_items)
    nonempty = torch.tensor([bool(item.text or item.pictures) for item in trusted_items], dtype=torch.bool)
    overruled = nonempty & (disagreement(tokenizer.head, full.raw_codes, trusted) > nats)
    columns = [
        torch.where(overruled.view(-1, *[1] * (column.ndim - 1)), replacement, column)
        for column, replacement in zip(full, trusted, strict=True)
    ]
    return Encoded(*columns), overruled
