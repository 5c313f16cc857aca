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
    user, item = _distinct(seen)
    node = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
    log_prob = logits.new_zeros(len(logits), 1)
    for number, level in enumerate(trie.levels):
        rule = trie.constraint.levels[number]
        # a beam that holds nothing (-inf) stands on some real node, so its softmax is finite and its sum stays -inf
        scores = torch.log_softmax(rule.mask(logits, node), -1).add_(log_prob[..., None])
        for_user, child = _used_up(trie, number, user, item)
        which, place = (node[for_user] == level.parent[child][:, None]).nonzero(as_tuple=True)
        scores[for_user[which], place, rule.candidate(level.parent[child], child)[which]] = -torch.inf
        candidates = scores.shape[-1]
        log_prob, best = scores.flatten(1).topk(min(beam, scores[0].numel()), dim=1)
        owner = best // candidates
        node = rule.follow(node.gather(1, owner), best % candidates)
        if number + 1 < len(trie.levels):
            logits = decoder.step(number + 1, owner, level.token[node])
    return Beams(node.masked_fill(torch.isneginf(log_prob), -1), log_prob)


def _distinct(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(user, item) pairs (P,) of (B, H) seen items, pads and repetitions left out."""
    ordered = seen.sort(1).values
    fresh = ordered >= 0
    fresh[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return fresh.nonzero(as_tuple=True)[0], ordered[fresh]


def _used_up(trie: PathTrie, number: int, user: torch.Tensor, item: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(user, node) pairs of one level whose every item is among the user's seen ones."""
    width = len(trie.levels[number].token)
    keys, counts = torch.unique(user * width + trie.node_of[number][item], return_counts=True)
    keys = keys[counts >= trie.levels[number].items[keys % width]]
    return keys // width, keys % width


def beam_item_scores(beams: Beams, trie: PathTrie) -> torch.Tensor:
    """Scores (B, N) of a search's items, -inf for the items that it did not reach (mask the seen ones afterwards)."""
    leaves = beams.log_prob.new_full((len(beams.leaf), len(trie.levels[-1].token) + 1), -torch.inf)
    leaves.scatter_(1, beams.leaf.clamp_min(-1) % leaves.shape[1], beams.log_prob)  # -1 lands in the spare last column
    return leaves[:, trie.node_of[-1]]
