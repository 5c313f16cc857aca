"""The users of the demo catalogue: a generative model whose best achievable ranking is known.

**Interests.** There is a pool of 60 interests, shared by all users (so co-engagement carries signal). Half are *picture* interests: a
conjunction of two facts that stand nowhere in the text (colour and pattern; brand and price tier; headline and colour). 30 % are
*category* interests (a product, and weakly its group), 20 % *text* interests (material and season; collection and season).
Every interest fits at least one item. Each user holds two or three of them, with weights in proportion 3 : 2 : 1.

**Sequences.** A user's length is 5 + Poisson(4). At every step one interest is *active*: the first is drawn from the user's weights;
afterwards the active one stays with probability `STICKINESS`, else it is drawn anew from the weights. With active interest j the next
item is drawn from the unseen items in proportion to

    appeal_j(i) = popularity(i) * exp(match of i with j),

where a picture or text interest gives FACT_WEIGHT for each of its facts that i has and BOTH more if it has both, a category interest
PRODUCT_WEIGHT for the product and GROUP_WEIGHT for the group; popularity is log-normal (`POPULARITY_SPREAD`) and independent of all
facts. No item comes twice.

**The optimum.** The oracle knows the model (pool, popularities, every item's facts), the user's interests and weights, and the user's
true history; it does not know which interest was active. It filters the active interest by Bayes' rule (a hidden Markov chain of at
most three states whose emission normalisers depend only on the known history, so this is exact) and ranks unseen items by
p(next | interests, history). Given model, interests and history, the next item is independent of all else that a recommender could
see: other users' sequences add nothing, nor do pictures and texts. Ranking by the true conditional probability maximises the expected
gain of every metric that falls with rank, and conditioning on less cannot raise that maximum. Hence no recommender beats the
*expected* HR and NDCG of the oracle; on one draw of the test items it may, by chance, by about the reported standard error.
`knowing_active_interest` is the (higher, unreachable) figure of an oracle that is also told which interest was active last.
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
MIN_ITEMS = 60  # fewer, and long histories would exhaust the catalogue
_SHARES = np.array([3.0, 2.0, 1.0])
_CELLS = 8_000_000  # users x items held at once
_TEMPLATES = {
    "picture": ((0.5, ("color", "pattern")), (0.3, ("brand", "price_tier")), (0.2, ("headline", "color"))),
    "text": ((0.6, ("material", "season")), (0.4, ("collection", "season"))),
}


@dataclass(frozen=True)
class Interest:
    """What draws a user: `kind` names where its facts can be seen, `wants` holds (field, value, weight), `bonus` counts if all hold."""

    kind: str
    wants: tuple[tuple[str, str, float], ...]
    bonus: float = 0.0

    def __str__(self) -> str:
        return " & ".join(f"{field}={value}" for field, value, _ in self.wants)


@dataclass(frozen=True)
class UserModel:
    """The true model. U users, N items, P interests, J = 3 slots a user.

    appeal: (P, N) positive; blind_appeal: the same with picture interests averaged over items; popularity: (N,);
    members: (U, J) int64 interest of each slot; weights: (U, J), rows sum to 1, zero in unused slots.
    """

    interests: tuple[Interest, ...]
    appeal: np.ndarray
    blind_appeal: np.ndarray
    popularity: np.ndarray
    members: np.ndarray
    weights: np.ndarray


class Sequences(NamedTuple):
    """items: (U, T) int64 item rows in time order, -1 after the end; active: (U, T) slot that drew each, -1; lengths: (U,)."""

    items: np.ndarray
    active: np.ndarray
    lengths: np.ndarray


class Belief(NamedTuple):
    """Before the predicted step: slot (U, J) probabilities of the active slot; unseen (U, N) bool."""

    slot: np.ndarray
    unseen: np.ndarray


def draw_user_model(facts: Sequence[CardFacts], users: int, rng: np.random.Generator) -> UserModel:
    """Draw popularities, the pool of interests and each user's share of it."""
    popularity = np.exp(POPULARITY_SPREAD * rng.standard_normal(len(facts)))
    columns = _columns(facts)
    pool = _draw_pool(facts, rng)
    match = np.stack([_match(interest, columns) for interest in pool])
    appeal = popularity * np.exp(match)
    is_picture = np.array([interest.kind == "picture" for interest in pool])
    blind = np.where(is_picture[:, None], popularity * np.exp(match).mean(axis=1, keepdims=True), appeal)
    kind_of = np.array([interest.kind for interest in pool])
    probability = np.array([KINDS[kind] / (kind_of == kind).sum() for kind in kind_of])
    # The largest of log p + Gumbel noise: a weighted draw without replacement, for all users at once.
    keys = np.log(probability) - np.log(-np.log(rng.random((users, len(pool)))))
    members = np.argsort(-keys, axis=1)[:, : len(_SHARES)].astype(np.int64)
    weights = np.tile(_SHARES, (users, 1))
    weights[rng.random(users) < 0.5, 2] = 0.0
    return UserModel(tuple(pool), appeal, blind, popularity, members, weights / weights.sum(axis=1, keepdims=True))


