"""Users of the demo catalogue: a generative model of interests and sequences whose best achievable ranking is known.

Users hold interests in item facts (`UserModel`), sequences follow a hidden Markov model over them (`draw_sequences`), and exact Bayesian
filtering gives the best achievable HR and NDCG (`best_achievable`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mmsid.catalog.demo.facts import CardFacts

KINDS = {"picture": 0.5, "category": 0.3, "text": 0.2}
POOL_SIZE = 60
CUTOFFS = (1, 5, 10, 20, 50)
STICKINESS = 0.75
POPULARITY_SPREAD = 0.8
FACT_WEIGHT = 2.0
BOTH = 3.0
GROUP_WEIGHT = 1.0
PRODUCT_WEIGHT = 6.0
MIN_LENGTH = 5
MEAN_LENGTH = 9
MIN_ITEMS = 60  # long histories would exhaust a smaller catalogue
_SHARES = np.array([3.0, 2.0, 1.0])
_FEWEST = 3  # items of a user that is ranked: one to train on, one to validate, one to test
_MAX_CELLS = 8_000_000  # users x items of one chunk
_TEMPLATES = {
    "picture": ((0.5, ("color", "pattern")), (0.3, ("brand", "price_tier")), (0.2, ("headline", "color"))),
    "text": ((0.6, ("material", "season")), (0.4, ("collection", "season"))),
}


@dataclass(frozen=True)
class Interest:
    """Interest of users in item facts.

    Attributes:
        kind: `picture`, `text` or `category`, the part of an item that contains the facts.
        conditions: (field, value, weight) of each fact. An item's match is the sum of the weights of the facts that it has.
        bonus: added to the match of an item that has all facts.
    """

    kind: str
    conditions: tuple[tuple[str, str, float], ...]
    bonus: float = 0.0

    def __str__(self) -> str:
        return " & ".join(f"{field}={value}" for field, value, _ in self.conditions)


@dataclass(frozen=True)
class UserModel:
    """True user model: U users, N items, P interests, J = 3 interest slots per user.

    The users share a pool of POOL_SIZE interests, so that co-engagement carries signal. Half of them are *picture* interests: two facts
    that no text contains (colour and pattern; brand and price tier; headline and colour). 30 % are *category* interests (a product, and
    with less weight its group), and 20 % *text* interests (material and season; collection and season). Every interest fits at least
    one item. Each user holds two or three of them, with weights in proportion 3 : 2 : 1. The appeal of item i to interest j is

        appeal_j(i) = popularity(i) * exp(match of i with j),

    where popularity is log-normal (POPULARITY_SPREAD) and independent of all facts. The match is FACT_WEIGHT per fact and BOTH more for
    both facts of a picture or text interest, PRODUCT_WEIGHT for the product and GROUP_WEIGHT for the group of a category interest.

    Attributes:
        interests: the pool of P interests.
        appeal: (P, N) positive.
        blind_appeal: (P, N), as `appeal`, with the matches of picture interests averaged over items.
        members: (U, J) int64, the interest of each slot.
        weights: (U, J), rows sum to 1, zero in unused slots.
    """

    interests: tuple[Interest, ...]
    appeal: np.ndarray
    blind_appeal: np.ndarray
    members: np.ndarray
    weights: np.ndarray


class Sequences(NamedTuple):
    """Drawn sequences.

    Attributes:
        items: (U, T) int64 item rows in time order, -1 after the end.
        active: (U, T) int64 active slot of each step, -1 after the end.
        lengths: (U,) int64.
    """

    items: np.ndarray
    active: np.ndarray
    lengths: np.ndarray


class Belief(NamedTuple):
    """State before the predicted step: `slot` (U, J) probabilities of the active slot, `unseen` (U, N) bool."""

    slot: np.ndarray
    unseen: np.ndarray


def draw_user_model(facts: Sequence[CardFacts], users: int, rng: np.random.Generator) -> UserModel:
    """Draw popularities, the pool of interests and the interests of each user."""
    popularity = np.exp(POPULARITY_SPREAD * rng.standard_normal(len(facts)))
    columns = _columns(facts)
    pool = _draw_pool(facts, rng)
    match = np.stack([_match(interest, columns) for interest in pool])
    appeal = popularity * np.exp(match)
    is_picture = np.array([interest.kind == "picture" for interest in pool])
    blind = np.where(is_picture[:, None], popularity * np.exp(match).mean(axis=1, keepdims=True), appeal)
    kind_of = np.array([interest.kind for interest in pool])
    probability = np.array([KINDS[kind] / (kind_of == kind).sum() for kind in kind_of])
    # the largest of log p + Gumbel noise: a weighted draw without replacement, for all users at once
    keys = np.log(probability) - np.log(-np.log(rng.random((users, len(pool)))))
    members = np.argsort(-keys, axis=1)[:, : len(_SHARES)].astype(np.int64)
    weights = np.tile(_SHARES, (users, 1))
    weights[rng.random(users) < 0.5, 2] = 0.0
    return UserModel(tuple(pool), appeal, blind, members, weights / weights.sum(axis=1, keepdims=True))


def _columns(facts: Sequence[CardFacts]) -> dict[str, np.ndarray]:
    fields = ("product", "color", "pattern", "brand", "headline", "price_tier", "material", "season", "collection")
    return {field: np.array([getattr(f, field) for f in facts]) for field in fields} | {"group": np.array([f.categories[1] for f in facts])}


def _match(interest: Interest, columns: dict[str, np.ndarray]) -> np.ndarray:
    hits = np.stack([columns[field] == value for field, value, _ in interest.conditions])
    weights = np.array([weight for _, _, weight in interest.conditions])
    return weights @ hits + interest.bonus * hits.all(axis=0)


def _draw_pool(facts: Sequence[CardFacts], rng: np.random.Generator) -> list[Interest]:
    pool: dict[Interest, None] = {}
    for kind, share in KINDS.items():
        count, tries = round(POOL_SIZE * share), 0
        drawn: dict[Interest, None] = {}
        while len(drawn) < count and tries < 50 * count:  # a tiny catalogue may not have this many distinct interests
            tries += 1
            anchor = facts[rng.integers(len(facts))]
            if kind == "category":
                conditions = (("product", anchor.product, PRODUCT_WEIGHT), ("group", anchor.categories[1], GROUP_WEIGHT))
                drawn[Interest(kind, conditions)] = None
                continue
            shares, templates = zip(*_TEMPLATES[kind])
            fields = templates[rng.choice(len(templates), p=shares)]
            drawn[Interest(kind, tuple((field, getattr(anchor, field), FACT_WEIGHT) for field in fields), BOTH)] = None
        pool |= drawn
    return list(pool)


def draw_sequences(model: UserModel, rng: np.random.Generator) -> Sequences:
    """Draw one sequence for every user.

    The length is MIN_LENGTH + Poisson(MEAN_LENGTH - MIN_LENGTH). At every step one slot is active. The first is drawn from the user's
    weights. Afterwards the active slot is kept with probability STICKINESS, and drawn again from the weights otherwise. The item is
    drawn from the unseen items in proportion to its appeal to the active interest, so no item occurs twice.
    """
    users, num_items = len(model.members), model.appeal.shape[1]
    lengths = np.minimum(MIN_LENGTH + rng.poisson(MEAN_LENGTH - MIN_LENGTH, users), num_items // 2)
    steps = int(lengths.max(initial=0))
    redraw, which, dice = rng.random((3, users, steps))
    items, active = np.full((2, users, steps), -1, dtype=np.int64)
    slots = np.zeros((users, steps), dtype=np.int64)
    cumulative = model.weights.cumsum(axis=1)
    for t in range(steps):
        fresh = (which[:, t, None] >= cumulative[:, :-1]).sum(axis=1)
        slots[:, t] = fresh if t == 0 else np.where(redraw[:, t] < STICKINESS, slots[:, t - 1], fresh)
    for rows in _chunks(users, num_items):
        unseen = np.ones((len(rows), num_items), dtype=bool)
        for t in range(steps):
            live = np.flatnonzero(lengths[rows] > t)
            who = rows[live]
            mass = np.cumsum(model.appeal[model.members[who, slots[who, t]]] * unseen[live], axis=1)
            # strictly above the threshold, so that a seen item, which adds no mass, is never drawn
            drawn = (mass > dice[who, t, None] * mass[:, -1:]).argmax(axis=1)
            items[who, t], active[who, t] = drawn, slots[who, t]
            unseen[live, drawn] = False
    return Sequences(items, active, lengths)


def _chunks(users: int, num_items: int) -> list[np.ndarray]:
    size = max(1, _MAX_CELLS // max(num_items, 1))
    return [np.arange(start, min(start + size, users)) for start in range(0, users, size)]


def filter_active_slot(model: UserModel, sequences: Sequences, rows: np.ndarray, ends: np.ndarray, reveal_active: bool = False) -> Belief:
    """Forward filtering of the active slot: the belief before step `ends[n]` of user `rows[n]`, given the items before that step.

    posterior(j) ~ prior(j) * appeal_j(item) / (sum of appeal_j over the items unseen at that step)
    next prior(j) = STICKINESS * posterior(j) + (1 - STICKINESS) * weight(j)

    With `reveal_active` the posterior is 1 for the slot that was active.
    """
    members, weights = model.members[rows], model.weights[rows]
    slot, mass = weights.copy(), model.appeal.sum(axis=1)[members]
    unseen = np.ones((len(rows), model.appeal.shape[1]), dtype=bool)
    for t in range(int(ends.max(initial=0))):
        live = np.flatnonzero(ends > t)
        item, who = sequences.items[rows[live], t], members[live]
        appeal = model.appeal[who, item[:, None]]
        posterior = slot[live] * appeal / mass[live]
        if reveal_active:
            posterior = np.eye(members.shape[1])[sequences.active[rows[live], t]]
        posterior /= posterior.sum(axis=1, keepdims=True)
        slot[live] = STICKINESS * posterior + (1 - STICKINESS) * weights[live]
        mass[live] -= appeal
        unseen[live, item] = False
    return Belief(slot, unseen)


def predictive(appeal: np.ndarray, members: np.ndarray, belief: Belief) -> np.ndarray:
    """Probability of the next item, (U, N), rows sum to 1: the mixture over slots of appeal normalised over the unseen items.

    Args:
        appeal: (P, N).
        members: (U, J).
        belief: of the same users.
    """
    result = np.zeros(belief.unseen.shape)
    for j in range(members.shape[1]):
        part = appeal[members[:, j]] * belief.unseen
        result += part * (belief.slot[:, j] / part.sum(axis=1))[:, None]
    return result


def expected_gains(probability: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Expected HR and NDCG of a ranking by `scores` when the next item is drawn from `probability`; both (U, N).

    With p(r) the probability of the item at rank r: HR@K = sum over r <= K of p(r), and NDCG@K = sum over r <= K of p(r) / log2(r + 1),
    for one relevant item. Seen items must have probability 0 and scores that do not exceed those of unseen items.

    Returns:
        (U, 2 * len(CUTOFFS)): HR at each cutoff, then NDCG at each.
    """
    depth = min(max(CUTOFFS), probability.shape[1])
    top = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
    top = np.take_along_axis(top, np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1, kind="stable"), axis=1)
    gains = np.take_along_axis(probability, top, axis=1)
    cuts = [min(k, depth) - 1 for k in CUTOFFS]
    return np.concatenate([gains.cumsum(axis=1)[:, cuts], (gains * _discounts(depth)).cumsum(axis=1)[:, cuts]], axis=1)


