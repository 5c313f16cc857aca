"""Item-level ranking metrics that a collision cannot flatter, and the paired bootstrap that judges differences.

Everything is a pure function of two integers per evaluated position: `above`, the number of candidate items scored
strictly higher than the target, and `tied`, the number of candidates with exactly the target's score, the target
included. Items that share a Semantic ID share a score, so a bucket of n items takes n ranks, and the target stands on
each of the ranks above+1 .. above+tied with probability 1/tied:

    E[HR@K]   = clip(K - above, 0, tied) / tied
    E[NDCG@K] = (G(min(above + tied, K)) - G(min(above, K))) / tied,   G(r) = sum_{i=1..r} 1 / log2(i + 1)
    E[MRR@K]  = (H(min(above + tied, K)) - H(min(above, K))) / tied,   H(r) = sum_{i=1..r} 1 / i

One bucket for the whole catalogue therefore earns exactly chance, K/N. (Scoring SID strings instead, as most published
tables do, would give it HR@1 = 1.) `tied = 0` marks a target that was never a candidate (not decoded, or already in the
history): it earns nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from mmsid.errors import MmsidError

HIT_CUTOFFS = (1, 5, 10, 20, 50)
NDCG_CUTOFFS = (5, 10)
MRR_CUTOFF = 50  # the usual beam: exact ranking and a beam search are then scored alike
COVERAGE_CUTOFF = 10


class Ranks(NamedTuple):
    """Where the targets stand: `above` and `tied`, both int64 (P,). `tied == 0`: never a candidate."""

    above: np.ndarray
    tied: np.ndarray


def rank_targets(scores: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the candidates above and level with each target.

    Args:
        scores: (B, N), -inf for every item that is no candidate (seen, or not decoded); NaN is refused.
        targets: int64 (B,), item rows.

    Returns:
        (above, tied), int64 (B,) each; tied is 0 and above the number of candidates where the target is no candidate.

    Raises:
        MmsidError: a score is NaN.
    """
    if torch.isnan(scores).any():
        raise MmsidError("scores hold NaN: the recommender diverged or its weights are damaged; lower its learning rate or restore them")
    own = scores.gather(1, targets[:, None])
    above = (scores > own).sum(1)
    tied = (scores == own).sum(1)
    return above, torch.where(torch.isneginf(own[:, 0]), torch.zeros_like(tied), tied)


def hit_rate(ranks: Ranks, cutoff: int) -> np.ndarray:
    """Expected HR@cutoff per position, float64 (P,)."""
    tied = np.maximum(ranks.tied, 1)
    return np.where(ranks.tied > 0, np.clip(cutoff - ranks.above, 0, tied) / tied, 0.0)


def ndcg(ranks: Ranks, cutoff: int) -> np.ndarray:
    """Expected NDCG@cutoff per position with one relevant item, float64 (P,)."""
    return _expected_gain(ranks, 1.0 / np.log2(np.arange(2, cutoff + 2)))


def reciprocal_rank(ranks: Ranks, cutoff: int) -> np.ndarray:
    """Expected reciprocal rank per position, 0 beyond the cutoff (which is what a beam of that width sees), float64 (P,)."""
    return _expected_gain(ranks, 1.0 / np.arange(1, cutoff + 1))


def _expected_gain(ranks: Ranks, gain: np.ndarray) -> np.ndarray:
    """Mean of `gain` (K,) over the ranks above+1 .. above+tied, nothing beyond K."""
    total = np.concatenate([[0.0], np.cumsum(gain)])
    first, last = np.minimum(ranks.above, len(gain)), np.minimum(ranks.above + ranks.tied, len(gain))
    return np.where(ranks.tied > 0, (total[last] - total[first]) / np.maximum(ranks.tied, 1), 0.0)


def per_position(ranks: Ranks, metric: str) -> np.ndarray:
    """One metric by name (`HR@10`, `NDCG@5`, `MRR@50`), float64 (P,)."""
    name, _, cutoff = metric.partition("@")
    return {"HR": hit_rate, "NDCG": ndcg, "MRR": reciprocal_rank}[name](ranks, int(cutoff))


def summarise(ranks: Ranks) -> dict[str, float]:
    """Means over positions: HR@{1,5,10,20,50}, NDCG@{5,10}, MRR@50. Empty input gives zeros."""
    names = [f"HR@{k}" for k in HIT_CUTOFFS] + [f"NDCG@{k}" for k in NDCG_CUTOFFS] + [f"MRR@{MRR_CUTOFF}"]
    return {name: float(per_position(ranks, name).mean()) if len(ranks.above) else 0.0 for name in names}


