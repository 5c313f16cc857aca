"""Full-catalogue ranking of every user of a split part, for neural and classical recommenders.

A recommender is a scoring function `Score`: histories -> (B, N). Seen items are masked, then the target is ranked. A
recommender for large catalogues scores a list of unseen candidates instead (`ScoredCandidates`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from mmsid.catalog.splits import Split
from mmsid.recommend.beam_search import beam_item_scores, beam_search
from mmsid.recommend.flat import FlatRecommender
from mmsid.recommend.history_encoder import pad_histories
from mmsid.recommend.item_scorer import ItemScorer
from mmsid.recommend.metrics import (
    COVERAGE_CUTOFF,
    SID_LEVEL_GAIN,
    Coverage,
    Ranks,
    hit_rate,
    rank_candidates,
    rank_targets,
    sid_level_hits,
    summarise,
)
from mmsid.recommend.paths import PathTrie
from mmsid.recommend.sid_transformer import SidTransformer
from mmsid.recommend.tiger import TigerRecommender

Part = Literal["valid", "test"]
PARTS: tuple[Part, ...] = ("valid", "test")
Decoding = Literal["auto", "exact", "beam"]
Score = Callable[[list[np.ndarray]], torch.Tensor]
ScoredCandidates = Callable[[list[np.ndarray]], tuple[torch.Tensor, torch.Tensor]]  # -> items, scores, both (B, C)
Recommender = SidTransformer | FlatRecommender | TigerRecommender
EXACT_UP_TO = 20_000  # items; a beam search is faster above this, and its search errors are rare
MAX_SCORES = 1 << 23  # floats of one (B, N) block
MAX_BEAMS = 1 << 14  # users x beams of one search


@dataclass(frozen=True)
class Evaluation:
    """Ranks of the targets of `users` (rows of the split), and the catalogue coverage of their recommendations.

    `sid_level_gain` is SID-level HR@10 minus item-level HR@10 (None without SIDs): what collisions would add to HR@10 if SIDs were
    counted as hits instead of items.
    """

    users: np.ndarray
    ranks: Ranks
    coverage: float
    sid_level_gain: float | None = None

    def summary(self) -> dict[str, float]:
        """All metrics by name, including coverage."""
        gain = {} if self.sid_level_gain is None else {SID_LEVEL_GAIN: self.sid_level_gain}
        return summarise(self.ranks) | {f"coverage@{COVERAGE_CUTOFF}": self.coverage} | gain


def evaluate(
    score: Score, split: Split, part: Part, num_items: int, limit: int | None = None, sids: torch.Tensor | None = None
) -> Evaluation:
    """Score all items, mask those that the user has seen, and rank the target.

    Args:
        score: histories -> (B, N), higher is better, -inf where an item is not a candidate.
        limit: evaluate only this many users, the first ones. The catalogue orders users by content hash, so the sample
            does not depend on row order or ids.
        sids: int64 (N,), number of each item's SID; the gain of SID-level over item-level hits is measured if it is given.

    Raises:
        MmsidError: a score is NaN.
    """
    sid_hits = []

    def rank(histories: list[np.ndarray], targets: torch.Tensor, coverage: Coverage) -> tuple[torch.Tensor, torch.Tensor]:
        scores = mask_seen(score(histories), histories)
        own = targets.to(scores.device)
        coverage.update(scores)
        if sids is not None:
            sid_hits.append(sid_level_hits(scores, own, sids.to(scores.device)))
        return rank_targets(scores, own)

    found = _evaluate(rank, split, part, num_items, limit, batch=max(1, min(256, MAX_SCORES // num_items)))
    if not sid_hits:
        return found
    return replace(found, sid_level_gain=float((np.concatenate(sid_hits) - hit_rate(found.ranks, 10)).mean()))


def evaluate_candidates(candidates: ScoredCandidates, split: Split, part: Part, num_items: int, limit: int | None = None) -> Evaluation:
    """`evaluate` for a recommender that scores a list of unseen candidates per user. A target that is no candidate is not found."""

    def rank(histories: list[np.ndarray], targets: torch.Tensor, coverage: Coverage) -> tuple[torch.Tensor, torch.Tensor]:
        items, scores = candidates(histories)
        ranks = rank_candidates(items, scores, targets)
        coverage.update(scores, items)
        return ranks

    return _evaluate(rank, split, part, num_items, limit, batch=64)


def _evaluate(
    rank: Callable[[list[np.ndarray], torch.Tensor, Coverage], tuple[torch.Tensor, torch.Tensor]],
    split: Split,
    part: Part,
    num_items: int,
    limit: int | None,
    batch: int,
) -> Evaluation:
    users = split.users(part)[:limit]
    targets = torch.from_numpy((split.valid if part == "valid" else split.test)[users])
    coverage, above, tied = Coverage(num_items), [], []
    for start in range(0, len(users), batch):
        histories = [split.history(int(user), part) for user in users[start : start + batch]]
        for counts, values in zip(rank(histories, targets[start : start + batch], coverage), (above, tied)):
            values.append(counts.cpu().numpy())
    empty = [np.zeros(0, dtype=np.int64)]
    weights = split.target_weights(part)
    ranks = Ranks(np.concatenate(above or empty), np.concatenate(tied or empty), None if weights is None else weights[:limit])
    return Evaluation(users, ranks, coverage.value() if len(users) else 0.0)


def mask_seen(scores: torch.Tensor, histories: list[np.ndarray]) -> torch.Tensor:
    """Set scores (B, N) to -inf, in place, at every item of each user's whole history."""
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    seen = np.concatenate(histories) if histories else np.zeros(0, np.int64)
    scores[torch.from_numpy(rows), torch.from_numpy(np.asarray(seen, dtype=np.int64))] = -torch.inf
    return scores


def recommender_scores(model: Recommender, trie: PathTrie, decoding: Decoding = "auto", beam: int = 50) -> Score:
    """Scoring function of a trained recommender, with its current weights.

    Args:
        decoding: `beam` scores the items that a search with `beam` beams reaches. `exact` scores every item: by
            `ItemScorer` for the SID transformer, else by a search with one beam per SID, which suits small catalogues.
            `auto` is exact for the SID transformer up to 20,000 items, else beam.
    """
    model.eval()
    device, max_history = next(model.parameters()).device, model.shape.max_history
    if isinstance(model, SidTransformer) and (decoding == "exact" or (decoding == "auto" and trie.num_items <= EXACT_UP_TO)):
        scorer = ItemScorer(model, trie)

        @torch.no_grad()
        def score(histories: list[np.ndarray]) -> torch.Tensor:
            return scorer(model.last_states(pad_histories(histories, max_history).to(device)))

        return score
    beams = trie.num_leaves if decoding == "exact" else beam

    @torch.no_grad()
    def search(histories: list[np.ndarray]) -> torch.Tensor:
        scores, batch_size = [], max(1, MAX_BEAMS // beams)
        for start in range(0, len(histories), batch_size):
            batch = histories[start : start + batch_size]
            seen = pad_histories(batch, max(map(len, batch))).to(device)
            steps = model.steps(pad_histories(batch, max_history).to(device))
            scores.append(beam_item_scores(beam_search(steps, trie, seen, beams), trie))
        return torch.cat(scores)

    return search
