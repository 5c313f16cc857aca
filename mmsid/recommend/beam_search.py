"""Trie-constrained beam search over any recommender that spells items level by level, and from beams to item scores.

An item is scored by the log-probability of its path under the *trie-masked* decoder (decode.py). The search keeps the
best `beam` nodes per level; it equals the exact scores of all items when nothing is pruned. Every beam is a node of the
trie, so an invalid SID cannot come out, and a user with fewer unseen SIDs than beams gets fewer.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from mmsid.recommend.paths import PathTrie


class LevelDecoder(Protocol):
    """A recommender in the middle of decoding B histories: what the search asks of it."""

    def start(self) -> torch.Tensor:
        """Logits (B, 1, K_0) of the first level's codes."""

    def step(self, level: int, owner: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """Append codes (B, W) of `level` - 1 to the beams `owner` (B, W) of the last call; logits (B, W, K_level) of what follows."""


class Beams(NamedTuple):
    """Leaves found, best first: leaf (B, W) int64 with -1 where there were fewer, log_prob (B, W) with -inf there."""

    leaf: torch.Tensor
    log_prob: torch.Tensor


@torch.no_grad()
def beam_search(decoder: LevelDecoder, trie: PathTrie, seen: torch.Tensor, beam: int) -> Beams:
    """Batched over users and beams, seen items masked inside the search.

    Args:
        seen: int64 (B, H) item rows that may not be returned, -1 pads. A node whose items were all seen leaves the
            search at once, so it takes no beam from others.
        beam: beams kept per user and level.
    """
    logits = decoder.start()
    items = _distinct(seen)
    node = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
    log_prob = logits.new_zeros(len(logits), 1)
    for number, level in enumerate(trie.levels):
        rule = trie.constraint.levels[number]
        # a beam that holds nothing (-inf) stands on some real node, so its softmax is finite and its sum stays -inf
        scores = torch.log_softmax(rule.mask(logits, node), -1).add_(log_prob[..., None])
        parent, candidate, used_up = _used_up(trie, number, items)
        taken = torch.where(used_up[:, None] & (node[..., None] == parent[:, None]), -torch.inf, torch.inf).to(scores)
        scores.scatter_reduce_(2, candidate[:, None].expand_as(taken), taken, "amin")
        candidates = scores.shape[-1]
        log_prob, best = scores.flatten(1).topk(min(beam, scores[0].numel()), dim=1)
        owner = best // candidates
        node = rule.follow(node.gather(1, owner), best % candidates)
        if number + 1 < len(trie.levels):
            logits = decoder.step(number + 1, owner, level.token[node])
    return Beams(node.masked_fill(torch.isneginf(log_prob), -1), log_prob)


def _distinct(seen: torch.Tensor) -> torch.Tensor:
    """(B, H) seen items, in order; -1 in the place of pads and repetitions."""
    items = seen.sort(1).values
    items[:, 1:] = items[:, 1:].masked_fill(items[:, 1:] == items[:, :-1], -1)
    return items


def _used_up(trie: PathTrie, number: int, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the nodes above each user's distinct seen items (B, H, -1 for none) on one level: parent and candidate, and whether every item
    below the node was seen. No shape depends on the data, so that a GPU is never waited for."""
    level, rule = trie.levels[number], trie.constraint.levels[number]
    node = trie.node_of[number][items.clamp_min(0)].masked_fill_(items < 0, -1).sort(1).values
    count = torch.searchsorted(node, node, right=True) - torch.searchsorted(node, node)
    real = node.clamp_min(0)
    parent = level.parent[real]
    return parent, rule.candidate(parent, real), (node >= 0) & (count >= level.items[real])


def beam_item_scores(beams: Beams, trie: PathTrie) -> torch.Tensor:
    """Scores (B, N) of a search's items, -inf for the items that it did not reach (mask the seen ones afterwards)."""
    leaves = beams.log_prob.new_full((len(beams.leaf), len(trie.levels[-1].token) + 1), -torch.inf)
    leaves.scatter_(1, beams.leaf.clamp_min(-1) % leaves.shape[1], beams.log_prob)  # -1 lands in the spare last column
    return leaves[:, trie.node_of[-1]]
