"""The acceptance gate: refined codes are published only if the target got better and no guard got worse.

Figures are of the *published* codes (after relocation) and of users that nothing was fitted on: the held-out tenth of the train users.
The target is a chance-corrected agreement, so a collapsed table (all agree, chance 1) and a scrambled one (nobody agrees) both score 0;
the guards cover what a single figure never can: collisions, the least perplexity, lift, rebuild, flips under noisy texts, and a quick
recommender on valid.

A margin is the least change that matters (set in the configuration) or, where the figure varies by chance and that is larger, so many
standard errors of the difference as measured: over seeds for the quick recommender, over held-out users for the lift, over items for the
flips. Every row of the output names which of the two it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse

from mmsid.config import Section
from mmsid.refine.evidence import Codes, prefix_keys

_RANKED = {"ndcg": "NDCG@10", "hit_rate": "HR@50", "coverage": "coverage@10"}  # of a quick recommender


class GateConfig(Section):
    """Least changes that matter; relative ones are shares of the figure before. See the module for how they become margins."""

    renamed_keys: ClassVar[dict[str, str]] = {"rebuild": "reconstruction"}

    level_weights: tuple[float, ...] = (0.6, 0.4)
    confidence: float = 0.8  # least share of the bootstrap draws over held-out users in which the target gains
    draws: int = 500
    raw_collisions: float = 0.02  # absolute growth of the share of items that share raw codes
    published_collisions: float = 0.0
    least_perplexity: float = 0.03  # relative fall
    lift: float = 0.03  # relative fall of level-1 lift over chance
    reconstruction: float = 0.05  # relative growth of what codes leave unsaid of the items' vectors
    flip_rate: float = 0.02  # absolute growth of the share of items whose raw codes change under noise
    ndcg: float = 0.03  # relative fall of NDCG@10 of the quick recommender
    hit_rate: float = 0.03  # and of its HR@50
    coverage: float = 0.05  # and of its coverage
    standard_errors: float = 2.0  # of the difference, where its noise is known
    quick_seeds: int = Field(2, ge=1)  # runs of the quick recommender for each table; from 2 on their noise is known
    more_seeds: int = Field(4, ge=0)  # further runs where those refuse what all other guards let pass: two know little of their own noise


@dataclass
class GateRow:
    """One line of the gate: `margin` is how far the figure may fall (or grow) in its own unit, `source` where that comes from."""

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
    """Verdict with every figure. `reasons` is empty iff `accepted`."""

    accepted: bool
    reasons: list[str]
    rows: list[GateRow] = field(default_factory=list)
    gain_share: float | None = None  # share of bootstrap draws in which the target gains

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class HeldOutPairs:
    """Adjacent pairs of the held-out users: `pairs` (P, 2) item rows, `users` (P,) number of the user each comes from."""

    pairs: NDArray[np.int64]
    users: NDArray[np.int64]

    @classmethod
    def from_histories(cls, histories: Sequence[NDArray]) -> HeldOutPairs:
        """Adjacent items of each history; a pair of an item with itself says nothing and is left out."""
        parts = [np.stack([history[:-1], history[1:]], axis=1) for history in histories if len(history) > 1]
        users = [np.full(len(history) - 1, user) for user, history in enumerate(histories) if len(history) > 1]
        pairs = np.concatenate(parts).astype(np.int64) if parts else np.empty((0, 2), dtype=np.int64)
        owners = np.concatenate(users).astype(np.int64) if users else np.empty(0, dtype=np.int64)
        keep = pairs[:, 0] != pairs[:, 1]
        return cls(pairs[keep], owners[keep])


def agreement(
    codes: Codes, codebook_size: int, held_out: HeldOutPairs, level_weights: Sequence[float], draws: NDArray | None = None
) -> Any:
    """Weighted over levels: share of pairs that agree on the prefix minus its chance, the chance from the pairs' own items.

    Chance = sum over prefixes of (share of pair ends under it)^2. With `draws` (D, users) of user weights: one value per draw (D,);
    else a float. 0 for a collapsed table, about 0 for a random one.
    """
    keys = prefix_keys(codes, codebook_size)
    weights = np.ones((1, 1 + int(held_out.users.max(initial=0)))) if draws is None else draws
    per_pair = weights[:, held_out.users].astype(np.float64)
    total = np.maximum(per_pair.sum(axis=1), 1e-12)
    value = np.zeros(len(weights))
    for level, weight in zip(range(codes.shape[1]), level_weights, strict=False):
        _, number = np.unique(keys[:, level], return_inverse=True)
        ends = number[held_out.pairs]
        agree = per_pair @ (ends[:, 0] == ends[:, 1]) / total
        size = int(number.max(initial=0)) + 1
        shares = [np.bincount(ends.ravel(), weights=np.repeat(row, 2), minlength=size) for row in per_pair]
        chance = np.square(np.stack(shares) / (2 * total[:, None])).sum(axis=1)
        value += weight * (agree - chance)
    return value if draws is not None else float(value[0])


def level_lift(codes: Codes, held_out: HeldOutPairs, level: int = 0, draws: NDArray | None = None) -> Any:
    """Share of held-out adjacent pairs agreeing on the first `level`+1 codes, over that of random pairs of different items.

    With `draws` (D, users) of user weights: one value per draw (D,); else a float.
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
    """Share of the items that hold the codes of an item of other content (exact duplicates may share)."""
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
    """Smallest perplexity e^H of the code use over the levels; between 1 and K."""
    least = float(codebook_size)
    for level in range(codes.shape[1]):
        share = np.bincount(codes[:, level], minlength=codebook_size) / max(len(codes), 1)
        share = share[share > 0]
        least = min(least, float(np.exp(-(share * np.log(share)).sum())))
    return least


