"""Item scores are exact log-probabilities of paths, and beam search agrees with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmsid.recommend.beam_search import beam_item_scores, beam_search
from mmsid.recommend.evaluate import mask_seen
from mmsid.recommend.history_encoder import pad_histories
from mmsid.recommend.item_scorer import ItemScorer
from mmsid.recommend.paths import ItemPaths, PathTrie, item_paths
from mmsid.recommend.sid_transformer import SidTransformer, SidTransformerShape, SidTransformerSteps

SHAPE = SidTransformerShape(d_model=16, heads=2, hidden=24, layers=1, max_history=6)


def build(paths: ItemPaths) -> tuple[SidTransformer, PathTrie]:
    torch.manual_seed(3)
    model = SidTransformer(paths, SHAPE).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model, PathTrie.build(paths)


def random_paths(num_items: int, sizes: tuple[int, ...], seed: int = 0) -> ItemPaths:
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, size, num_items) for size in sizes], 1)
    codes[1] = codes[0]
    return item_paths(codes, None, sizes)


def brute_force(model: SidTransformer, paths: ItemPaths, states: torch.Tensor) -> torch.Tensor:
    """Item by item, level by level: softmax over the codes that continue some item's prefix."""
    scores = torch.zeros(len(states), len(paths.tokens))
    for item, path in enumerate(paths.tokens):
        prefix = torch.zeros_like(states)
        for level, code in enumerate(path):
            siblings = (paths.tokens[:, :level] == path[:level]).all(1)
            legal = torch.from_numpy(np.unique(paths.tokens[siblings, level]))
            logits = model.level_logits(level, states, prefix)[:, legal]
            scores[:, item] += torch.log_softmax(logits, 1)[:, int((legal == code).nonzero()[0, 0])]
            prefix = prefix + model.level_table(level)[code]
    return scores


@pytest.mark.parametrize("sizes", [(4, 3, 5), (2, 2), (1, 7, 1, 3), (9,)])
def test_exact_scores_equal_brute_force_and_sum_to_one(sizes):
    paths = random_paths(30, sizes)
    model, trie = build(paths)
    with torch.no_grad():
        states = model.last_states(torch.tensor([[0, 5, -1], [7, 8, 9], [-1, -1, -1]]))
        scores = ItemScorer(model, trie)(states)
        torch.testing.assert_close(scores, brute_force(model, paths, states), atol=1e-4, rtol=1e-4)
    _, first = np.unique(paths.tokens, axis=0, return_index=True)
    torch.testing.assert_close(scores[:, first].exp().sum(1), torch.ones(3))
    assert torch.equal(scores[:, 0], scores[:, 1])  # items of one path have bit-identical scores


@pytest.mark.parametrize("sizes", [(4, 3, 5), (6, 6, 2, 2)])
def test_a_full_beam_is_exact_with_seen_items_masked(sizes):
    paths = random_paths(60, sizes, seed=1)
    model, trie = build(paths)
    histories = [np.array([0, 1, 4, 4]), np.array([7]), np.arange(59), np.zeros(0, np.int64)]
    with torch.no_grad():
        states = model.last_states(pad_histories(histories, SHAPE.max_history))
    exact = mask_seen(ItemScorer(model, trie)(states), histories)
    beams = beam_search(SidTransformerSteps(model, states), trie, pad_histories(histories, 99), beam=200)
    torch.testing.assert_close(mask_seen(beam_item_scores(beams, trie), histories), exact, atol=1e-4, rtol=1e-4)
    # the third user has one unseen item left: one beam holds it, all others are empty
    found = beams.leaf[2] >= 0
    assert found.sum() == 1 and trie.node_of[-1][59] == beams.leaf[2][0] and torch.isneginf(beams.log_prob[2][1:]).all()


def test_a_narrow_beam_returns_legal_unseen_leaves_in_order():
    paths = random_paths(200, (8, 8, 8), seed=2)
    model, trie = build(paths)
    histories = [np.arange(20), np.arange(40, 45)]
    with torch.no_grad():
        states = model.last_states(pad_histories(histories, SHAPE.max_history))
    beams = beam_search(SidTransformerSteps(model, states), trie, pad_histories(histories, 99), beam=10)
    assert (beams.leaf >= 0).all() and (beams.log_prob.diff(dim=1) <= 0).all()
    exact = ItemScorer(model, trie)(states)
    for user, history in enumerate(histories):
        allowed = set(trie.node_of[-1][np.setdiff1d(np.arange(200), history)].tolist())
        assert set(beams.leaf[user].tolist()) <= allowed
        for leaf, found in zip(beams.leaf[user], beams.log_prob[user], strict=True):
            member = int((trie.node_of[-1] == leaf).nonzero()[0, 0])
            assert found.item() == pytest.approx(exact[user, member].item(), abs=1e-4)


def test_single_item_and_all_seen():
    paths = item_paths(np.array([[2, 1]]), None, (4, 4))
    model, trie = build(paths)
    with torch.no_grad():
        states = model.last_states(torch.tensor([[-1]]))
    assert ItemScorer(model, trie)(states).item() == 0
    assert beam_search(SidTransformerSteps(model, states), trie, torch.tensor([[-1]]), 5).leaf.tolist() == [[0]]
    assert beam_search(SidTransformerSteps(model, states), trie, torch.tensor([[0]]), 5).leaf.tolist() == [[-1]]


def test_a_ragged_suffix_is_one_more_level_that_is_a_choice_only_for_shared_codes():
    codes = np.array([[0, 1], [0, 1], [0, 2], [1, 1]])
    paths = item_paths(codes, np.array([0, 1, -1, -1]), (2, 3))
    assert paths.sizes == (2, 3, 3) and paths.tokens[:, 2].tolist() == [1, 2, 0, 0]
    model, trie = build(paths)
    assert trie.levels[2].has_siblings(trie.node_of[2]).tolist() == [True, True, False, False]
    with torch.no_grad():
        states = model.last_states(torch.tensor([[2, 3]]))
    scores = ItemScorer(model, trie)(states)
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(1))
    assert scores[0, 0] != scores[0, 1]
    assert item_paths(codes, np.full(4, -1), (2, 3)).sizes == (2, 3)


def test_a_state_depends_on_earlier_items_only():
    paths = random_paths(30, (4, 3, 5))
    model, _ = build(paths)
    with torch.no_grad():
        alone = model.last_states(torch.tensor([[3, 4]]))
        beside = model.last_states(torch.tensor([[3, 4, -1, -1], [9, 8, 7, 6]]))
        torch.testing.assert_close(alone[0], beside[0])
        likelihood = model(torch.tensor([[3, 4]])) - model(torch.tensor([[3]]))
        after_three = model.last_states(torch.tensor([[3]]))
        own = model.path_log_prob(after_three, torch.tensor([4])).sum()
    assert likelihood.item() == pytest.approx(-own.item(), abs=1e-4)
