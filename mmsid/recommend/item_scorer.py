"""Exact scores of every item from the state of a history: the instrument's decoder run over the whole trie.

An item's score is the log-probability of its path under the *trie-masked* decoder: at each node the softmax runs over
the children that exist, so illegal codes take no mass, a node with one child costs nothing, and the probabilities of
all items' paths sum to one. `ItemScorer` computes every path (no search error); search.py keeps the best nodes per
level and is equal to it when nothing is pruned. Items of one path share its log-probability exactly, which metrics.py
reads as a bucket of tied ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmsid.recommend.paths import PathTrie
from mmsid.recommend.sid_transformer import SidTransformer

CHUNK = 1 << 20  # floats per temporary: small enough to stay in a core's cache, large enough to amortise the calls


class ItemScorer:
    """Exact log-probability of every item, the weights frozen at construction.

    The decoder's first layer is a sum of a state part and a prefix part, so the prefix parts of all nodes are computed
    once; its output layer is folded into the children's embeddings, so a child costs one dot product.
    """

    @torch.no_grad()
    def __init__(self, model: SidTransformer, trie: PathTrie) -> None:
        self.model, self.trie = model, trie
        self.plans: list[list[_Chunk]] = []
        prefix = model.codes.weight.new_zeros(1, model.shape.d_model)
        for number, level in enumerate(trie.levels):
            table, output = model.level_table(number), model.level_table(number) @ model.out[number].weight
            hidden = model.from_prefix[number](prefix)
            degree = level.first[1:] - level.first[:-1]
            order = torch.argsort(degree, stable=True)
            order = order[degree[order] > 1]
            chunks = []
            for part in order.split(64) if len(order) else ():
                children = level.first[part][:, None] + torch.arange(int(degree[part].max()), device=part.device)
                real = children < level.first[part + 1][:, None]
                children = children.clamp_max(len(level.token) - 1)
                token = level.token[children]
                constant = (table[token] * prefix[part][:, None]).sum(-1) + model.level_bias(number)[token]
                constant = constant.masked_fill(~real, -torch.inf)
                chunks.append(_Chunk(part, children, real, token, hidden[part], output[token].transpose(1, 2).contiguous(), constant))
            self.plans.append(chunks)
            prefix = prefix[level.parent] + table[level.token]

    @torch.no_grad()
    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Scores (B, N) for states (B, d): log p of each item's path, items of one path equal to the bit."""
        model = self.model
        log_prob = states.new_zeros(1, len(states))
        for number, (level, chunks) in enumerate(zip(self.trie.levels, self.plans, strict=True)):
            below = log_prob[level.parent]
            own = model.from_state[number](states)
            direct = model.level_table(number) @ states.T  # (K, B)
            for chunk in chunks:
                step = max(1, CHUNK // (len(states) * model.shape.hidden))
                for start in range(0, len(chunk.nodes), step):
                    piece = slice(start, start + step)
                    active = torch.relu(own + chunk.hidden[piece][:, None])  # (n, B, hidden)
                    logits = torch.bmm(active, chunk.output[piece]).transpose(1, 2) + direct[chunk.token[piece]]
                    chosen = torch.log_softmax(logits + chunk.constant[piece][..., None], 1)  # (n, C, B)
                    real = chunk.real[piece]
                    below[chunk.children[piece][real]] += chosen[real]
            log_prob = below
        return log_prob[self.trie.node_of[-1]].T


class _Chunk(NamedTuple):
    nodes: torch.Tensor  # (n,)
    children: torch.Tensor  # (n, C)
    real: torch.Tensor  # (n, C)
    token: torch.Tensor  # (n, C)
    hidden: torch.Tensor  # (n, hidden)
    output: torch.Tensor  # (n, hidden, C)
    constant: torch.Tensor  # (n, C)