def _columns(facts: Sequence[CardFacts]) -> dict[str, np.ndarray]:
    fields = ("product", "color", "pattern", "brand", "headline", "price_tier", "material", "season", "collection")
    return {field: np.array([getattr(f, field) for f in facts]) for field in fields} | {"group": np.array([f.categories[1] for f in facts])}


def _match(interest: Interest, columns: dict[str, np.ndarray]) -> np.ndarray:
    hits = np.stack([columns[field] == value for field, value, _ in interest.wants])
    weights = np.array([weight for _, _, weight in interest.wants])
    return weights @ hits + interest.bonus * hits.all(axis=0)


def _draw_pool(facts: Sequence[CardFacts], rng: np.random.Generator) -> list[Interest]:
    pool: dict[Interest, None] = {}
    for kind, share in KINDS.items():
        wanted, tries = round(POOL_SIZE * share), 0
        drawn: dict[Interest, None] = {}
        while len(drawn) < wanted and tries < 50 * wanted:  # a tiny catalogue may not hold that many different ones
            tries += 1
            anchor = facts[rng.integers(len(facts))]
            if kind == "category":
                wants = (("product", anchor.product, PRODUCT_WEIGHT), ("group", anchor.categories[1], GROUP_WEIGHT))
                drawn[Interest(kind, wants)] = None
                continue
            shares, templates = zip(*_TEMPLATES[kind])
            fields = templates[rng.choice(len(templates), p=shares)]
            drawn[Interest(kind, tuple((field, getattr(anchor, field), FACT_WEIGHT) for field in fields), BOTH)] = None
        pool |= drawn
    return list(pool)


def draw_sequences(model: UserModel, rng: np.random.Generator) -> Sequences:
    """Draw one sequence for every user from the model in the module's docstring."""
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
            # Strictly above the threshold: a seen item adds no mass, so it is never the first to pass.
            drawn = (mass > dice[who, t, None] * mass[:, -1:]).argmax(axis=1)
            items[who, t], active[who, t] = drawn, slots[who, t]
            unseen[live, drawn] = False
    return Sequences(items, active, lengths)


