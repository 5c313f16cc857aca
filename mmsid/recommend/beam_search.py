"""Trie-constrained beam search over any recommender that predicts items level by level.

The search keeps the `beam` most probable nodes per level under the trie-masked decoder. It equals exact scoring of all
items when nothing is pruned. Every beam is a node of the trie, so each result is an existing SID. A user with fewer
unseen SIDs than beams gets fewer results.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from mmsid.recommend.paths import PathTrie


class LevelDecoder(Protocol):
    """Interface of a recommender that decodes a batch of B histories, one level at a time."""

    def start(self) -> torch.Tensor:
        """Logits (B, 1, K_0) of the first level's codes."""

    def step(self, level: int, owner: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """Append codes (B, W) of level `level` - 1 to the beams `owner` (B, W) of the last call. -> logits (B, W, K_level)."""


class Beams(NamedTuple):
    """Leaves found, best first: leaf (B, W) int64, -1 where fewer were found; log_prob (B, W), -inf there."""

    leaf: torch.Tensor
    log_prob: torch.Tensor


@torch.no_grad()
def beam_search(decoder: LevelDecoder, trie: PathTrie, seen: torch.Tensor, beam: int) -> Beams:
    """Beam search over users and beams in one batch, with seen items masked inside the search.

    Args:
        seen: int64 (B, H), item rows that must not be returned, padded with -1. A node whose items were all seen is
            dropped at once, so it takes no beam from other nodes.
        beam: beams kept per user and level.
    """
    logits = decoder.start()
    items = _distinct(seen)
    node = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
    log_prob = logits.new_zeros(len(logits), 1)
    for number, level in enumerate(trie.levels):
        # an empty beam (-inf) points at some existing node, so its softmax is finite and its sum stays -inf
        scores = torch.log_softmax(level.constraint.mask(logits, node), -1).add_(log_prob[..., None])
        parent, candidate, exhausted = _exhausted(trie, number, items)
        cap = torch.where(exhausted[:, None] & (node[..., None] == parent[:, None]), -torch.inf, torch.inf).to(scores)
        scores.scatter_reduce_(2, candidate[:, None].expand_as(cap), cap, "amin")
        candidates = scores.shape[-1]
        log_prob, best = scores.flatten(1).topk(min(beam, scores[0].numel()), dim=1)
        owner = best // candidates
        node = level.constraint.follow(node.gather(1, owner), best % candidates)
        if number + 1 < len(trie.levels):
            logits = decoder.step(number + 1, owner, level.constraint.code[node])
    return Beams(node.masked_fill(torch.isneginf(log_prob), -1), log_prob)


def _distinct(seen: torch.Tensor) -> torch.Tensor:
    """Sort the seen items (B, H) of each user and replace repetitions by -1."""
    items = seen.sort(1).values
    items[:, 1:] = items[:, 1:].masked_fill(items[:, 1:] == items[:, :-1], -1)
    return items


def _exhausted(trie: PathTrie, number: int, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the nodes of one level whose items were all seen.

    No shape depends on the data, so the call does not synchronise with a GPU.

    Args:
        items: int64 (B, H), distinct seen items per user, -1 for none.

    Returns:
        parent, candidate and exhausted (B, H) of the node above each seen item. `exhausted` is bool.
    """
    level = trie.levels[number]
    node = trie.node_of[number][items.clamp_min(0)].masked_fill_(items < 0, -1).sort(1).values
    count = torch.searchsorted(node, node, right=True) - torch.searchsorted(node, node)
    real = node.clamp_min(0)
    parent = level.parent[real]
    return parent, level.constraint.candidate(parent, real), (node >= 0) & (count >= level.items[real])


def beam_item_scores(beams: Beams, trie: PathTrie) -> torch.Tensor:
    """Scores (B, N) of all items, -inf for items that the search did not reach. Mask the seen items afterwards."""
    leaves = beams.log_prob.new_full((len(beams.leaf), trie.num_leaves + 1), -torch.inf)
    leaves.scatter_(1, beams.leaf.clamp_min(-1) % leaves.shape[1], beams.log_prob)  # -1 goes to the spare last column
    return leaves[:, trie.node_of[-1]]
