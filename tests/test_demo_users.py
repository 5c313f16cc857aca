"""Demo users: the sequence model and its best achievable ranking, checked against hand calculations and simulation."""

import numpy as np
import pytest

from mmsid.catalog.demo import users
from mmsid.catalog.demo.facts import random_facts
from mmsid.catalog.demo.users import Interest, Sequences, UserModel


def _draw(items=200, num_users=400, seed=0):
    rng = np.random.default_rng(seed)
    model = users.draw_user_model([random_facts(rng) for _ in range(items)], num_users, rng)
    return model, users.draw_sequences(model, rng)


def _tiny_model() -> UserModel:
    """Three items, one user, two interests of weight 3/4 and 1/4 with appeals (6, 3, 1) and (1, 1, 8)."""
    interests = (Interest("picture", (("color", "red", 1.0),)), Interest("text", (("season", "summer", 1.0),)))
    appeal = np.array([[6.0, 3.0, 1.0], [1.0, 1.0, 8.0]])
    return UserModel(interests, appeal, appeal, np.array([[0, 1]]), np.array([[0.75, 0.25]]))


def test_predictive_distribution_of_three_items_by_hand():
    """The history is item 0. Posterior of interest 0: 3/4 * 6/10 against 1/4 * 1/10 -> 18/19 and 1/19. Prior of the next step (kept
    with .75, else drawn again): .75 * 18/19 + .25 * .75 and .75 * 1/19 + .25 * .25. Items 1 and 2 are unseen: (3/4, 1/4) and (1/9, 8/9)."""
    model = _tiny_model()
    history = Sequences(np.array([[0, 1]]), np.array([[0, 0]]), np.array([2]))
    belief = users.filter_active_slot(model, history, np.array([0]), np.array([1]))
    first, second = 0.75 * 18 / 19 + 0.25 * 0.75, 0.75 / 19 + 0.25 * 0.25
    np.testing.assert_allclose(belief.slot, [[first, second]])
    probability = users.predictive(model.appeal, model.members, belief)
    np.testing.assert_allclose(probability, [[0.0, first * 3 / 4 + second / 9, first / 4 + second * 8 / 9]])
    revealed = users.filter_active_slot(model, history, np.array([0]), np.array([1]), reveal_active=True)
    np.testing.assert_allclose(revealed.slot, [[0.75 + 0.25 * 0.75, 0.25 * 0.25]])


def test_expected_gains_by_hand(monkeypatch):
    monkeypatch.setattr(users, "CUTOFFS", (1, 2))
    probability = np.array([[0.5, 0.2, 0.3]])
    discount = 1 / np.log2(3)
    np.testing.assert_allclose(users.expected_gains(probability, probability), [[0.5, 0.8, 0.5, 0.5 + 0.3 * discount]])
    np.testing.assert_allclose(users.expected_gains(probability, np.array([[1.0, 3.0, 2.0]])), [[0.2, 0.5, 0.2, 0.2 + 0.3 * discount]])


def test_realised_gains_by_hand_with_ties_at_expectation(monkeypatch):
    monkeypatch.setattr(users, "CUTOFFS", (1, 2))
    scores = np.array([[0.1, 0.9, 0.5], [0.4, 0.4, 0.1]])
    discount = 1 / np.log2(3)
    gains = users.realised_gains(np.array([2, 0]), scores)
    np.testing.assert_allclose(gains, [[0, 1, 0, discount], [0.5, 1, 0.5, (1 + discount) / 2]])


def test_sequences_never_repeat_an_item_and_have_their_lengths():
    model, drawn = _draw()
    assert drawn.lengths.min() >= users.MIN_LENGTH
    assert abs(drawn.lengths.mean() - users.MEAN_LENGTH) < 0.5
    for row, active, length in zip(drawn.items, drawn.active, drawn.lengths, strict=True):
        assert len(set(row[:length])) == length and (row[:length] >= 0).all() and (row[length:] == -1).all()
        assert (active[:length] >= 0).all()
    assert (np.take_along_axis(model.weights, np.maximum(drawn.active, 0), axis=1)[drawn.active >= 0] > 0).all()


def test_draws_do_not_depend_on_how_users_are_chunked(monkeypatch):
    model, drawn = _draw()
    figures = users.best_achievable(model, drawn)
    monkeypatch.setattr(users, "_MAX_CELLS", 200 * 7)
    again_model, again = _draw()
    np.testing.assert_array_equal(drawn.items, again.items)
    assert users.best_achievable(again_model, again) == figures


def test_the_oracle_is_calibrated_and_beats_rankers_with_less_information():
    model, drawn = _draw(items=300, num_users=1500)
    for part in ("valid", "test"):
        figures = users.best_achievable(model, drawn)[part]
        for name, expected in figures["expected"].items():
            assert abs(figures["realised"][name] - expected) < 4 * figures["standard_error"][name] + 1e-3, (part, name)
            assert figures["knowing_active_interest"][name] >= expected - 0.005
            assert expected > figures["without_pictures"][name] > figures["one_ranking_for_all"][name] > 0


def test_best_achievable_ranking_of_one_user_by_hand():
    """At test, item 2 is the only unseen item. At valid, the probabilities are those of the first test of this file."""
    drawn = Sequences(np.array([[0, 1, 2]]), np.array([[0, 0, 0]]), np.array([3]))
    figures = users.best_achievable(_tiny_model(), drawn)
    first, second = 0.75 * 18 / 19 + 0.25 * 0.75, 0.75 / 19 + 0.25 * 0.25
    assert figures["test"]["expected"]["HR@1"] == 1.0
    assert figures["valid"]["expected"]["HR@1"] == pytest.approx(first * 3 / 4 + second / 9, abs=1e-4)
    assert figures["valid"]["realised"] == dict.fromkeys(figures["valid"]["realised"], 1.0)


def test_interest_kinds_have_their_documented_shares_and_fields():
    model, _ = _draw(items=600, num_users=3000)
    picture = {"color", "pattern", "brand", "price", "price_tier", "headline"}
    fields = {"picture": picture, "text": {"material", "season", "collection"}, "category": {"product", "group"}}
    for interest in model.interests:
        assert {field for field, _, _ in interest.conditions} <= fields[interest.kind]
    kinds = np.array([interest.kind for interest in model.interests])[model.members[:, 0]]
    for kind, share in users.KINDS.items():
        assert abs((kinds == kind).mean() - share) < 0.05
    assert all((model.members[u][:, None] == model.members[u]).sum() == 3 for u in range(50))
