"""What recommenders over SID tokens share: one vocabulary for all levels, histories as token sequences, the loss per level.

Tokens of the levels have ranges of their own: code c of level l is token `offsets[l] + c`; the one other token, `begin`,
is last. A history of T items of D tokens is `begin i1_1 .. i1_D i2_1 .. iT_D`: no separators, the position says the
level. So the softmax of a level runs over that level's range only, in training as in decoding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmsid.recommend.paths import ItemPaths


class TokenRecommender(nn.Module, ABC):
    """Base of the flat decoder and of the encoder-decoder.

    Attributes:
        window: items of a train history that are read at once: `max_history` and the target after them, so that the
            longest history that is ever decoded was also trained on.

    Args:
        paths: of all items; a ragged suffix is a level of its own (paths.item_paths).
    """

    def __init__(self, paths: ItemPaths, max_history: int) -> None:
        super().__init__()
        self.window = max_history + 1
        self.sizes = tuple(int(size) for size in paths.sizes)
        self.offsets = [0, *np.cumsum(self.sizes)[:-1].tolist()]
        self.begin = sum(self.sizes)
        codes = torch.from_numpy(paths.tokens)
        self.register_buffer("paths", codes, persistent=False)
        self.register_buffer("tokens", codes + torch.tensor(self.offsets), persistent=False)
        self.register_buffer("decided", torch.from_numpy(paths.decided), persistent=False)

    @abstractmethod
    def level_table(self, level: int) -> torch.Tensor:
        """Output vectors (K_l, d) of one level's tokens."""

    def sequences(self, histories: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Histories (B, T) of item rows, -1 pads on the right -> ids (B, 1 + T D), `begin` where padded; and which are real."""
        real = histories >= 0
        ids = torch.where(real[..., None], self.tokens[histories.clamp_min(0)], self.begin).flatten(1)
        real = real[..., None].expand(*real.shape, len(self.sizes)).flatten(1)
        return F.pad(ids, (1, 0), value=self.begin), F.pad(real, (1, 0), value=True)

    def loss(self, hidden: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Sum of -log p of the paths of items (P,), from the states (P, D, d) that predict their levels; 0 where not decided."""
        total = hidden.new_zeros(())
        for level in range(len(self.sizes)):
            logits = hidden[:, level] @ self.level_table(level).T
            total = total + (F.cross_entropy(logits, self.paths[items, level], reduction="none") * self.decided[items, level]).sum()
        return total