def unexplained_variance(codes: Codes, vectors: NDArray, sweeps: int = 3) -> float:
    """Share of the variance of the vectors (N, H) that the codes (N, L) do not tell: 0 where they tell all, 1 where nothing.

    A vector is rebuilt as the mean of all plus a vector per code, fitted to this very table (backfitting: level by level the means of
    what the others leave, `sweeps` times). So it asks how legible an item's content is in its codes, and not how far the codes lie from
    where the start believed the item: of a start that is wrong about an item, every repair would look like an error. A table says about
    as much by chance as it has codes (L * K / N of the variance); that is the same before and after.
    """
    left = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    total = max(float(np.square(left).sum()), 1e-12)
    groups = [np.unique(codes[:, level], return_inverse=True)[1].reshape(-1) for level in range(codes.shape[1])]
    everyone = np.arange(len(codes))
    members = [sparse.csr_matrix((np.ones(len(of)), (of, everyone)), (int(of.max(initial=-1)) + 1, len(of))) for of in groups]
    told = [np.zeros((one.shape[0], vectors.shape[1])) for one in members]
    for _ in range(sweeps):
        for level, (of, one) in enumerate(zip(groups, members, strict=True)):
            left += told[level][of]
            told[level] = (one @ left) / one.sum(axis=1)
            left -= told[level][of]
    return float(np.square(left).sum()) / total


def measure(
    codes: Codes,
    raw_codes: Codes,
    codebook_size: int,
    content: NDArray,
    held_out: HeldOutPairs,
    item_vectors: NDArray,
    level_weights: Sequence[float],
) -> dict[str, float]:
    """The gate's figures of one table of published `codes` (N, L), whose items have the vectors (N, H)."""
    return {
        "target": agreement(codes, codebook_size, held_out, level_weights),
        "raw_collisions": colliding_share(raw_codes, content),
        "published_collisions": colliding_share(codes, content),
        "least_perplexity": least_perplexity(codes, codebook_size),
        "lift": level_lift(codes, held_out),
        "reconstruction": unexplained_variance(codes, item_vectors),
    }


def ranking_figures(
    judge: Callable[[Any, int], Mapping[str, float]], tables: Sequence[Any], seeds: Sequence[int]
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """NDCG@10, HR@50 and coverage of a quick recommender: means over `seeds` per table, and the standard errors of their difference.

    The deviation over seeds is pooled over the tables; with one seed nothing is known of the noise.
    """
    runs = [[judge(table, seed) for seed in seeds] for table in tables]
    noise: dict[str, float] = {}
    values = {name: np.array([[float(one[key]) for one in of] for of in runs]) for name, key in _RANKED.items()}
    figures = [{name: float(value[place].mean()) for name, value in values.items()} for place in range(len(tables))]
    if len(seeds) > 1:
        noise = {name: float(np.sqrt(value.var(axis=1, ddof=1).mean() * 2 / len(seeds))) for name, value in values.items()}
    return figures, noise


class Bootstrap(NamedTuple):
    """Paired over the held-out users: the share of draws in which the target gains, and standard errors of differences."""

    gain_share: float
    noise: dict[str, float]


def bootstrap(before: Codes, after: Codes, codebook_size: int, held_out: HeldOutPairs, config: GateConfig, seed: int) -> Bootstrap:
    """`config.draws` draws of the held-out users with replacement, the same for both tables of published codes."""
    users = int(held_out.users.max(initial=-1)) + 1
    if users == 0:
        return Bootstrap(0.0, {})
    draws = np.random.default_rng(seed).multinomial(users, np.full(users, 1 / users), size=config.draws)
    target = [agreement(codes, codebook_size, held_out, config.level_weights, draws) for codes in (before, after)]
    lift = [level_lift(codes, held_out, draws=draws) for codes in (before, after)]
    return Bootstrap(float((target[1] - target[0] > 0).mean()), {"lift": float(np.std(lift[1] - lift[0], ddof=1))})


def flip_rate_figures(before: NDArray, after: NDArray) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Flip rates of two tokenizers on the same noisily read items, (N,) bool each, and the standard error of their difference."""
    difference = after.astype(np.float64) - before
    noise = float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else 0.0
    return [{"flip_rate": float(one.mean())} for one in (before, after)], {"flip_rate": noise}


def decide(
    before: Mapping[str, float], after: Mapping[str, float], share: float, config: GateConfig, noise: Mapping[str, float] | None = None
) -> GateResult:
    """Compare figures of the same names. Accepted iff the target gains, in enough draws, and every guard keeps within its margin.

    Args:
        share: of the bootstrap draws in which the target gains.
        noise: figure -> standard error of its difference, where known.
    """
    gained = after["target"] > before["target"] and share >= config.confidence
    source = f"a gain in {config.confidence:.0%} of the draws over held-out users"
    rows = [GateRow("target", "target", before["target"], after["target"], 0.0, gained, source=source)]
    for metric, least, relative, better in (
        ("raw_collisions", config.raw_collisions, False, "lower"),
        ("published_collisions", config.published_collisions, False, "lower"),
        ("least_perplexity", config.least_perplexity, True, "higher"),
        ("lift", config.lift, True, "higher"),
        ("reconstruction", config.reconstruction, True, "lower"),
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
    """A verdict without figures: the run stopped before there was anything to compare."""
    return GateResult(accepted=False, reasons=[reason])
