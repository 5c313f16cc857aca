"""The acceptance gate accepts a real gain and refuses reward hacking: scrambled, collapsed and merely unique codes."""

import numpy as np
import pytest

from mmsid.refine import gate
from mmsid.refine.gate import GateConfig, HeldOutPairs


def _world(seed: int = 0, clusters: int = 8, per: int = 12, users: int = 60):
    rng = np.random.default_rng(seed)
    items = clusters * per
    cluster = np.arange(items) // per
    codes = np.stack([cluster, np.arange(items) % 4, np.arange(items) % per], axis=1)
    histories = [rng.permutation(np.flatnonzero(cluster == rng.integers(clusters)))[:6] for _ in range(users)]
    blurred = codes.copy()  # the start: a third of the items have the code of another cluster
    wrong = rng.permutation(items)[: items // 3]
    blurred[wrong, 0] = (blurred[wrong, 0] + 1 + rng.integers(clusters - 1, size=len(wrong))) % clusters
    blurred[:, 2] = np.arange(items) % 96
    codes = codes.copy()
    codes[:, 2] = np.arange(items) % 96
    return codes, blurred, HeldOutPairs.from_histories(histories), rng


def _judge(before, after, held_out, raw=None, **figures):
    content, config = np.arange(len(before)), GateConfig()
    both = (before, before), (after, figures.get("as_new", after))
    rows = []
    for (codes, as_new), raw_codes in zip(both, (before, after if raw is None else raw), strict=True):
        rows.append(gate.measure(codes, raw_codes, 96, content, held_out, as_new, config.level_weights))
    if "quick" in figures:
        ranked, _ = gate.ranking_figures(lambda codes, seed: figures["quick"](codes), (before, after), [0])
        rows = [row | more for row, more in zip(rows, ranked, strict=True)]
    share, _ = gate.bootstrap(*both, 96, held_out, config, seed=0)
    return gate.decide(*rows, share, config)


def test_a_real_gain_is_accepted():
    good, blurred, held_out, _ = _world()
    verdict = _judge(blurred, good, held_out)
    assert verdict.accepted and not verdict.reasons and verdict.gain_share == 1.0
    assert {row.metric for row in verdict.rows} == {
        *("target", "raw_collisions", "published_collisions", "least_perplexity", "lift", "new_items")
    }


def test_no_change_and_scrambling_are_refused():
    good, blurred, held_out, rng = _world()
    assert not _judge(blurred, blurred, held_out).accepted
    scrambled = _judge(blurred, good[rng.permutation(len(good))], held_out)
    assert not scrambled.accepted and any(reason.startswith("lift") for reason in scrambled.reasons)


def test_total_collapse_is_refused_on_every_count():
    good, blurred, held_out, _ = _world()
    collapsed = np.zeros_like(good)
    verdict = _judge(blurred, collapsed, held_out)
    assert gate.agreement(collapsed, 96, held_out, (0.6, 0.4)) == pytest.approx(0.0)
    failed = {row.metric for row in verdict.rows if not row.passed}
    assert failed == {"target", "raw_collisions", "published_collisions", "least_perplexity", "lift", "new_items"}


def test_unique_random_codes_are_refused():
    good, _, held_out, rng = _world()
    start = good.copy()
    start[:20] = start[20:40]  # many collisions; the "refined" table is perfectly unique, and random
    unique = np.stack([rng.permutation(len(good)) % 8, rng.permutation(len(good)) % 4, rng.permutation(len(good))], axis=1)
    verdict = _judge(start, unique, held_out)
    assert not verdict.accepted and {row.metric for row in verdict.rows if not row.passed} >= {"target", "lift"}


def test_every_guard_can_refuse_a_better_target():
    good, blurred, held_out, _ = _world()
    crowded = good.copy()
    crowded[: round(0.7 * len(good))] = crowded[0]
    assert [reason.split()[0] for reason in _judge(blurred, good, held_out, raw=crowded).reasons] == ["raw_collisions"]
    arbitrary = good[np.roll(np.arange(len(good)), 12)]
    assert [reason.split()[0] for reason in _judge(blurred, good, held_out, as_new=arbitrary).reasons] == ["new_items"]
    thin = _judge(blurred, good, held_out, quick=lambda codes: {"NDCG@10": 0.3, "HR@50": 0.5 if codes is good else 0.6, "coverage@10": 0.9})
    assert [reason.split()[0] for reason in thin.reasons] == ["hit_rate"]
    narrow = _judge(
        blurred, good, held_out, quick=lambda codes: {"NDCG@10": 0.3, "HR@50": 0.6, "coverage@10": 0.5 if codes is good else 0.9}
    )
    assert [reason.split()[0] for reason in narrow.reasons] == ["coverage"]
    low = _judge(blurred, good, held_out, quick=lambda codes: {"NDCG@10": 0.2 if codes is good else 0.3, "HR@50": 0.6, "coverage@10": 0.9})
    assert [reason.split()[0] for reason in low.reasons] == ["ndcg"], "as many hits, ranked lower"


def test_figures_by_hand():
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 0]])
    held_out = HeldOutPairs.from_histories([np.array([0, 1, 2]), np.array([3]), np.array([2, 2, 3])])
    assert held_out.pairs.tolist() == [[0, 1], [1, 2], [2, 3]] and held_out.users.tolist() == [0, 0, 2]
    # level 1: 2 of 3 pairs agree; pair ends 3 under code 0 and 3 under code 1: chance 1/4 + 1/4
    assert gate.agreement(codes, 2, held_out, (1.0,)) == pytest.approx(2 / 3 - 1 / 2)
    assert gate.level_lift(codes, held_out) == pytest.approx((2 / 3) / (4 / 12))
    assert gate.colliding_share(codes, np.array([0, 1, 2, 3])) == 0.5
    assert gate.colliding_share(codes, np.array([0, 1, 2, 2])) == 0.0
    assert gate.least_perplexity(codes, 2) == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))
    draws = np.array([[1, 0, 0], [0, 0, 1]])
    assert gate.agreement(codes, 2, held_out, (1.0,), draws).tolist() == pytest.approx([1 / 2 - (9 + 1) / 16, 1 - 1])


