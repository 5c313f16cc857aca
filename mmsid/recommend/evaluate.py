"""Rank the full catalogue for every user of a split part: one door for neural and classical recommenders alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from mmsid.catalog.splits import Split
from mmsid.recommend.beam_search import beam_item_scores, beam_search
from mmsid.recommend.flat import FlatRecommender
from mmsid.recommend.history_encoder import pad_histories
from mmsid.recommend.item_scorer import ItemScorer
from mmsid.recommend.metrics import COVERAGE_CUTOFF, Coverage, Ranks, rank_targets, summarise
from mmsid.recommend.paths import PathTrie
from mmsid.recommend.sid_transformer import SidTransformer
from mmsid.recommend.tiger import TigerRecommender

Part = Literal["valid", "test"]
Decoding = Literal["auto", "exact", "beam"]
Score = Callable[[list[np.ndarray]], torch.Tensor]
Recommender = SidTransformer | FlatRecommender | TigerRecommender
EXACT_UP_TO = 20_000  # items; above, a beam search is quicker and its misses are rare
SCORES_AT_ONCE = 1 << 23  # floats of one (B, N) block
BEAMS_AT_ONCE = 1 << 14  # users x beams of one search


@dataclass(frozen=True)
class Evaluation:
    """Ranks of the targets of `users` (rows of the split), and the coverage of the recommendations made to them."""

    users: np.ndarray
    ranks: Ranks
    coverage: float

    def summary(self) -> dict[str, float]:
        """All metrics by name, coverage included."""
        return summarise(self.ranks) | {f"coverage@{COVERAGE_CUTOFF}": self.coverage}


def evaluate(score: Score, split: Split, part: Part, num_items: int, limit: int | None = None) -> Evaluation:
    """Score, mask what the user has seen, rank the target.

    Args:
        score: histories -> (B, N), higher is better, -inf where an item is no candidate.
        limit: look at the first so many users only. The catalogue orders users by content hash, so this is a sample
            that neither row order nor ids decide.
    """
    users = split.users(part)[:limit]
    targets = (split.valid if part == "valid" else split.test)[users]
    coverage, above, tied = Coverage(num_items), [], []
    batch = max(1, min(256, SCORES_AT_ONCE // num_items))
    for start in range(0, len(users), batch):
        histories = [split.history(int(user), part) for user in users[start : start + batch]]
        scores = mask_seen(score(histories), histories)
        for found, into in zip(rank_targets(scores, torch.from_numpy(targets[start : start + batch]).to(scores.device)), (above, tied)):
            into.append(found.cpu().numpy())
        coverage.update(scores)
    empty = [np.zeros(0, dtype=np.int64)]
    return Evaluation(users, Ranks(np.concatenate(above or empty), np.concatenate(tied or empty)), coverage.value() if len(users) else 0.0)


def mask_seen(scores: torch.Tensor, histories: list[np.ndarray]) -> torch.Tensor:
    """Scores (B, N) with -inf, in place, at every item of each user's whole history."""
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    seen = np.concatenate(histories) if histories else np.zeros(0, np.int64)
    scores[torch.from_numpy(rows), torch.from_numpy(np.asarray(seen, dtype=np.int64))] = -torch.inf
    return scores


def recommender_scores(model: Recommender, trie: PathTrie, decoding: Decoding = "auto", beam: int = 50) -> Score:
    """The scoring function of a trained recommender, its weights frozen now.

    Args:
        decoding: `beam`: what a search with `beam` beams reaches. `exact`: every item; the instrument has a quick way, the
            others search with as many beams as there are SIDs, which is for small catalogues. `auto`: exact for the
            instrument up to 20,000 items, else beam.
    """
    model.eval()
    device, reach = next(model.parameters()).device, model.shape.max_history
    quick = isinstance(model, SidTransformer)
    if quick and (decoding == "exact" or (decoding == "auto" and trie.node_of.shape[1] <= EXACT_UP_TO)):
        scorer = ItemScorer(model, trie)
        return lambda histories: scorer(_states(model, histories, reach, device))
    beams = len(trie.levels[-1].token) if decoding == "exact" else beam

    @torch.no_grad()
    def search(histories: list[np.ndarray]) -> torch.Tensor:
        found, users = [], max(1, BEAMS_AT_ONCE // beams)
        for start in range(0, len(histories), users):
            some = histories[start : start + users]
            seen = pad_histories(some, max(map(len, some))).to(device)
            steps = model.steps(pad_histories(some, reach).to(device))
            found.append(beam_item_scores(beam_search(steps, trie, seen, beams), trie))
        return torch.cat(found)

    return search


@torch.no_grad()
def _states(model: SidTransformer, histories: list[np.ndarray], reach: int, device: torch.device) -> torch.Tensor:
    return model.last_states(pad_histories(histories, reach).to(device))
