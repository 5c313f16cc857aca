"""Trie beam search with all three architectures: exact with a full beam, legal with any, seen items masked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsid.recommend.beam_search import beam_search
from mmsid.recommend.evaluate import Recommender, mask_seen, recommender_scores
from mmsid.recommend.flat import FlatShape
from mmsid.recommend.history_encoder import pad_histories
from mmsid.recommend.paths import ItemPaths, PathTrie, item_paths
from mmsid.recommend.sid_transformer import SidTransformer, SidTransformerShape
from mmsid.recommend.tiger import TigerShape
from mmsid.recommend.training import build

SIZES = {"d_model": 16, "heads": 2, "hidden": 24, "layers": 2, "max_history": 5}
SHAPES = {"sid_transformer": SidTransformerShape(**SIZES), "flat": FlatShape(**SIZES), "tiger": TigerShape(**SIZES)}
RAGGED = item_paths(np.array([[0, 1], [0, 1], [0, 1], [0, 2], [1, 1], [1, 0], [1, 0]]), np.array([0, 1, 2, -1, -1, 0, 1]), (2, 3))


def make(paths: ItemPaths, architecture: str) -> Recommender:
    """A model with large random weights, so that scores differ by more than rounding."""
    torch.manual_seed(3)
    model = build(paths, SHAPES[architecture]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def random_paths(num_items: int, sizes: tuple[int, ...], seed: int = 0) -> ItemPaths:
    """Random paths where items 0 and 1 share a SID; dense and sparse levels both occur."""
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, size, num_items) for size in sizes], 1)
    codes[1] = codes[0]
    return item_paths(codes, None, sizes)


@torch.no_grad()
def level_logits(model: Recommender, history: np.ndarray, prefix: list[int]) -> torch.Tensor:
    """Logits (K,) of the level after `prefix`, one user and one prefix at a time, by the plain forward pass of the model."""
    level, padded = len(prefix), pad_histories([history], model.shape.max_history)
    if isinstance(model, SidTransformer):
        summed = sum((model.level_table(place)[code] for place, code in enumerate(prefix)), torch.zeros(model.shape.d_model))
        return model.level_logits(level, model.last_states(padded)[0], summed)
    past = [int(token) for item in history[-model.shape.max_history :] for token in model.tokens[int(item)]]
    own = [model.offsets[place] + code for place, code in enumerate(prefix)]
    if hasattr(model.language_model, "encoder"):
        output = model.language_model(torch.tensor([[model.begin, *past]]), decoder_input_ids=torch.tensor([[model.begin, *own]]))
    else:
        output = model.language_model(torch.tensor([[model.begin, *past, *own]]))
    return output.logits[0, -1, model.offsets[level] : model.offsets[level] + model.sizes[level]]


def brute_force(model: Recommender, paths: ItemPaths, histories: list[np.ndarray]) -> torch.Tensor:
    """Item by item, level by level: softmax over the codes that continue some item's prefix."""
    scores = torch.zeros(len(histories), len(paths.tokens))
    for user, history in enumerate(histories):
        for item, path in enumerate(paths.tokens):
            for level, code in enumerate(path):
                siblings = (paths.tokens[:, :level] == path[:level]).all(1)
                legal = torch.from_numpy(np.unique(paths.tokens[siblings, level]))
                logits = level_logits(model, history, path[:level].tolist())[legal]
                scores[user, item] += torch.log_softmax(logits, 0)[int((legal == code).nonzero()[0, 0])]
    return scores


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("paths", [random_paths(24, (4, 3, 5)), random_paths(20, (3, 40)), RAGGED], ids=["3 levels", "sparse", "suffix"])
def test_a_full_beam_scores_the_whole_catalogue_exactly(architecture, paths):
    model, trie = make(paths, architecture), PathTrie.build(paths)
    histories = [np.array([0, 5, 4, 4, 3, 2, 1]), np.array([6]), np.zeros(0, np.int64)]
    expected = mask_seen(brute_force(model, paths, histories), histories)
    for decoding in ("exact", "beam"):
        found = recommender_scores(model, trie, decoding, beam=60)(histories)
        torch.testing.assert_close(mask_seen(found, histories), expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(found[2].exp()[np.unique(paths.tokens, axis=0, return_index=True)[1]].sum(), torch.tensor(1.0))
    same = (paths.tokens == paths.tokens[0]).all(1)
    assert len(set(found[2][torch.from_numpy(same)].tolist())) == 1  # items of one SID have bit-identical scores


@pytest.mark.parametrize("architecture", SHAPES)
def test_users_of_a_batch_do_not_affect_each_other(architecture):
    paths = random_paths(40, (4, 4, 4))
    model, trie = make(paths, architecture), PathTrie.build(paths)
    histories = [np.arange(9), np.array([7]), np.zeros(0, np.int64), np.array([3, 30])]
    score = recommender_scores(model, trie, "beam", beam=6)
    together = score(histories)
    for user, history in enumerate(histories):
        torch.testing.assert_close(score([history])[0], together[user], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", SHAPES)
def test_one_item_and_no_unseen_item(architecture):
    paths = item_paths(np.array([[2, 1]]), None, (4, 4))
    model, trie = make(paths, architecture), PathTrie.build(paths)
    empty = pad_histories([np.zeros(0, np.int64)], 5)
    beams = beam_search(model.steps(empty), trie, empty, 5)
    assert beams.leaf.tolist() == [[0]] and beams.log_prob.tolist() == [[0.0]]
    assert beam_search(model.steps(empty), trie, torch.tensor([[0]]), 5).leaf.tolist() == [[-1]]


MODELS: dict[str, Recommender] = {}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("architecture", SHAPES)
def test_any_beam_returns_distinct_legal_unseen_leaves_best_first(architecture, data):
    sizes = (3, 4, 30)
    num_items = data.draw(st.integers(1, 30), "items")
    codes = np.array([[data.draw(st.integers(0, size - 1)) for size in sizes] for _ in range(num_items)])
    paths = item_paths(codes, None, sizes)
    model = MODELS.setdefault(architecture, make(item_paths(np.zeros((40, 3), np.int64), None, sizes), architecture))
    histories = data.draw(st.lists(st.lists(st.integers(0, num_items - 1), max_size=8), min_size=1, max_size=4), "histories")
    beam = data.draw(st.integers(1, 12), "beam")
    seen = pad_histories([np.array(history, np.int64) for history in histories], 8)
    trie = PathTrie.build(paths)
    beams = beam_search(model.steps(pad_histories([np.array(history, np.int64) for history in histories], 5)), trie, seen, beam)
    leaf_of = trie.node_of[-1].numpy()
    for user, history in enumerate(histories):
        unseen = set(leaf_of[np.setdiff1d(np.arange(num_items), history)].tolist())
        found = beams.leaf[user][beams.leaf[user] >= 0].tolist()
        assert set(found) <= unseen and len(found) == len(set(found)) and (beam < len(unseen) or set(found) == unseen)
        assert torch.isneginf(beams.log_prob[user][beams.leaf[user] < 0]).all()
        log_prob = beams.log_prob[user][beams.leaf[user] >= 0]
        assert torch.isfinite(log_prob).all() and (log_prob.diff() <= 0).all()
