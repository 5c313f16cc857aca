"""Item-level ranking metrics with expected ranks under ties, and the paired bootstrap for differences.

Metrics are functions of two integers per target: `above`, the candidates scored strictly higher, and `tied`, those with
the same score, target included. Items that share a SID share a score: the target has each of the ranks above + 1 ..
above + tied with probability 1 / tied, and a SID shared by n items occupies n ranks. One SID for all items earns chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from mmsid.errors import MmsidError

HIT_CUTOFFS = (1, 5, 10, 20, 50)
NDCG_CUTOFFS = (5, 10)
MRR_CUTOFF = 50  # the default beam width, so that exact ranking and beam search are comparable
COVERAGE_CUTOFF = 10
WEIGHTED = "weighted"  # first word of the names of metrics that weight each target by its event
SID_LEVEL_GAIN = "SID-level minus item-level HR@10"


class Ranks(NamedTuple):
    """Ranks of P targets: `above` and `tied`, both int64 (P,). `tied == 0`: the target was not a candidate and earns nothing.

    `weights` (P,) are the event weights of the targets; None for a catalogue without event weights.
    """

    above: np.ndarray
    tied: np.ndarray
    weights: np.ndarray | None = None


def rank_targets(scores: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the candidates above each target and those tied with it.

    Args:
        scores: (B, N), -inf for every item that is not a candidate (seen, or not decoded).
        targets: int64 (B,), item rows.

    Returns:
        (above, tied), int64 (B,) each. For a target that is not a candidate, tied is 0 and above counts all candidates.

    Raises:
        MmsidError: a score is NaN.
    """
    if torch.isnan(scores).any():
        raise MmsidError(
            "scores contain NaN: the recommender diverged or its weights are damaged; lower the learning rate or restore the weights"
        )
    own = scores.gather(1, targets[:, None])
    above = (scores > own).sum(1)
    tied = (scores == own).sum(1)
    return above, torch.where(torch.isneginf(own[:, 0]), torch.zeros_like(tied), tied)


