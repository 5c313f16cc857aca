"""Acceptance gate of refinement: refined codes are published only if the target improves and no guard metric degrades.

Metrics are of published codes on the held-out tenth of the train users. The target is a chance-corrected agreement, 0 for collapsed and
random codes; the guards are collisions, least perplexity, lift, the target of items read as new ones, flip rate and a quick recommender on
valid. A margin is the configured minimum or, where that is larger, a number of measured standard errors of the difference.

The guards of collisions and perplexity are wide: they stop a collapse. Codes that follow unequal interests are used less evenly than those
of a balanced start, and what that costs is measured by the recommender, on published codes. Nothing guards how well codes describe content:
codes that say what users do must say less about content, and the embedding, which refinement leaves alone, still describes it. What content
has to tell are the codes of new items, and that is measured on users.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmsid.config import Section
from mmsid.refine.evidence import Codes, prefix_keys

_RANKED = {"ndcg": "NDCG@10", "hit_rate": "HR@50", "coverage": "coverage@10"}  # metrics of the quick recommender


class GateConfig(Section):
    """Margins of the acceptance gate. Relative ones are shares of the value before refinement. The module docstring defines the margins.

    Attributes:
        level_weights: weights of the prefix lengths in the target.
        confidence: smallest share of bootstrap draws over held-out users in which the target must gain.
        draws: number of bootstrap draws.
        raw_collisions, published_collisions: allowed absolute growth of the share of items that share codes.
        least_perplexity, lift: allowed relative fall of the smallest perplexity of a level, and of the co-engagement lift.
        new_items: allowed relative fall of the target where one item of each pair has the codes that it would have as a new item: read by
            content alone, after learning from the codes of other items.
        flip_rate: allowed absolute growth of the share of items whose raw codes change under noise.
        ndcg, hit_rate, coverage: allowed relative fall of NDCG@10, HR@50 and coverage of the quick recommender.
        standard_errors: factor of the standard error of a difference, where it is known.
        quick_seeds: runs of the quick recommender per table; the standard error is known from 2 runs on.
        more_seeds: further runs where only the quick recommender refuses, because a standard error from two runs is itself uncertain.
    """

    level_weights: tuple[float, ...] = (0.6, 0.4)
    confidence: float = 0.95
    draws: int = 500
    raw_collisions: float = 0.5
    published_collisions: float = 0.0
    least_perplexity: float = 0.2
    lift: float = 0.03
    new_items: float = 0.03
    flip_rate: float = 0.02
    ndcg: float = 0.03
    hit_rate: float = 0.03
    coverage: float = 0.05
    standard_errors: float = 2.0
    quick_seeds: int = Field(2, ge=1)
    more_seeds: int = Field(4, ge=0)


@dataclass
class GateRow:
    """One metric of the gate. `margin` is the allowed fall (or growth) in the metric's own unit, `source` explains the margin."""

    metric: str
    role: Literal["target", "guard"]
    before: float
    after: float
    margin: float
    passed: bool
    better: Literal["higher", "lower"] = "higher"
    source: str = ""


@dataclass
class GateResult:
    """Verdict with all metrics. `reasons` is empty iff `accepted`."""

    accepted: bool
    reasons: list[str]
    rows: list[GateRow] = field(default_factory=list)
    gain_share: float | None = None  # share of bootstrap draws in which the target gains

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary, as written to `gate.json`."""
        return asdict(self)


@dataclass(frozen=True)
class HeldOutPairs:
    """Adjacent pairs of the held-out users: `pairs` (P, 2) item rows, `users` (P,) index of each pair's user."""

    pairs: NDArray[np.int64]
    users: NDArray[np.int64]

    @classmethod
    def from_histories(cls, histories: Sequence[NDArray]) -> HeldOutPairs:
        """Adjacent items of each history, without pairs of an item with itself."""
        parts = [np.stack([history[:-1], history[1:]], axis=1) for history in histories if len(history) > 1]
        users = [np.full(len(history) - 1, user) for user, history in enumerate(histories) if len(history) > 1]
        pairs = np.concatenate(parts).astype(np.int64) if parts else np.empty((0, 2), dtype=np.int64)
        owners = np.concatenate(users).astype(np.int64) if users else np.empty(0, dtype=np.int64)
        keep = pairs[:, 0] != pairs[:, 1]
        return cls(pairs[keep], owners[keep])