def test_agreement_of_new_items_by_hand():
    codes, as_new = np.array([[0], [0], [1]]), np.array([[0], [2], [1]])
    held_out = HeldOutPairs.from_histories([np.array([0, 1]), np.array([1, 2, 1])])
    # pairs (0, 1), (1, 2), (2, 1). New second end: 0 = 2, 0 = 1, 1 = 2; new first end: 0 = 0, 2 = 1, 1 = 0: one of six agrees.
    # Ends: known codes 0, 1 are 4 and 2 of 6; new codes 0, 2, 1 are 1, 3 and 2 of 6
    assert gate.agreement(codes, 3, held_out, (1.0,), as_new=as_new) == pytest.approx(1 / 6 - (4 * 1 + 2 * 2) / 36)
    draws = np.array([[1, 0], [0, 1]])
    assert gate.agreement(codes, 3, held_out, (1.0,), draws, as_new).tolist() == pytest.approx([1 / 2 - 2 / 4, 0 - (2 * 2) / 16])
    assert gate.agreement(codes, 3, held_out, (1.0,), as_new=codes) == gate.agreement(codes, 3, held_out, (1.0,))


def test_margins_grow_with_noise_and_name_their_source():
    before = {"target": 0.1, "lift": 4.0, "hit_rate": 0.5, "coverage": 0.8, "least_perplexity": 30.0, "raw_collisions": 0.1,
              "published_collisions": 0.0, "flip_rate": 0.1}  # fmt: skip
    after = before | {"target": 0.2, "hit_rate": 0.47}
    config = GateConfig(standard_errors=2.0)
    refused = gate.decide(before, after, 1.0, config)
    assert refused.reasons == ["hit_rate 0.5 -> 0.47, beyond the margin of 0.015 (3% of the figure before)"]
    accepted = gate.decide(before, after, 1.0, config, {"hit_rate": 0.02, "lift": 0.01})
    assert accepted.accepted
    margins = {row.metric: (row.margin, row.source) for row in accepted.rows}
    assert margins["hit_rate"] == (0.04, "2 standard errors of the difference")
    assert margins["lift"] == (pytest.approx(0.12), "3% of the figure before")
    assert margins["flip_rate"] == (0.02, "0.02, absolute")


def test_noise_of_seeds_users_and_items_by_hand():
    scores = {("a", 0): 0.4, ("a", 1): 0.6, ("b", 0): 0.5, ("b", 1): 0.5}
    figures, noise = gate.ranking_figures(
        lambda table, seed: {"NDCG@10": 1.0, "HR@50": scores[table, seed], "coverage@10": 1.0}, "ab", [0, 1]
    )
    assert [one["hit_rate"] for one in figures] == pytest.approx([0.5, 0.5])
    assert noise == pytest.approx(
        {"ndcg": 0.0, "hit_rate": np.sqrt((0.02 + 0) / 2 * 2 / 2), "coverage": 0.0}
    )  # variances .02 and 0, pooled
    assert gate.ranking_figures(lambda table, seed: {"NDCG@10": 1, "HR@50": 1, "coverage@10": 1}, "ab", [0])[1] == {}
    before, after = np.array([True, False, False, False]), np.array([True, True, False, False])
    figures, noise = gate.flip_rate_figures(before, after)
    assert figures == [{"flip_rate": 0.25}, {"flip_rate": 0.5}]
    assert noise["flip_rate"] == pytest.approx(np.std([0, 1, 0, 0], ddof=1) / 2)
    good, blurred, held_out, _ = _world()
    drawn = gate.bootstrap((blurred, blurred), (good, good), 96, held_out, GateConfig(draws=400), seed=0)
    assert 0 < drawn.noise["lift"] < gate.level_lift(good, held_out) / 4
    assert gate.bootstrap((good, good), (good, good), 96, held_out, GateConfig(), seed=0) == (0.0, {"lift": 0.0, "new_items": 0.0})
    ones = np.ones((2, int(held_out.users.max()) + 1), dtype=int)
    assert gate.level_lift(good, held_out, draws=ones).tolist() == pytest.approx([gate.level_lift(good, held_out)] * 2)


def test_without_held_out_users_nothing_is_accepted():
    good, blurred, _, _ = _world()
    assert not _judge(blurred, good, HeldOutPairs.from_histories([])).accepted
    assert gate.refused("why").to_json() == {"accepted": False, "reasons": ["why"], "rows": [], "gain_share": None}
