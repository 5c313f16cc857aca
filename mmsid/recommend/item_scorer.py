"""Exact scores of all items by the SID transformer: its depth decoder evaluated on the whole trie.

An item's score is the log-probability of its path under the trie-masked decoder: at each node the softmax runs over the
existing children, so invalid codes get no mass and the probabilities of all distinct paths sum to one. The result
equals a beam search without pruning. Items that share a SID get bit-identical scores, which `metrics` treats as ties.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmsid.recommend.paths import PathTrie
from mmsid.recommend.sid_transformer import SidTransformer

CHUNK = 1 << 20  # floats per temporary tensor: fits a core's cache and amortises the calls


class ItemScorer:
    """Exact log-probability of every item. The weights are read once, at construction.

    The first layer of the depth decoder is a sum of a state part and a prefix part, so the prefix parts of all nodes are
    computed once. The output layer is folded into the children's embeddings, so a child costs one dot product.
    """

    @torch.no_grad()
    def __init__(self, model: SidTransformer, trie: PathTrie) -> None:
        self.model, self.trie = model, trie
        self.plans: list[list[_Chunk]] = []
        prefix = model.codes.weight.new_zeros(1, model.shape.d_model)
        for number, level in enumerate(trie.levels):
            table, output = model.level_table(number), model.level_table(number) @ model.out[number].weight
            hidden = model.from_prefix[number](prefix)
            first, code = level.constraint.first, level.constraint.code
            degree = first.diff()
            order = torch.argsort(degree, stable=True)
            order = order[degree[order] > 1]
            chunks = []
            for part in order.split(64) if len(order) else ():
                children = first[part][:, None] + torch.arange(int(degree[part].max()), device=part.device)
                real = children < first[part + 1][:, None]
                children = children.clamp_max(len(code) - 1)
                token = code[children]
                constant = (table[token] * prefix[part][:, None]).sum(-1) + model.level_bias(number)[token]
                constant = constant.masked_fill(~real, -torch.inf)
                chunks.append(_Chunk(part, children, real, token, hidden[part], output[token].transpose(1, 2).contiguous(), constant))
            self.plans.append(chunks)
            prefix = prefix[level.parent] + table[code]

    @torch.no_grad()
    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Log-probability (B, N) of each item's path from states (B, d)."""
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
    """Up to 64 nodes of similar degree and their children, at most C each; `real` is False for padding."""

    nodes: torch.Tensor  # (n,)
    children: torch.Tensor  # (n, C)
    real: torch.Tensor  # (n, C)
    token: torch.Tensor  # (n, C)
    hidden: torch.Tensor  # (n, hidden)
    output: torch.Tensor  # (n, hidden, C)
    constant: torch.Tensor  # (n, C)
