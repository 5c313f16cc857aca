"""SID transformer: the RQ-Transformer (Lee et al. 2022) for recommendation. It compares tokenizers under one budget.

An item-level causal transformer reads a history, one position per item: the sum of the embeddings of the item's codes.
A depth decoder predicts the next item's codes level by level from the state h of a position:
u_l = h + s_l + W2_l relu(W1_l h + V1_l s_l + b), s_l = sum of the embeddings of the codes before level l,
p(c_l | history, c_<l) = softmax(E_l u_l + bias_l) over the codes that continue c_<l in a trie; E_l is the input embedding.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmsid.recommend.history_encoder import HistoryEncoder
from mmsid.recommend.paths import ItemPaths, PathTrie
from mmsid.recommend.shape import RecommenderShape


class SidTransformerShape(RecommenderShape):
    """Sizes of the SID transformer. All published comparisons use the defaults."""

    lr: ClassVar[float] = 4e-3


class SidTransformer(nn.Module):
    """Causal transformer over items with a depth decoder over the levels of their paths.

    The first layer of the depth decoder is a sum of a state part and a prefix part, and it has a skip connection. Both
    let `ItemScorer` score whole levels of the trie at low cost.

    Args:
        paths: of all N items.
        trie: trie that training normalises over, on the device of the model. `fit` gives that of the warm items, so that no code is
            ever trained to be unlikely because only new items have it. None: the trie of all items.

    Attributes:
        window: items of a train history that are read at once. The last one is only a target, so that every position is trained.
    """

    def __init__(self, paths: ItemPaths, shape: SidTransformerShape, trie: PathTrie | None = None) -> None:
        super().__init__()
        self.trie = PathTrie.build(paths) if trie is None else trie
        self.sizes, self.shape = tuple(int(size) for size in paths.sizes), shape
        self.window = shape.max_history + 1
        self.offsets = [0, *np.cumsum(self.sizes)[:-1].tolist()]
        codes = torch.from_numpy(paths.tokens).long()
        self.register_buffer("tokens", codes + torch.tensor(self.offsets), persistent=False)
        width = shape.d_model
        self.codes = nn.Embedding(sum(self.sizes), width)
        self.encoder = HistoryEncoder(width, shape.layers, shape.heads, shape.dropout, shape.max_history)
        self.dropout = nn.Dropout(shape.dropout)
        self.from_state = nn.ModuleList(nn.Linear(width, shape.hidden) for _ in self.sizes)
        self.from_prefix = nn.ModuleList(nn.Linear(width, shape.hidden, bias=False) for _ in self.sizes)
        self.out = nn.ModuleList(nn.Linear(shape.hidden, width, bias=False) for _ in self.sizes)
        self.bias = nn.Parameter(torch.zeros(sum(self.sizes)))
        nn.init.normal_(self.codes.weight, std=0.05)
        for layer in self.out:
            nn.init.normal_(layer.weight, std=0.02)

    def last_states(self, histories: torch.Tensor) -> torch.Tensor:
        """State (B, d) after the last item of each history (int64 (B, T), padded with -1 on the right; empty ones are allowed)."""
        return self.encoder.last(self.item_vectors(histories.clamp_min(0)), histories)

    def steps(self, histories: torch.Tensor) -> SidTransformerSteps:
        """Decoder for `beam_search` after histories (B, T)."""
        return SidTransformerSteps(self, self.last_states(histories))

    def item_vectors(self, rows: torch.Tensor) -> torch.Tensor:
        """Input vectors (..., d) of items (...): the sum of the embeddings of their codes."""
        return self.codes(self.tokens[rows]).sum(-2)

    def level_table(self, level: int) -> torch.Tensor:
        """Embeddings (K_l, d) of one level's codes, a view of the tied table."""
        start = self.offsets[level]
        return self.codes.weight[start : start + self.sizes[level]]

    def level_bias(self, level: int) -> torch.Tensor:
        """Output bias (K_l,) of one level's codes."""
        start = self.offsets[level]
        return self.bias[start : start + self.sizes[level]]

    def level_logits(self, level: int, state: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """Logits (..., K_l) from the state (..., d) and the sum of the chosen codes' embeddings (..., d)."""
        hidden = torch.relu(self.from_state[level](state) + self.from_prefix[level](prefix))
        mixed = state + prefix + self.out[level](self.dropout(hidden))
        return mixed @ self.level_table(level).T + self.level_bias(level)

    def path_log_prob(self, state: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Log-probability (P, D) of each code of the paths of items (P,) given states (P, d).

        At each node the softmax runs over the children that exist in `trie`, as in decoding. A node with one child is no choice: its
        result is 0 without any computation. All items must be in `trie`.
        """
        prefix, columns = torch.zeros_like(state), []
        for number, level in enumerate(self.trie.levels):
            if number:  # indexing would sum gradients in a random order
                prefix = prefix + F.embedding(self.tokens[items, number - 1], self.codes.weight)
            node = self.trie.node_of[number][items]
            rows = level.has_siblings(node).nonzero()[:, 0]
            logits = self.level_logits(number, state.index_select(0, rows), prefix.index_select(0, rows))
            columns.append(state.new_zeros(len(items)).index_copy(0, rows, level.log_prob(logits, node[rows])))
        return torch.stack(columns, 1)

    def forward(self, histories: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of the negative log-likelihoods of every item of `histories` (B, T) given the items before it, times `weights` (B, T)."""
        real = histories >= 0
        targets = histories[real]
        states = self.dropout(self.encoder(self.item_vectors(histories[:, :-1].clamp_min(0)), real))
        log_prob = self.path_log_prob(states, targets)
        return -(log_prob if weights is None else log_prob * weights[real][:, None]).sum()


class SidTransformerSteps:
    """Depth decoder of a SID transformer from states (B, d), level by level (`beam_search.LevelDecoder`)."""

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
