"""Late fusion of a trained recommender with the classical hybrid. Weight and power are tuned on valid."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from mmsid.catalog.item import Item
from mmsid.catalog.splits import Split
from mmsid.recommend.classical import classical_scorers
from mmsid.recommend.evaluate import Score, mask_seen
from mmsid.recommend.metrics import Ranks, ndcg, rank_targets

WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2)
POWERS = (0.25, 0.5, 1.0)
TUNING_USERS = 4096


@dataclass(frozen=True)
class Fusion:
    """Fused scoring function, histories -> (B, N), and its parameters, including those of the classical hybrid."""

    score: Score
    parameters: dict[str, float]


def late_fusion(score: Score, hybrid: dict[str, float], items: list[Item], split: Split) -> Fusion:
    """Fuse a recommender with the classical hybrid of item-kNN and TF-IDF.

    Args:
        score: log-probabilities or logits of all items, -inf where the recommender scores none.
        hybrid: parameters of the classical hybrid, tuned on valid (`classical.classical_baselines`).
    """
    baseline = classical_scorers(items, split, {"hybrid_knn": hybrid})["hybrid_knn"]
    users = split.users("valid")[:TUNING_USERS]
    gains: dict[tuple[float, float], list[np.ndarray]] = {point: [] for point in product(WEIGHTS, POWERS)}
    for start in range(0, len(users), 256):
        batch = users[start : start + 256]
        histories = [split.history(int(user), "valid") for user in batch]
        logits, baseline_scores = mask_seen(score(histories), histories).cpu(), baseline(histories)
        targets = torch.from_numpy(split.valid[batch])
        for point, values in gains.items():
            above, tied = rank_targets(mask_seen(fuse_scores(logits, baseline_scores, *point), histories), targets)
            values.append(ndcg(Ranks(above.numpy(), tied.numpy()), 10))
    weight, power = max(gains, key=lambda point: float(np.concatenate(gains[point]).mean()))

    def fused(histories: list[np.ndarray]) -> torch.Tensor:
        return fuse_scores(mask_seen(score(histories), histories).cpu(), baseline(histories), weight, power)

    return Fusion(fused, {"fusion_weight": weight, "fusion_power": power} | hybrid)


def fuse_scores(logits: torch.Tensor, baseline: torch.Tensor, weight: float, power: float) -> torch.Tensor:
    """weight x (p / p_max)^power + baseline / baseline_max, with p = softmax(logits), inputs (B, N), maxima over each row.

    Both parts are in [0, 1], so one weight suits all users. A small power lets more items than the first few contribute.
    """
    share = (power * (logits.float() - logits.float().max(1, keepdim=True).values)).exp()
    return weight * share + baseline.float() / baseline.float().max(1, keepdim=True).values.clamp_min(1e-12)