def _chunks(users: int, num_items: int) -> list[np.ndarray]:
    size = max(1, _CELLS // max(num_items, 1))
    return [np.arange(start, min(start + size, users)) for start in range(0, users, size)]


def believe(model: UserModel, sequences: Sequences, rows: np.ndarray, ends: np.ndarray, known_active: bool = False) -> Belief:
    """What the oracle believes before step `ends[n]` of user `rows[n]`, from the items before it.

    Forward filtering: posterior(j) ~ prior(j) * appeal_j(item) / (mass of appeal_j on the items unseen then), and next prior(j) =
    STICKINESS * posterior(j) + (1 - STICKINESS) * weight(j). With `known_active` the posterior is the truth instead.
    """
    members, weights = model.members[rows], model.weights[rows]
    slot, mass = weights.copy(), model.appeal.sum(axis=1)[members]
    unseen = np.ones((len(rows), model.appeal.shape[1]), dtype=bool)
    for t in range(int(ends.max(initial=0))):
        live = np.flatnonzero(ends > t)
        item, who = sequences.items[rows[live], t], members[live]
        appeal = model.appeal[who, item[:, None]]
        posterior = slot[live] * appeal / mass[live]
        if known_active:
            posterior = np.eye(members.shape[1])[sequences.active[rows[live], t]]
        posterior /= posterior.sum(axis=1, keepdims=True)
        slot[live] = STICKINESS * posterior + (1 - STICKINESS) * weights[live]
        mass[live] -= appeal
        unseen[live, item] = False
    return Belief(slot, unseen)


def predictive(appeal: np.ndarray, members: np.ndarray, belief: Belief) -> np.ndarray:
    """p(next item), (U, N), rows sum to 1: the mixture over slots of appeal normalised over the unseen items.

    appeal: (P, N); members: (U, J); belief: of the same users.
    """
    result = np.zeros(belief.unseen.shape)
    for j in range(members.shape[1]):
        part = appeal[members[:, j]] * belief.unseen
        result += part * (belief.slot[:, j] / part.sum(axis=1))[:, None]
    return result


def expected_gains(truth: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Expected HR and NDCG of ranking by `scores` when the next item is drawn from `truth`; both (U, N).

    With r items in rank order: HR@K = sum over r <= K of truth(r); NDCG@K = sum over r <= K of truth(r) / log2(r + 1), for one
    relevant item. Seen items must have truth 0 and scores no higher than any unseen item's.

    Returns:
        (U, 2 * len(CUTOFFS)): HR at each cutoff, then NDCG at each.
    """
    depth = min(max(CUTOFFS), truth.shape[1])
    top = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
    top = np.take_along_axis(top, np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1, kind="stable"), axis=1)
    gains = np.take_along_axis(truth, top, axis=1)
    cuts = [min(k, depth) - 1 for k in CUTOFFS]
    return np.concatenate([gains.cumsum(axis=1)[:, cuts], (gains * _discounts(depth)).cumsum(axis=1)[:, cuts]], axis=1)


def realised_gains(target: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """HR and NDCG of ranking by `scores` (U, N) on the drawn items `target` (U,); ties count at their expectation. As `expected_gains`."""
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


def best_achievable(model: UserModel, sequences: Sequences) -> dict[str, dict]:
    """Best achievable ranking, and floors, at the last item (test) and the last but one (valid) of every user.

    Returns:
        {"valid" | "test": {ranker: {"HR@1": ..., ..., "NDCG@50": ...}}} with the rankers: `expected` (the oracle of the module's
        docstring, exact), `realised` (the same ranking on the items that were drawn), `standard_error` (of `realised` about
        `expected`), `knowing_active_interest` (expected), `without_pictures` (expected: the oracle's belief, but picture facts of items
        replaced by their average), `one_ranking_for_all` (expected: the best ranking that is the same for all users, seen
        items masked: what popularity could reach at most).
    """
    users, num_items = len(model.members), model.appeal.shape[1]
    report = {}
    for name, back in (("valid", 2), ("test", 1)):
        ends = sequences.lengths - back
        parts: dict[str, list[np.ndarray]] = {}
        overall = np.zeros(num_items)
        for rows in _chunks(users, num_items):
            belief = believe(model, sequences, rows, ends[rows])
            overall += predictive(model.appeal, model.members[rows], belief._replace(unseen=np.ones_like(belief.unseen))).sum(axis=0)
        for rows in _chunks(users, num_items):
            members, target = model.members[rows], sequences.items[rows, ends[rows]]
            belief = believe(model, sequences, rows, ends[rows])
            told = believe(model, sequences, rows, ends[rows], known_active=True)
            truth, truth_known = predictive(model.appeal, members, belief), predictive(model.appeal, members, told)
            gains = {
                "expected": expected_gains(truth, truth),
                "realised": realised_gains(target, truth),
                "knowing_active_interest": expected_gains(truth_known, truth_known),
                "without_pictures": expected_gains(truth, predictive(model.blind_appeal, members, belief)),
                "one_ranking_for_all": expected_gains(truth, overall * belief.unseen),
            }
            for ranker, values in gains.items():
                parts.setdefault(ranker, []).append(values)
        merged = {ranker: np.concatenate(values) for ranker, values in parts.items()}
        report[name] = {ranker: _named(values.mean(axis=0)) for ranker, values in merged.items()}
        report[name]["standard_error"] = _named((merged["realised"] - merged["expected"]).std(axis=0) / np.sqrt(users))
    return report


def _named(figures: np.ndarray) -> dict[str, float]:
    names = [f"{metric}@{k}" for metric in ("HR", "NDCG") for k in CUTOFFS]
    return {name: round(float(value), 4) for name, value in zip(names, figures, strict=True)}