def agreement(
    codes: Codes,
    codebook_size: int,
    held_out: HeldOutPairs,
    level_weights: Sequence[float],
    draws: NDArray | None = None,
    as_new: Codes | None = None,
) -> Any:
    """Target of the gate: share of held-out pairs that agree on a prefix minus the chance share, weighted over levels.

    Chance = sum over prefixes of (share of pair ends under the prefix)^2, from the same pairs. The value is 0 when all items share a code,
    and about 0 for random codes.

    Args:
        codes: (N, L).
        draws: (D, users) weights of the users, one row per bootstrap draw.
        as_new: (N, L) codes of the items read as new ones. A pair then compares the codes of one end with those of the other end as a new
            item, either way round, and chance is the sum of the products of both shares.

    Returns:
        A float, or (D,) values with `draws`.
    """
    both = np.concatenate([prefix_keys(of, codebook_size) for of in (codes, codes if as_new is None else as_new)])
    weights = np.ones((1, 1 + int(held_out.users.max(initial=0)))) if draws is None else draws
    per_pair = weights[:, held_out.users].astype(np.float64)
    total = np.maximum(per_pair.sum(axis=1), 1e-12)
    value = np.zeros(len(weights))
    for level, weight in zip(range(codes.shape[1]), level_weights, strict=False):
        _, number = np.unique(both[:, level], return_inverse=True)
        size = int(number.max(initial=0)) + 1
        known, new = (of[held_out.pairs] for of in np.split(number, 2))
        agree = per_pair @ ((known[:, 0] == new[:, 1]).astype(np.float64) + (new[:, 0] == known[:, 1])) / (2 * total)
        shares = [np.stack([np.bincount(ends.ravel(), np.repeat(row, 2), size) for row in per_pair]) for ends in (known, new)]
        value += weight * (agree - (shares[0] * shares[1]).sum(axis=1) / np.square(2 * total))
    return value if draws is not None else float(value[0])


def level_lift(codes: Codes, held_out: HeldOutPairs, level: int = 0, draws: NDArray | None = None) -> Any:
    """Share of held-out pairs that agree on the first `level`+1 codes, divided by that share of random pairs of different items.

    Args and returns as in `agreement`.
    """
    keys = prefix_keys(codes, int(codes.max(initial=0)) + 1)[:, level]
    _, sizes = np.unique(keys, return_counts=True)
    count = len(keys)
    chance = float((sizes * (sizes - 1)).sum() / max(count * (count - 1), 1))
    weights = np.ones((1, 1 + int(held_out.users.max(initial=0)))) if draws is None else draws
    if len(held_out.pairs) == 0 or chance == 0.0:
        return 0.0 if draws is None else np.zeros(len(weights))
    per_pair = weights[:, held_out.users].astype(np.float64)
    agree = keys[held_out.pairs[:, 0]] == keys[held_out.pairs[:, 1]]
    value = per_pair @ agree / np.maximum(per_pair.sum(axis=1), 1e-12) / chance
    return value if draws is not None else float(value[0])


def colliding_share(codes: Codes, content: NDArray) -> float:
    """Share of the items that have the same codes as an item of other content (exact duplicates may share codes)."""
    if len(codes) == 0:
        return 0.0
    _, bucket = np.unique(codes, axis=0, return_inverse=True)
    bucket = bucket.reshape(-1)
    first = np.full(int(bucket.max()) + 1, -1, dtype=np.int64)
    _, kind = np.unique(content, return_inverse=True)
    first[bucket[::-1]] = kind[::-1]
    mixed = np.zeros(len(first), dtype=bool)
    np.logical_or.at(mixed, bucket, kind != first[bucket])
    return float(mixed[bucket].mean())


def least_perplexity(codes: Codes, codebook_size: int) -> float:
    """Smallest perplexity e^H of code use over the levels, between 1 and K."""
    least = float(codebook_size)
    for level in range(codes.shape[1]):
        share = np.bincount(codes[:, level], minlength=codebook_size) / max(len(codes), 1)
        share = share[share > 0]
        least = min(least, float(np.exp(-(share * np.log(share)).sum())))
    return least


def measure(
    codes: Codes,
    raw_codes: Codes,
    codebook_size: int,
    content: NDArray,
    held_out: HeldOutPairs,
    as_new: Codes,
    level_weights: Sequence[float],
) -> dict[str, float]:
    """Metrics of the gate for published `codes` (N, L), `raw_codes` (N, L) and the codes (N, L) that the items would have as new ones."""
    return {
        "target": agreement(codes, codebook_size, held_out, level_weights),
        "raw_collisions": colliding_share(raw_codes, content),
        "published_collisions": colliding_share(codes, content),
        "least_perplexity": least_perplexity(codes, codebook_size),
        "lift": level_lift(codes, held_out),
        "new_items": agreement(codes, codebook_size, held_out, level_weights, as_new=as_new),
    }


