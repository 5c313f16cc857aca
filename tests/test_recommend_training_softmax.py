"""The training softmax runs over the children of the trie of warm items, as in decoding."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmsid.catalog.splits import Split
from mmsid.recommend.flat import FlatShape
from mmsid.recommend.item_scorer import ItemScorer
from mmsid.recommend.paths import ItemPaths, PathTrie, item_paths
from mmsid.recommend.sid_transformer import SidTransformer, SidTransformerShape
from mmsid.recommend.tiger import TigerShape
from mmsid.recommend.training import Schedule, build, fit

SHAPE = SidTransformerShape(d_model=16, heads=2, hidden=24, layers=1, dropout=0.0, max_history=6)
SHAPES = [SHAPE, FlatShape(16, 1, 2, 24, 0.0, 6), TigerShape(16, 1, 2, 24, 0.0, 6)]


def test_log_probabilities_by_hand():
    """Codes 0, 1, 3 exist below the root, codes 0 and 2 below code 0, one code below the others. Item 4 is not in the trie."""
    paths = ItemPaths(np.array([[0, 0], [0, 2], [1, 1], [3, 2], [2, 0]]), (5, 3))
    trie = PathTrie.build(paths, rows=np.arange(4))
    first, second = trie.levels
    assert trie.node_of.tolist() == [[0, 0, 1, 2, -1], [0, 1, 2, 3, -1]]
    logits = torch.tensor([[1.0, 2.0, 90.0, 0.0, 90.0]]).expand(4, 5)
    total = math.log(math.e + math.e**2 + 1)  # codes 2 and 4 lead to no item of the trie
    found = first.log_prob(logits, trie.node_of[0][:4])
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 2.0, 0.0]) - total)
    assert second.has_siblings(trie.node_of[1][:4]).tolist() == [True, True, False, False]
    found = second.log_prob(torch.tensor([[0.0, 90.0, math.log(3)]]).expand(2, 3), trie.node_of[1][:2])
    torch.testing.assert_close(found, torch.tensor([0.25, 0.75]).log())
    # a node with one child is certain
    assert second.log_prob(torch.randn(2, 3), trie.node_of[1][2:4]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("sizes", [(4, 3, 5), (12, 12, 12), (3, 40)])
def test_training_and_decoding_give_the_same_log_probability_if_all_items_are_warm(sizes):
    rng = np.random.default_rng(0)
    paths = item_paths(np.stack([rng.integers(0, size, 60) for size in sizes], 1), None, sizes)
    torch.manual_seed(3)
    model = SidTransformer(paths, SHAPE).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    items = torch.arange(60)
    with torch.no_grad():
        states = torch.randn(60, SHAPE.d_model)
        decoded = ItemScorer(model, PathTrie.build(paths))(states)
        trained = model.path_log_prob(states, items).sum(1)
        torch.testing.assert_close(trained, decoded.diagonal(), atol=1e-4, rtol=1e-4)
        assert model(torch.tensor([[7]])).item() == pytest.approx(
            -ItemScorer(model, PathTrie.build(paths))(model.last_states(torch.tensor([[-1]])))[0, 7].item(), abs=1e-4
        )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
def test_codes_that_only_new_items_have_get_no_gradient(shape):
    """Item 3 has code 3 at level 1, item 4 has code 3 at level 2; both are new. Their rows of the tied table stay untouched."""
    paths = item_paths(np.array([[0, 0], [0, 1], [1, 2], [3, 0], [0, 3]]), None, (4, 4))
    torch.manual_seed(0)
    model = build(paths, shape, PathTrie.build(paths, rows=np.arange(3)))
    table = model.codes.weight if isinstance(model, SidTransformer) else model.language_model.get_input_embeddings().weight
    model(torch.tensor([[0, 1, 2, 0]])).backward()
    assert not table.grad[[2, 3, 7]].any()
    assert table.grad[[0, 1, 4, 5, 6]].any(1).all()
    if isinstance(model, SidTransformer):
        assert model.bias.grad[[2, 3, 7]].tolist() == [0, 0, 0] and model.bias.grad[[0, 1, 4, 5]].all()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
def test_fit_depends_on_new_items_in_decoding_only(shape):
    """Train histories hold items 0 to 8. The codes of item 9 change no weight, and the decoding trie holds all ten items."""
    histories = [np.arange(start, start + 4) % 9 for start in range(9)]
    split = Split(
        train=[history[:-2] for history in histories],
        before_test=[history[:-1] for history in histories],
        valid=np.array([history[-2] for history in histories]),
        test=np.array([history[-1] for history in histories]),
        held_out=np.zeros(9, dtype=bool),
    )
    codes = np.array([[item // 3, item % 3] for item in range(9)])
    weights = []
    for new in ([3, 3], [0, 3]):
        paths = item_paths(np.vstack([codes, [new]]), None, (4, 4))
        fitted = fit(paths, replace(split, valid=np.full(9, -1)), shape=shape, schedule=Schedule(epochs=1, batch_size=4))
        assert fitted.trie.num_items == 10 and (fitted.trie.node_of >= 0).all()
        weights.append(list(fitted.model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
