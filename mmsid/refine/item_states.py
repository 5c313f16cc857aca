"""Cached SID states of all items. Behaviour is kept once per item, not per level: at 10^6 items that saves half a gigabyte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from mmsid.progress import track
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import ItemTokenizer


class ItemStates:
    """States of N items as a head reads them, (N, L, H) or with behaviour (N, L, H + M + 1); rows are put together when they are read.

    Args:
        content: (N, L, H).
        behaviour: (N, M + 1), behaviour vectors and numbers of interactions; None for a head without behaviour input.
    """

    def __init__(self, content: Tensor, behaviour: Tensor | None = None) -> None:
        self.content, self.behaviour = content, behaviour

    def __len__(self) -> int:
        return len(self.content)

    @property
    def device(self) -> torch.device:
        """Device of the states."""
        return self.content.device

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """States of some rows."""
        content = self.content[rows]
        if self.behaviour is None:
            return content
        return torch.cat([content, self.behaviour[rows][:, None].expand(-1, content.shape[1], -1)], -1)

    def split(self, size: int) -> Iterator[Tensor]:
        """States of all items in pieces of `size` rows."""
        return (self[slice(start, start + size)] for start in range(0, len(self), size))


def hidden_states(tokenizer: ItemTokenizer, inputs: Sequence[ItemInput]) -> tuple[Tensor, Tensor]:
    """SID states (B, L, ...) and EMB states (B, H) of a batch, fp32, with gradient."""
    batch = {key: value.to(tokenizer.device) for key, value in tokenizer.collate(inputs, 16).items()}
    h, e = tokenizer.hidden(batch)
    return h.float(), e.float()


@torch.no_grad()
def read_states(
    tokenizer: ItemTokenizer, inputs: Sequence[ItemInput], batch_size: int, accelerator: Accelerator
) -> tuple[ItemStates, Tensor]:
    """SID states and EMB states (N, H) of N items; each process computes its share."""
    device, width, behaviour = accelerator.device, tokenizer.content_size, tokenizer.behaviour
    order = sorted(range(len(inputs)), key=lambda row: (len(inputs[row].text), len(inputs[row].pictures)))
    starts = range(0, len(order), batch_size)[accelerator.process_index :: accelerator.num_processes]
    content = torch.zeros(len(order), tokenizer.num_levels, width, device=device)
    embedding = torch.zeros(len(order), width, device=device)
    known = None if behaviour is None else torch.zeros(len(order), behaviour.settings.dim + 1, device=device)
    for start in track(starts, what="refine: reading items", unit="batches"):
        rows = order[start : start + batch_size]
        h, e = hidden_states(tokenizer, [inputs[row] for row in rows])
        index = torch.tensor(rows, device=device)
        content[index], embedding[index] = h[..., :width], e
        if known is not None:
            known[index] = h[:, 0, width:]
    total = lambda part: None if part is None else accelerator.reduce(part, reduction="sum")  # noqa: E731
    return ItemStates(total(content), total(known)), total(embedding)