def ranking_figures(
    quick_recommender: Callable[[Any, int], Mapping[str, float]], tables: Sequence[Any], seeds: Sequence[int]
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """NDCG@10, HR@50 and coverage of a quick recommender: means over `seeds` per table, and the standard errors of their difference.

    The deviation over seeds is pooled over the tables. With one seed there are no standard errors.
    """
    runs = [[quick_recommender(table, seed) for seed in seeds] for table in tables]
    noise: dict[str, float] = {}
    values = {name: np.array([[float(one[key]) for one in of] for of in runs]) for name, key in _RANKED.items()}
    figures = [{name: float(value[place].mean()) for name, value in values.items()} for place in range(len(tables))]
    if len(seeds) > 1:
        noise = {name: float(np.sqrt(value.var(axis=1, ddof=1).mean() * 2 / len(seeds))) for name, value in values.items()}
    return figures, noise


class Bootstrap(NamedTuple):
    """Paired bootstrap over held-out users: share of draws in which the target gains, and standard errors of differences."""

    gain_share: float
    noise: dict[str, float]


def bootstrap(
    before: tuple[Codes, Codes], after: tuple[Codes, Codes], codebook_size: int, held_out: HeldOutPairs, config: GateConfig, seed: int
) -> Bootstrap:
    """Draw the held-out users `config.draws` times with replacement, the same draws for both tables.

    Args:
        before, after: published codes (N, L) of a table, and the codes (N, L) that its items would have as new ones.
    """
    users = int(held_out.users.max(initial=-1)) + 1
    if users == 0:
        return Bootstrap(0.0, {})
    draws = np.random.default_rng(seed).multinomial(users, np.full(users, 1 / users), size=config.draws)
    common = codebook_size, held_out, config.level_weights, draws
    target = [agreement(codes, *common) for codes, _ in (before, after)]
    new = [agreement(codes, *common, as_new) for codes, as_new in (before, after)]
    lift = [level_lift(codes, held_out, draws=draws) for codes, _ in (before, after)]
    noise = {name: float(np.std(then - now, ddof=1)) for name, (now, then) in (("lift", lift), ("new_items", new))}
    return Bootstrap(float((target[1] - target[0] > 0).mean()), noise)


def flip_rate_figures(before: NDArray, after: NDArray) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Flip rates of two tokenizers on the same noisy items, (N,) bool each, and the standard error of their difference."""
    difference = after.astype(np.float64) - before
    noise = float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else 0.0
    return [{"flip_rate": float(one.mean())} for one in (before, after)], {"flip_rate": noise}


def decide(
    before: Mapping[str, float], after: Mapping[str, float], share: float, config: GateConfig, noise: Mapping[str, float] | None = None
) -> GateResult:
    """Compare metrics before and after. Accepted iff the target gains in enough draws and every guard stays within its margin.

    Args:
        share: share of the bootstrap draws in which the target gains.
        noise: standard error of the difference per metric, where known.
    """
    gained = after["target"] > before["target"] and share >= config.confidence
    source = f"a gain in {config.confidence:.0%} of the draws over held-out users"
    rows = [GateRow("target", "target", before["target"], after["target"], 0.0, gained, source=source)]
    for metric, least, relative, better in (
        ("raw_collisions", config.raw_collisions, False, "lower"),
        ("published_collisions", config.published_collisions, False, "lower"),
        ("least_perplexity", config.least_perplexity, True, "higher"),
        ("lift", config.lift, True, "higher"),
        ("new_items", config.new_items, True, "higher"),
        ("flip_rate", config.flip_rate, False, "lower"),
        ("ndcg", config.ndcg, True, "higher"),
        ("hit_rate", config.hit_rate, True, "higher"),
        ("coverage", config.coverage, True, "higher"),
    ):
        if metric not in before:
            continue
        margin = least * before[metric] if relative else least
        source = f"{least:.0%} of the figure before" if relative else f"{least:g}, absolute"
        by_noise = config.standard_errors * (noise or {}).get(metric, 0.0)
        if by_noise > margin:
            margin, source = by_noise, f"{config.standard_errors:g} standard errors of the difference"
        worse = before[metric] - after[metric] if better == "higher" else after[metric] - before[metric]
        rows.append(GateRow(metric, "guard", before[metric], after[metric], margin, bool(worse <= margin + 1e-12), better, source))
    reasons = []
    if not gained:
        reasons.append(
            f"target {before['target']:.4f} -> {after['target']:.4f}, gaining in {share:.0%} of the draws over held-out users "
            f"(needed: a gain in {config.confidence:.0%})"
        )
    reasons += [
        f"{row.metric} {row.before:.4g} -> {row.after:.4g}, beyond the margin of {row.margin:.4g} ({row.source})"
        for row in rows[1:]
        if not row.passed
    ]
    return GateResult(accepted=not reasons, reasons=reasons, rows=rows, gain_share=share)


def refused(reason: str) -> GateResult:
    """Verdict without metrics, for a run that stopped before there were refined codes."""
    return GateResult(accepted=False, reasons=[reason])