def rank_candidates(items: torch.Tensor, scores: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`rank_targets` for candidate lists: items int64 (B, C), distinct, padded with -1, and their scores (B, C), -inf for padding."""
    found = items == targets[:, None]
    column = torch.where(found.any(1), found.int().argmax(1), items.shape[1])  # the last column stands for all other items
    return rank_targets(F.pad(scores, (0, 1), value=-torch.inf), column)


def sid_level_hits(scores: torch.Tensor, targets: torch.Tensor, sids: torch.Tensor, cutoff: int = 10) -> np.ndarray:
    """Expected SID-level HR@K per target, float64 (B,): a hit if the target's SID is among the K best distinct SIDs.

    Many papers report this. A SID scores as its best candidate item, so a SID of n items takes one rank instead of n. A target that is
    not a candidate earns nothing.

    Args:
        scores: (B, N), as for `rank_targets`.
        sids: int64 (N,), number of each item's SID.
    """
    best = scores.new_full((len(scores), int(sids.max()) + 1), -torch.inf)
    best.scatter_reduce_(1, sids.expand_as(scores), scores, "amax")
    above, tied = rank_targets(best, sids[targets])
    candidate = ~torch.isneginf(scores.gather(1, targets[:, None])[:, 0])
    return hit_rate(Ranks(above.cpu().numpy(), torch.where(candidate, tied, 0).cpu().numpy()), cutoff)


def hit_rate(ranks: Ranks, cutoff: int) -> np.ndarray:
    """Expected HR@K per target, float64 (P,): clip(K - above, 0, tied) / tied."""
    tied = np.maximum(ranks.tied, 1)
    return np.where(ranks.tied > 0, np.clip(cutoff - ranks.above, 0, tied) / tied, 0.0)


def ndcg(ranks: Ranks, cutoff: int) -> np.ndarray:
    """Expected NDCG@K per target with one relevant item, float64 (P,)."""
    return _expected_gain(ranks, 1.0 / np.log2(np.arange(2, cutoff + 2)))


def reciprocal_rank(ranks: Ranks, cutoff: int) -> np.ndarray:
    """Expected reciprocal rank per target, 0 beyond the cutoff, float64 (P,)."""
    return _expected_gain(ranks, 1.0 / np.arange(1, cutoff + 1))


def _expected_gain(ranks: Ranks, gain: np.ndarray) -> np.ndarray:
    """Mean of `gain` (K,) over the ranks above + 1 .. above + tied; 0 beyond rank K."""
    total = np.concatenate([[0.0], np.cumsum(gain)])
    first, last = np.minimum(ranks.above, len(gain)), np.minimum(ranks.above + ranks.tied, len(gain))
    return np.where(ranks.tied > 0, (total[last] - total[first]) / np.maximum(ranks.tied, 1), 0.0)


def per_position(ranks: Ranks, metric: str) -> np.ndarray:
    """One metric per target by name (`HR@10`, `NDCG@5`, `MRR@50`), float64 (P,)."""
    name, _, cutoff = metric.partition("@")
    return {"HR": hit_rate, "NDCG": ndcg, "MRR": reciprocal_rank}[name](ranks, int(cutoff))


def summarise(ranks: Ranks) -> dict[str, float]:
    """Means over targets: HR@{1,5,10,20,50}, NDCG@{5,10}, MRR@50. Empty input gives zeros.

    If the targets have different event weights, means weighted by them are added: `weighted HR@10`, `weighted NDCG@10` and so on.
    """
    names = [f"HR@{k}" for k in HIT_CUTOFFS] + [f"NDCG@{k}" for k in NDCG_CUTOFFS] + [f"MRR@{MRR_CUTOFF}"]
    values = {name: per_position(ranks, name) for name in names}
    means = {name: float(value.mean()) if len(value) else 0.0 for name, value in values.items()}
    weights = ranks.weights
    if weights is None or len(weights) == 0 or (weights == weights[0]).all():
        return means
    return means | {f"{WEIGHTED} {name}": float(value @ weights / weights.sum()) for name, value in values.items()}


@dataclass
class Coverage:
    """Expected share of the catalogue that appears in the first `cutoff` ranks of at least one user.

    Ties are broken uniformly and independently per user, so item i appears with probability 1 - prod_u (1 - p_ui).
    """

    num_items: int
    cutoff: int = COVERAGE_CUTOFF
    _log_missed: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._log_missed = torch.zeros(self.num_items, dtype=torch.float64)

    def update(self, scores: torch.Tensor, items: torch.Tensor | None = None) -> None:
        """Add B users by their scores (B, N), -inf for items that are not candidates.

        Args:
            items: int64 (B, C), rows of the items that `scores` (B, C) belong to, padded with -1; None: all items.
        """
        log_missed = torch.log1p(-top_probabilities(scores, self.cutoff).double()).cpu()
        if items is None:
            self._log_missed += log_missed.sum(0)
        else:
            self._log_missed.index_add_(0, items[items >= 0], log_missed[items >= 0])

    def value(self) -> float:
        """Coverage in [0, 1]."""
        return float((1.0 - self._log_missed.exp()).mean())


def top_probabilities(scores: torch.Tensor, cutoff: int) -> torch.Tensor:
    """Probability (B, N) that each item is in the first `cutoff` ranks, ties broken uniformly; rows sum to min(cutoff, candidates)."""
    threshold = scores.topk(min(cutoff, scores.shape[1]), dim=1).values[:, -1:]
    above, tied = scores > threshold, (scores == threshold) & ~torch.isneginf(scores)
    remaining = cutoff - above.sum(1, keepdim=True)
    share = (remaining / tied.sum(1, keepdim=True).clamp_min(1)).clamp(max=1.0)
    return above.double() + tied * share.double()


class Difference(NamedTuple):
    """Comparison of a method with a baseline.

    Attributes:
        mean: mean of method minus baseline.
        low, high: 95 % bootstrap interval.
        p: two-sided p value, uncorrected.
        detectable: smallest effect detected with 80 % power, (1.96 + 0.84) standard errors.
    """

    mean: float
    low: float
    high: float
    p: float
    detectable: float


def paired_bootstraps(pairs: Sequence[tuple[np.ndarray, np.ndarray]], draws: int = 10_000, seed: int = 0) -> list[Difference]:
    """Bootstrap differences over users and seeds, paired on both. All pairs share the same draws of users.

    Args:
        pairs: (method, baseline), metric values per seed and user (S, P) each. S = 1 (a deterministic method) is compared with
            every seed of the other. Seeds and users are each resampled with replacement. P is the same for all pairs.
        draws: bootstrap samples; the smallest possible p value is 2 / (draws + 1).

    Raises:
        ValueError: the shapes cannot be paired.
    """
    gaps = []
    for values, baseline in pairs:
        values, baseline = np.atleast_2d(values), np.atleast_2d(baseline)
        if values.shape[1] != baseline.shape[1] or (len(values) != len(baseline) and 1 not in (len(values), len(baseline))):
            raise ValueError(
                f"cannot pair values of shapes {values.shape} and {baseline.shape}; evaluate both methods on the same users and seeds"
            )
        gaps.append(values - baseline)
    if len({gap.shape[1] for gap in gaps}) > 1:
        raise ValueError(f"the pairs have {sorted({gap.shape[1] for gap in gaps})} users; evaluate all methods on the same users")
    if not gaps:
        return []
    users = gaps[0].shape[1]
    means = np.empty((len(gaps), draws))
    rows, ends = np.concatenate(gaps), np.cumsum([len(gap) for gap in gaps])[:-1]
    user_rng = np.random.default_rng([seed, 0])
    # one generator per number of seeds, so that a comparison does not depend on the other pairs
    seed_rngs = {len(gap): np.random.default_rng([seed, len(gap)]) for gap in gaps}
    for start in range(0, draws, 256):
        count = min(256, draws - start)
        user_weights = user_rng.multinomial(users, np.full(users, 1 / users), size=count)
        resampled = np.split(user_weights @ rows.T / users, ends, axis=1)
        seed_weights = {seeds: rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds for seeds, rng in seed_rngs.items()}
        for place, values in enumerate(resampled):
            means[place, start : start + count] = (values * seed_weights[values.shape[1]]).sum(1)
    return [_difference(gap, found) for gap, found in zip(gaps, means, strict=True)]


def grouped_bootstrap(values: np.ndarray, baseline: np.ndarray, member: np.ndarray, draws: int = 10_000, seed: int = 0) -> Difference:
    """Bootstrap the difference on a group of users that is another one in each of D repetitions, paired over users and repetitions.

    The difference is the mean over repetitions of the mean over the group. Users and repetitions are each resampled with replacement.

    Args:
        values, baseline: metric values (D, P) of method and baseline.
        member: (D, P) bool, the group in each repetition; no group is empty.
    """
    gaps, member = np.where(member, values - baseline, 0.0), member.astype(np.float64)
    count, users = gaps.shape
    rng, means = np.random.default_rng(seed), []
    for start in range(0, draws, 256):
        size = min(256, draws - start)
        weights = rng.multinomial(users, np.full(users, 1 / users), size=size)
        of_repetition = (weights @ gaps.T) / np.maximum(weights @ member.T, 1)
        means.append((of_repetition * rng.multinomial(count, np.full(count, 1 / count), size=size)).sum(1) / count)
    return _difference(gaps.sum(1) / member.sum(1), np.concatenate(means))


def _difference(gaps: np.ndarray, means: np.ndarray) -> Difference:
    low, high = np.quantile(means, [0.025, 0.975])
    p = min(1.0, 2 * (min((means <= 0).sum(), (means >= 0).sum()) + 1) / (len(means) + 1))
    return Difference(float(gaps.mean()), float(low), float(high), float(p), float(2.8 * means.std()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-corrected p values (Holm 1979): the i-th smallest of m values times (m - i + 1), made monotone and capped at 1."""
    corrected, highest = [1.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = highest
    return corrected


def over_seeds(values: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation of each metric over seeds, `{"NDCG@10": {"mean", "std"}}`; std is 0 for one seed.

    A metric that is missing at a seed is left out.
    """
    table = {}
    for name in (name for name in values[0] if all(name in value for value in values)):
        column = np.array([value[name] for value in values], dtype=np.float64)
        table[name] = {"mean": float(column.mean()), "std": float(column.std(ddof=1)) if len(column) > 1 else 0.0}
    return table
