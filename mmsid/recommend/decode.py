"""From the state of a history to a score for every item: exact scoring, and a trie beam search for large catalogues.

Both score an item by the log-probability of its path under the *trie-masked* decoder: at each node the softmax runs
over the children that exist, so illegal codes take no mass, a node with one child costs nothing, and the probabilities
of all items' paths sum to one. `ItemScorer` computes every path (no search error); `beam_search` keeps the best `beam`
nodes per level and is equal to it when nothing is pruned. Items of one path share its log-probability exactly, which
metrics.py reads as a bucket of tied ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from mmsid.recommend.instrument import Instrument
from mmsid.sids.trie import Trie

CHUNK = 1 << 20  # floats per temporary: small enough to stay in a core's cache, large enough to amortise the calls


class ItemPaths(NamedTuple):
    """What a recommender reads of a SID table: tokens (N, D) int64, codes per level, decided (N, D) bool."""

    tokens: np.ndarray
    sizes: tuple[int, ...]
    decided: np.ndarray


def item_paths(codes: np.ndarray, suffix: np.ndarray | None, codebook_sizes: tuple[int, ...]) -> ItemPaths:
    """Paths of all items: codes (N, L), and one more level for a ragged suffix (N,), -1 = none, token 0 there.

    The suffix is no decision where an item has its raw code to itself.
    """
    codes = np.asarray(codes, dtype=np.int64)
    decided = np.ones_like(codes, dtype=bool)
    if suffix is None or (suffix < 0).all():
        return ItemPaths(codes, tuple(codebook_sizes), decided)
    _, group, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    last = np.maximum(np.asarray(suffix, dtype=np.int64), -1) + 1
    shared = counts[group.reshape(-1)] > 1
    return ItemPaths(np.column_stack([codes, last]), (*codebook_sizes, int(last.max()) + 1), np.column_stack([decided, shared]))


@dataclass(frozen=True)
class TrieLevel:
    """One level as the search reads it: children of node p are first[p] .. first[p + 1] - 1, sorted by token."""

    first: torch.Tensor  # (parents + 1,)
    token: torch.Tensor  # (nodes,)
    parent: torch.Tensor  # (nodes,)
    items: torch.Tensor  # (nodes,) items below each node


@dataclass(frozen=True)
class PathTrie:
    """The trie of all paths, level by level; `node_of` (D, N) is the node of each item per level (last row: its leaf)."""

    levels: tuple[TrieLevel, ...]
    node_of: torch.Tensor

    @classmethod
    def build(cls, paths: ItemPaths, device: torch.device | str = "cpu") -> PathTrie:
        """From the paths of all items; nodes are numbered in the lexicographic order of their prefixes."""
        trie = Trie.from_codes(paths.tokens, paths.sizes).to(device)
        levels, places = [], []
        for depth in range(trie.depth):
            first, token = trie.child_offsets[depth], trie.child_codes[depth]
            parent = torch.repeat_interleave(torch.arange(len(first) - 1, device=device), first.diff())
            items = trie.item_end[depth + 1] - trie.item_start[depth + 1]
            levels.append(TrieLevel(first, token, parent, items))
            place = torch.empty_like(trie.items)
            place[trie.items] = torch.repeat_interleave(torch.arange(len(token), device=device), items)
            places.append(place)
        return cls(tuple(levels), torch.stack(places))


class ItemScorer:
    """Exact log-probability of every item, the weights frozen at construction.

    The decoder's first layer is a sum of a state part and a prefix part, so the prefix parts of all nodes are computed
    once; its output layer is folded into the children's embeddings, so a child costs one dot product.
    """

    @torch.no_grad()
    def __init__(self, model: Instrument, trie: PathTrie) -> None:
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


class Beams(NamedTuple):
    """Leaves found, best first: leaf (B, W) int64 with -1 where there were fewer, log_prob (B, W) with -inf there."""

    leaf: torch.Tensor
    log_prob: torch.Tensor


@torch.no_grad()
def beam_search(model: Instrument, trie: PathTrie, states: torch.Tensor, seen: torch.Tensor, beam: int) -> Beams:
    """Trie-constrained beam search, batched over users and beams, seen items masked inside the search.

    Args:
        states: (B, d).
        seen: int64 (B, H) item rows that may not be returned, -1 pads. A node whose items were all seen leaves the
            search at once, so it takes no beam from others.
        beam: beams kept per user and level.
    """
    batch, users = len(states), torch.arange(len(states), device=states.device)[:, None]
    node = torch.zeros(batch, 1, dtype=torch.long, device=states.device)
    log_prob = states.new_zeros(batch, 1)
    prefix = states.new_zeros(batch, 1, model.shape.d_model)
    for number, level in enumerate(trie.levels):
        first = level.first[node]
        degree = level.first[node + 1] - first
        children = first[..., None] + torch.arange(int(degree.max()), device=states.device)
        real = (torch.arange(children.shape[-1], device=states.device) < degree[..., None]) & ~torch.isneginf(log_prob)[..., None]
        children = children.clamp_max(len(level.token) - 1)
        logits = model.level_logits(number, states[:, None], prefix).gather(2, level.token[children])
        # nodes of beams that hold nothing keep finite numbers (log_softmax over -inf only would be NaN) and are dropped below
        scores = log_prob[..., None] + torch.log_softmax(logits.masked_fill(~real, torch.finfo(logits.dtype).min), -1)
        allowed = real & ~_used_up(trie, number, seen, children)
        scores, children = scores.masked_fill(~allowed, -torch.inf).flatten(1), children.flatten(1)
        log_prob, best = scores.topk(min(beam, scores.shape[1]), dim=1)
        owner = best // real.shape[-1]
        node = children.gather(1, best)
        prefix = prefix[users, owner] + model.level_table(number)[level.token[node]]
    return Beams(node.masked_fill(torch.isneginf(log_prob), -1), log_prob)


def _used_up(trie: PathTrie, number: int, seen: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """True where every item below a node (B, ...) is among the user's distinct seen items (B, H)."""
    level, width = trie.levels[number], len(trie.levels[number].token)
    users = torch.arange(len(seen), device=seen.device)
    ordered = seen.sort(1).values
    fresh = (ordered >= 0) & torch.cat([torch.ones_like(ordered[:, :1], dtype=torch.bool), ordered[:, 1:] != ordered[:, :-1]], 1)
    keys, counts = torch.unique((users[:, None] * width + trie.node_of[number][ordered.clamp_min(0)])[fresh], return_counts=True)
    keys = keys[counts >= level.items[keys % width]]
    if not len(keys):
        return torch.zeros_like(nodes, dtype=torch.bool)
    wanted = users.view(-1, *[1] * (nodes.ndim - 1)) * width + nodes
    return keys[torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)] == wanted


def beam_item_scores(beams: Beams, trie: PathTrie) -> torch.Tensor:
    """Scores (B, N) of a search's items, -inf for the items that it did not reach (mask the seen ones afterwards)."""
    leaves = beams.log_prob.new_full((len(beams.leaf), len(trie.levels[-1].token) + 1), -torch.inf)
    leaves.scatter_(1, beams.leaf.clamp_min(-1) % leaves.shape[1], beams.log_prob)  # -1 lands in the spare last column
    return leaves[:, trie.node_of[-1]]
