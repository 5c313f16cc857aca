"""Causal transformer over the items of a history, shared by `SidTransformer` and `Sasrec`."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class HistoryEncoder(nn.Module):
    """Pre-norm causal transformer: item vectors of a history -> hidden state after each item.

    Histories are short and of unequal length. Padding would triple the work, so only present positions pass through the layers.

    Args:
        width: d, of item vectors and states.
        max_history: number of items that are read.
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
        """States (P, d) of the P positions where `present` is True.

        Args:
            items: (B, T, d), item vectors of each history. Values at absent positions are ignored.
            present: bool (B, 1 + T). Position 0 is the start state before the first item.
        """
        x = torch.cat([self.start.expand(len(items), 1, -1), items], 1) + self.positions[: present.shape[1]]
        x = self.dropout(x[present])
        for block in self.blocks:
            x = block(x, present)
        return self.norm(x)

    def last(self, items: torch.Tensor, histories: torch.Tensor) -> torch.Tensor:
        """State (B, d) after the last item of each history.

        Args:
            items: (B, T, d).
            histories: int64 (B, T), padded with -1 on the right. Empty histories are allowed.
        """
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
        """x (P, d) of the present positions (B, T). Padding is on the right, so causal attention never attends to it."""
        (batch, length), width = present.shape, x.shape[1]
        qkv = self.qkv(self.norm_attention(x))
        padded = qkv.new_zeros(batch, length, 3 * width)
        padded[present] = qkv
        q, k, v = padded.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        # no dropout on the attention weights: it would disable the fused kernel, which takes most of the layer's time on a CPU
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.project(mixed.transpose(1, 2).reshape(batch, length, width)[present]))
        return x + self.dropout(self.feed(self.norm_feed(x)))


def pad_histories(histories: list[np.ndarray], max_history: int) -> torch.Tensor:
    """The last `max_history` items of each history as int64 (B, T), padded with -1 on the right; T >= 1."""
    return _padded(histories, max_history, -1, np.int64)


def pad_weights(weights: list[np.ndarray], max_history: int) -> torch.Tensor:
    """Event weights of `pad_histories`, float32 (B, T), padded with 0."""
    return _padded(weights, max_history, 0, np.float32)


def _padded(rows: list[np.ndarray], max_history: int, fill: int, kind: type) -> torch.Tensor:
    recent = [np.asarray(row[-max_history:]) for row in rows]
    padded = np.full((len(recent), max(1, max((len(row) for row in recent), default=1))), fill, dtype=kind)
    for index, row in enumerate(recent):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)
