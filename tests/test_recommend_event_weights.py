"""Event weights in the losses of the recommenders: each item's term is multiplied by its event, and rare conversions outweigh clicks."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmsid.catalog.splits import Split
from mmsid.recommend.classical import item_counts, item_similarity
from mmsid.recommend.flat import FlatShape
from mmsid.recommend.history_encoder import pad_histories, pad_weights
from mmsid.recommend.paths import item_paths
from mmsid.recommend.sasrec import Sasrec, SasrecShape
from mmsid.recommend.sid_transformer import SidTransformerShape
from mmsid.recommend.tiger import TigerShape
from mmsid.recommend.training import Schedule, build, fit

SIZES = {"d_model": 16, "heads": 2, "layers": 1, "dropout": 0.0, "max_history": 4}
SHAPES = {kind.__name__: kind(**SIZES, hidden=16) for kind in (SidTransformerShape, FlatShape, TigerShape)}
PATHS = item_paths(np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]]), None, (3, 2))


def model(name: str):
    torch.manual_seed(0)
    return (Sasrec(5, SasrecShape(**SIZES)) if name == "Sasrec" else build(PATHS, SHAPES[name])).eval()


@pytest.mark.parametrize("name", [*SHAPES, "Sasrec"])
@torch.no_grad()
def test_the_loss_is_the_sum_of_the_items_terms_times_their_weights(name):
    network, histories = model(name), torch.tensor([[0, 1, 2], [3, 4, -1]])
    terms = torch.zeros(2, 3)
    for row, column in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        alone = torch.zeros(2, 3)
        alone[row, column] = 1.0
        terms[row, column] = network(histories, alone)
    assert terms[0].gt(0).all() and torch.isclose(terms.sum(), network(histories), rtol=1e-5)
    weights = torch.tensor([[1.0, 2.5, 0.5], [4.0, 1.0, 0.0]])
    assert torch.isclose(network(histories, weights), (terms * weights).sum(), rtol=1e-5)


def test_weights_are_cut_and_padded_like_their_histories():
    histories, weights = [np.array([4, 5, 6]), np.array([7])], [np.array([1.0, 2.5, 3.0]), np.array([0.5])]
    assert pad_histories(histories, 2).tolist() == [[5, 6], [7, -1]]
    assert pad_weights(weights, 2).tolist() == [[2.5, 3.0], [0.5, 0.0]]
    assert pad_weights([], 2).shape == pad_histories([], 2).shape


def conflict(weight: float | None) -> Split:
    """Item 0 is followed by item 1 for three users and by item 2, with `weight`, for the fourth. A fifth user has the other items."""
    train = [np.array([0, 1])] * 3 + [np.array([0, 2]), np.array([3, 4])]
    weights = None if weight is None else [np.ones(2)] * 3 + [np.array([1.0, weight]), np.ones(2)]
    targets = np.full(5, 3)
    return Split(train, targets, targets, train, np.zeros(5, bool), weights, *([np.ones(5)] * 2 if weight else [None] * 2))


def test_a_recommender_prefers_the_item_of_greater_weight(monkeypatch):
    epochs = count()  # a valid metric that rises, so that the weights of the last epoch are kept
    rising = SimpleNamespace(summary=lambda: {"NDCG@10": float(next(epochs))})
    monkeypatch.setattr("mmsid.recommend.training.evaluate", lambda *arguments: rising)
    preferred = {}
    for weight in (None, 1.0, 9.0):
        schedule = Schedule(epochs=25, batch_size=4, patience=25, lr=0.02)
        fitted = fit(PATHS, conflict(weight), shape=SHAPES["SidTransformerShape"], schedule=schedule)
        preferred[weight] = fitted.score([np.array([0])])[0]
    assert torch.allclose(preferred[1.0], preferred[None], atol=1e-5)
    assert preferred[None][1] > preferred[None][2] and preferred[9.0][2] > preferred[9.0][1]


def test_classical_counts_are_sums_of_weights():
    split = conflict(9.0)
    assert item_counts(split.train, 5, split.train_weights).tolist() == [4, 3, 9, 1, 1]
    similar = item_similarity(split.train, item_counts(split.train, 5), split.train_weights)
    assert similar[0, 2] == pytest.approx(9 / 2) and similar[0, 1] == pytest.approx(3 / np.sqrt(4 * 3))


def test_a_shortened_split_keeps_the_weights_of_the_interactions_that_stay():
    split = conflict(9.0)
    shorter = split.with_train([slice(-1), np.array([1]), np.array([True, False]), slice(None), slice(0)], np.full(5, -1))
    assert [rows.tolist() for rows in shorter.train] == [[0], [1], [0], [0, 2], []]
    assert [weights.tolist() for weights in shorter.train_weights] == [[1], [1], [1], [1, 9], []]
    assert shorter.target_weights("valid") is None and shorter.target_weights("test") is not None
