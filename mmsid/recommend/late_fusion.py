"""Late fusion: a trained recommender's item scores beside the hybrid baseline's, two knobs, chosen on valid."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from mmsid.catalog.items import Item
from mmsid.catalog.splits import Split
from mmsid.recommend.classical import classical_scorer
from mmsid.recommend.evaluate import Score, mask_seen
from mmsid.recommend.metrics import Ranks, ndcg, rank_targets

WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2)
POWERS = (0.25, 0.5, 1.0)
TUNING_USERS = 4096


@dataclass(frozen=True)
class Fusion:
    """The fused scoring function, histories -> (B, N), and the parameters chosen on valid (the baseline's own among them)."""

    score: Score
    parameters: dict[str, float]


def late_fusion(score: Score, hybrid: dict[str, float], items: list[Item], split: Split) -> Fusion:
    """Fuse a recommender with the hybrid of item-kNN and TF-IDF.

    Args:
        score: the recommender's log-probabilities or logits over all items; -inf where it scores none.
        hybrid: the baseline's parameters as tuned on valid (baselines.classical_baselines).
    """
    baseline = classical_scorer(items, split, hybrid)
    users = split.users("valid")[:TUNING_USERS]
    found: dict[tuple[float, float], list[np.ndarray]] = {point: [] for point in product(WEIGHTS, POWERS)}
    for start in range(0, len(users), 256):
        some = users[start : start + 256]
        histories = [split.history(int(user), "valid") for user in some]
        ours, theirs = mask_seen(score(histories), histories).cpu(), baseline(histories)
        targets = torch.from_numpy(split.valid[some])
        for point, gains in found.items():
            above, tied = rank_targets(mask_seen(fuse_scores(ours, theirs, *point), histories), targets)
            gains.append(ndcg(Ranks(above.numpy(), tied.numpy()), 10))
    weight, power = max(found, key=lambda point: float(np.concatenate(found[point]).mean()))

    def fused(histories: list[np.ndarray]) -> torch.Tensor:
        return fuse_scores(mask_seen(score(histories), histories).cpu(), baseline(histories), weight, power)

    return Fusion(fused, {"fusion_weight": weight, "fusion_power": power} | hybrid)


def fuse_scores(ours: torch.Tensor, baseline: torch.Tensor, weight: float, power: float) -> torch.Tensor:
    """weight x (p / p_max)^power + baseline / floor_max, both (B, N), p = softmax(ours), maxima over each row.

    Both parts lie in [0, 1], so one weight serves all users; a small power lets more than the first few items of `ours` speak.
    """
    share = (power * (ours.float() - ours.float().max(1, keepdim=True).values)).exp()
    return weight * share + baseline.float() / baseline.float().max(1, keepdim=True).values.clamp_min(1e-12)
