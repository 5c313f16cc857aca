"""The instrument: a small generative recommender that measures Semantic IDs, all arms under one budget.

An item-level causal transformer reads a history (one position per item: the sum of its level-specific SID-token
embeddings); from the state h of a position a depth decoder spells the next item's codes, level by level:

    u_l = h + s_l + W2_l relu(W1_l h + V1_l s_l + b),   s_l = sum of the embeddings of the codes chosen before level l
    p(c_l | history, c_<l) = softmax(E_l u_l + bias_l)

with E_l the same table that embeds the codes at the input (tied). Nothing of an item is read but its path. The
first-layer split and the skip are what lets decode.py score whole levels of the trie cheaply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmsid.recommend.history_encoder import HistoryEncoder


@dataclass(frozen=True)
class SidTransformerShape:
    """Sizes of the instrument; the defaults are those that every published figure of the bench uses."""

    lr: ClassVar[float] = 4e-3

    d_model: int = 128
    layers: int = 2
    heads: int = 4
    hidden: int = 256
    dropout: float = 0.15
    max_history: int = 20


class SidTransformer(nn.Module):
    """Transformer over items and depth decoder over the levels of their paths.

    Args:
        paths: int64 (N, D), the token of every item at every level (a ragged suffix is a level of its own, decode.item_paths).
        sizes: codes per level, length D.
        decided: bool (N, D), False where the level is no choice for the item (an absent suffix): not trained there.
    """

    def __init__(self, paths: torch.Tensor, sizes: tuple[int, ...], decided: torch.Tensor, shape: SidTransformerShape) -> None:
        super().__init__()
        self.sizes, self.shape = tuple(int(size) for size in sizes), shape
        self.window = shape.max_history + 1  # of a train history: the last one is only a target, so that every position is trained
        offsets = torch.tensor(np.concatenate([[0], np.cumsum(self.sizes)[:-1]]), dtype=torch.long)
        self.register_buffer("paths", paths.long(), persistent=False)
        self.register_buffer("tokens", paths.long() + offsets, persistent=False)
        self.register_buffer("decided", decided, persistent=False)
        width = shape.d_model
        self.codes = nn.Embedding(sum(self.sizes), width)
        self.read = HistoryEncoder(width, shape.layers, shape.heads, shape.dropout, shape.max_history)
        self.dropout = nn.Dropout(shape.dropout)
        self.from_state = nn.ModuleList(nn.Linear(width, shape.hidden) for _ in self.sizes)
        self.from_prefix = nn.ModuleList(nn.Linear(width, shape.hidden, bias=False) for _ in self.sizes)
        self.out = nn.ModuleList(nn.Linear(shape.hidden, width, bias=False) for _ in self.sizes)
        self.bias = nn.Parameter(torch.zeros(sum(self.sizes)))
        nn.init.normal_(self.codes.weight, std=0.05)
        for layer in self.out:
            nn.init.normal_(layer.weight, std=0.02)

    def last_states(self, histories: torch.Tensor) -> torch.Tensor:
        """State (B, d) after the last item of each history (int64 (B, T), -1 pads on the right; an empty one is fine)."""
        return self.read.last(self.item_vectors(histories.clamp_min(0)), histories)

    def steps(self, histories: torch.Tensor) -> SidTransformerSteps:
        """The decoder of search.py after histories (B, T)."""
        return SidTransformerSteps(self, self.last_states(histories))

    def item_vectors(self, rows: torch.Tensor) -> torch.Tensor:
        """What the transformer reads of items (any shape of rows) -> (..., d): the sum of the embeddings of their codes."""
        return self.codes(self.tokens[rows]).sum(-2)

    def level_table(self, level: int) -> torch.Tensor:
        """Embeddings (K_l, d) of one level's codes, a view of the tied table."""
        start = sum(self.sizes[:level])
        return self.codes.weight[start : start + self.sizes[level]]

    def level_bias(self, level: int) -> torch.Tensor:
        """Output bias (K_l,) of one level's codes."""
        start = sum(self.sizes[:level])
        return self.bias[start : start + self.sizes[level]]

    def level_logits(self, level: int, state: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """Logits (..., K_l) from the state (..., d) and the sum of the chosen codes' embeddings (..., d)."""
        hidden = torch.relu(self.from_state[level](state) + self.from_prefix[level](prefix))
        mixed = state + prefix + self.out[level](self.dropout(hidden))
        return mixed @ self.level_table(level).T + self.level_bias(level)

    def path_log_prob(self, state: torch.Tensor, paths: torch.Tensor, decided: torch.Tensor) -> torch.Tensor:
        """log p (P, D) of each code of `paths` (P, D) given states (P, d); softmax over all K_l codes, 0 where not decided."""
        prefix, columns = torch.zeros_like(state), []
        for level in range(len(self.sizes)):
            logits = self.level_logits(level, state, prefix)
            columns.append(-F.cross_entropy(logits, paths[:, level], reduction="none") * decided[:, level])
            prefix = prefix + F.embedding(paths[:, level], self.level_table(level))  # indexing would add gradients up in any order
        return torch.stack(columns, 1)

    def forward(self, histories: torch.Tensor) -> torch.Tensor:
        """Sum of negative log-likelihoods of every item of `histories` (B, T) given the items before it."""
        real = histories >= 0
        targets = histories[real]
        states = self.dropout(self.read(self.item_vectors(histories[:, :-1].clamp_min(0)), real))
        return -self.path_log_prob(states, self.paths[targets], self.decided[targets]).sum()


class SidTransformerSteps:
    """The depth decoder of an instrument, level by level (search.LevelDecoder), from states (B, d)."""

    def __init__(self, model: SidTransformer, states: torch.Tensor) -> None:
        self.model, self.states = model, states[:, None]
        self.prefix = torch.zeros_like(self.states)  # sum of the chosen codes' embeddings (B, W, d)

    def start(self) -> torch.Tensor:
        """Logits (B, 1, K_0)."""
        return self.model.level_logits(0, self.states, self.prefix)

    def step(self, level: int, owner: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """Logits (B, W, K_level) after codes (B, W) were appended to the beams `owner`."""
        chosen = self.model.level_table(level - 1)[code]
        self.prefix = self.prefix.gather(1, owner[..., None].expand_as(chosen)) + chosen
        return self.model.level_logits(level, self.states, self.prefix)