@dataclass
class Coverage:
    """Expected share of the catalogue that reaches at least one user's first `cutoff` ranks.

    Ties are broken anew for each user, uniformly, so item i is shown to somebody with probability 1 - prod_u (1 - p_ui).
    """

    num_items: int
    cutoff: int = COVERAGE_CUTOFF
    _log_missed: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._log_missed = torch.zeros(self.num_items, dtype=torch.float64)

    def update(self, scores: torch.Tensor) -> None:
        """Add the users of `scores` (B, N); -inf marks items that are no candidates."""
        shown = top_probabilities(scores, self.cutoff)
        self._log_missed += torch.log1p(-shown.double()).sum(0).cpu()

    def value(self) -> float:
        """The share, in [0, 1]."""
        return float((1.0 - self._log_missed.exp()).mean())


def top_probabilities(scores: torch.Tensor, cutoff: int) -> torch.Tensor:
    """Probability (B, N) that each item stands in the first `cutoff` ranks, ties broken uniformly; rows sum to min(cutoff, candidates)."""
    threshold = scores.topk(min(cutoff, scores.shape[1]), dim=1).values[:, -1:]
    over, level = scores > threshold, (scores == threshold) & ~torch.isneginf(scores)
    room = cutoff - over.sum(1, keepdim=True)
    share = (room / level.sum(1, keepdim=True).clamp_min(1)).clamp(max=1.0)
    return over.double() + level * share.double()


class Difference(NamedTuple):
    """Mean of arm minus baseline, its 95 % bootstrap interval, two-sided p, and the smallest effect seen with 80 % power."""

    mean: float
    low: float
    high: float
    p: float
    detectable: float


def paired_bootstrap(arm: np.ndarray, baseline: np.ndarray, draws: int = 2000, seed: int = 0) -> Difference:
    """Bootstrap one difference over users and seeds, paired on both; see `paired_bootstraps`."""
    return paired_bootstraps([(arm, baseline)], draws, seed)[0]


def paired_bootstraps(pairs: Sequence[tuple[np.ndarray, np.ndarray]], draws: int = 10_000, seed: int = 0) -> list[Difference]:
    """Bootstrap differences over users and seeds, paired on both. All pairs share the same draws of users, which costs them once.

    Args:
        pairs: (arm, baseline), per-position metric values (S, P) each; S = 1 (a deterministic arm) is compared with every seed of
            the other. Seeds and users are each resampled with replacement. P is the same for all pairs.
        draws: bootstrap samples; the smallest p that can be told is 2 / (draws + 1).

    Returns:
        One Difference per pair; `detectable` = (1.96 + 0.84) standard errors.

    Raises:
        ValueError: shapes cannot be paired.
    """
    gaps = []
    for arm, baseline in pairs:
        arm, baseline = np.atleast_2d(arm), np.atleast_2d(baseline)
        if arm.shape[1] != baseline.shape[1] or (arm.shape[0] != baseline.shape[0] and 1 not in (arm.shape[0], baseline.shape[0])):
            raise ValueError(
                f"cannot pair values of shapes {arm.shape} and {baseline.shape}; evaluate both arms on the same users and seeds"
            )
        gaps.append(arm - baseline)
    if len({gap.shape[1] for gap in gaps}) > 1:
        raise ValueError(f"pairs of {sorted({gap.shape[1] for gap in gaps})} positions; compare arms on the same users")
    if not gaps:
        return []
    users = gaps[0].shape[1]
    means = np.empty((len(gaps), draws))
    rows, ends = np.concatenate(gaps), np.cumsum([len(gap) for gap in gaps])[:-1]
    user_rng = np.random.default_rng([seed, 0])
    # one generator per number of seeds: a comparison must not depend on which others stand in the table
    seed_rngs = {len(gap): np.random.default_rng([seed, len(gap)]) for gap in gaps}
    for start in range(0, draws, 256):
        count = min(256, draws - start)
        user_weights = user_rng.multinomial(users, np.full(users, 1 / users), size=count)
        resampled = np.split(user_weights @ rows.T / users, ends, axis=1)
        seed_weights = {seeds: rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds for seeds, rng in seed_rngs.items()}
        for place, values in enumerate(resampled):
            means[place, start : start + count] = (values * seed_weights[values.shape[1]]).sum(1)
    return [_difference(gap, found) for gap, found in zip(gaps, means, strict=True)]


def _difference(gaps: np.ndarray, means: np.ndarray) -> Difference:
    low, high = np.quantile(means, [0.025, 0.975])
    p = min(1.0, 2 * (min((means <= 0).sum(), (means >= 0).sum()) + 1) / (len(means) + 1))
    return Difference(float(gaps.mean()), float(low), float(high), float(p), float(2.8 * means.std()))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for the number of comparisons (Holm 1979): the i-th smallest of m times (m - i + 1), made monotone, at most 1."""
    corrected, highest = [1.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = highest
    return corrected


def over_seeds(values: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """`{"NDCG@10": {"mean", "std"}}` over seeds; the deviation is the sample's (n - 1), 0 for one seed."""
    table = {}
    for name in values[0]:
        column = np.array([value[name] for value in values], dtype=np.float64)
        table[name] = {"mean": float(column.mean()), "std": float(column.std(ddof=1)) if len(column) > 1 else 0.0}
    return table