def realised_gains(target: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """HR and NDCG of a ranking by `scores` (U, N) on the drawn items `target` (U,). Ties get their expected gain.

    Returns:
        (U, 2 * len(CUTOFFS)), as `expected_gains`.
    """
    own = np.take_along_axis(scores, target[:, None], axis=1)
    above, tied = (scores > own).sum(axis=1), (scores == own).sum(axis=1)
    total = np.concatenate([[0.0], _discounts(max(CUTOFFS)).cumsum()])
    hits, gains = [], []
    for k in CUTOFFS:
        hits.append(np.clip((k - above) / tied, 0, 1))
        gains.append((total[np.minimum(above + tied, k)] - total[np.minimum(above, k)]) / tied)
    return np.stack(hits + gains, axis=1)


def _discounts(depth: int) -> np.ndarray:
    return 1 / np.log2(np.arange(depth) + 2)


def best_achievable(model: UserModel, sequences: Sequences, known: np.ndarray | None = None) -> dict[str, dict]:
    """Best achievable ranking figures at the last item (test) and the second last item (valid) of every user.

    Args:
        known: (N,) bool, the items that can be recommended; default: all. The targets are then the last two of them in each sequence.
            The oracle sees the other items in the histories, so its figures remain an upper bound. Users with fewer than three are
            left out.

    The oracle knows the model, every item's facts and popularity, and each user's interests, weights and history, but not the active
    slot. It filters the slot exactly and ranks unseen items by p(next item | interests, history). Given these, the next item is
    independent of everything else that a recommender could use. The true conditional probability maximises the expectation of
    every metric that decreases with rank, so no recommender exceeds the `expected` figures in expectation.

    Returns:
        {"valid" | "test": {ranker: {"HR@1": ..., ..., "NDCG@50": ...}}} with the rankers
        `expected`: the oracle in expectation, exact.
        `realised`: the same ranking on the drawn items.
        `standard_error`: of `realised` about `expected`.
        `knowing_active_interest`: expected, for an oracle that also knows the last active slot. No recommender reaches it.
        `without_pictures`: expected, for the oracle with the picture facts of items averaged.
        `one_ranking_for_all`: expected, for the best ranking common to all users (seen items masked), an upper bound for popularity.
    """
    num_items = model.appeal.shape[1]
    known = np.ones(num_items, dtype=bool) if known is None else np.asarray(known, dtype=bool)
    counted = known[sequences.items] & (sequences.items >= 0)
    ranked = np.flatnonzero(counted.sum(axis=1) >= _FEWEST)
    users = len(ranked)
    figures = {}
    for part, offset in (("valid", 2), ("test", 1)):
        ends = (counted & (counted[:, ::-1].cumsum(axis=1)[:, ::-1] == offset)).argmax(axis=1)
        parts: dict[str, list[np.ndarray]] = {}
        overall = np.zeros(num_items)
        for chunk in _chunks(users, num_items):
            rows = ranked[chunk]
            belief = filter_active_slot(model, sequences, rows, ends[rows])
            overall += predictive(model.appeal, model.members[rows], belief._replace(unseen=np.ones_like(belief.unseen))).sum(axis=0)
        for chunk in _chunks(users, num_items):
            rows = ranked[chunk]
            members, target = model.members[rows], sequences.items[rows, ends[rows]]
            belief, revealed = (
                found._replace(unseen=found.unseen & known)
                for found in (filter_active_slot(model, sequences, rows, ends[rows], reveal_active=each) for each in (False, True))
            )
            probability, given_active = predictive(model.appeal, members, belief), predictive(model.appeal, members, revealed)
            gains = {
                "expected": expected_gains(probability, probability),
                "realised": realised_gains(target, probability),
                "knowing_active_interest": expected_gains(given_active, given_active),
                "without_pictures": expected_gains(probability, predictive(model.blind_appeal, members, belief)),
                "one_ranking_for_all": expected_gains(probability, overall * belief.unseen),
            }
            for ranker, values in gains.items():
                parts.setdefault(ranker, []).append(values)
        merged = {ranker: np.concatenate(values) for ranker, values in parts.items()}
        figures[part] = {ranker: _named(values.mean(axis=0)) for ranker, values in merged.items()}
        figures[part]["standard_error"] = _named((merged["realised"] - merged["expected"]).std(axis=0) / np.sqrt(users))
    return figures


def _named(figures: np.ndarray) -> dict[str, float]:
    names = [f"{metric}@{k}" for metric in ("HR", "NDCG") for k in CUTOFFS]
    return {name: round(float(value), 4) for name, value in zip(names, figures, strict=True)}
