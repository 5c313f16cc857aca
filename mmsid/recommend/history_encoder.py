"""What every recommender here that is not a language model reads a history with: a small causal transformer over items."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class HistoryEncoder(nn.Module):
    """States after each item of a history, from the items' vectors; only real positions pass through the layers.

    Histories are short and ragged: padding would triple the work.

    Args:
        width: d, of vectors and states.
        max_history: items read, the last ones.
    """

    def __init__(self, width: int, layers: int, heads: int, dropout: float, max_history: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(max_history + 1, width))
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, items: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """States (P, d) of the positions `present` (B, 1 + T), position 0 standing before the first item.

        Args:
            items: (B, T, d) vectors of the items of each history; what stands at absent positions is not read.
        """
        x = torch.cat([self.start.expand(len(items), 1, -1), items], 1) + self.positions[: present.shape[1]]
        x = self.dropout(x[present])
        for block in self.blocks:
            x = block(x, present)
        return self.norm(x)

    def last(self, items: torch.Tensor, histories: torch.Tensor) -> torch.Tensor:
        """State (B, d) after the last item of each history (int64 (B, T), -1 pads on the right; an empty one is fine)."""
        present = torch.cat([torch.ones_like(histories[:, :1], dtype=torch.bool), histories >= 0], 1)
        return self(items, present)[present.sum(1).cumsum(0) - 1]


class _Block(nn.Module):
    """Pre-norm causal attention and feed-forward."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """x (P, d) of the true positions of `present` (B, T); causal, so what pads the end is never attended to."""
        (batch, length), width = present.shape, x.shape[1]
        qkv = self.qkv(self.norm_attention(x))
        padded = qkv.new_zeros(batch, length, 3 * width)
        padded[present] = qkv
        q, k, v = padded.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        # no dropout on the attention weights: it would leave the fused kernel, which is most of the layer's time on a CPU
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.project(mixed.transpose(1, 2).reshape(batch, length, width)[present]))
        return x + self.dropout(self.feed(self.norm_feed(x)))


def pad_histories(histories: list[np.ndarray], max_history: int) -> torch.Tensor:
    """The last `max_history` rows of each history, int64 (B, T) padded with -1 on the right; T >= 1."""
    recent = [np.asarray(history[-max_history:]) for history in histories]
    padded = np.full((len(recent), max(1, max((len(history) for history in recent), default=1))), -1, dtype=np.int64)
    for row, history in enumerate(recent):
        padded[row, : len(history)] = history
    return torch.from_numpy(padded)
