"""Cached SID states of all items. Behaviour is kept once per item, not per level: at 10^6 items that saves half a gigabyte."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


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
