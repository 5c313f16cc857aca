"""Retrieval recall by embedding and by codes: values computed by hand, ties at expectation, no positive counted as a negative."""

import numpy as np
import pytest

from mmsid.sids.retrieval import prefix_recall, retrieval_recall, retrieval_table


def test_retrieval_by_hand():
    angles = np.deg2rad([0, 10, 20, 30, 180])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # Query 0: positives 1 and 3, each ranked against 2 and 4: ranks 1 and 2. Query 4: positive 3 against 0, 1, 2: rank 1. The self pair
    # (2, 2) is left out.
    pairs = np.array([[0, 1], [0, 3], [4, 3], [2, 2]])
    found = retrieval_recall(x, pairs, ks=(1, 2))
    assert found["full"] == pytest.approx({"1": 2 / 3, "2": 1})
    assert found["sampled"] == found["full"]  # fewer than 999 candidates: all are drawn
    assert found["chance_full"]["1"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 4) / 3)
    # one of two negatives is drawn: the rank-2 positive loses with probability 1/2
    assert retrieval_recall(x, pairs, ks=(1,), negatives=1)["sampled"]["1"] == pytest.approx((1 + 1 + 1 / 2) / 3)


def test_items_paired_in_either_direction_are_no_negatives():
    x = np.array([[1.0, 0], [1, 0.05], [1, 0.2], [0, 1]])
    # the positive 2 of query 0 ranks behind item 1; if (1, 0) is a pair as well, item 1 is no negative of query 0
    assert retrieval_recall(x, np.array([[0, 2]]), ks=(1,))["full"]["1"] == 0
    assert retrieval_recall(x, np.array([[0, 2], [1, 0]]), ks=(1,))["full"]["1"] == 1


def test_retrieval_ties_count_at_expectation():
    found = retrieval_recall(np.ones((5, 3)), np.array([[0, 1]]), ks=(1, 2), negatives=1)
    assert found["full"] == pytest.approx({"1": 1 / 4, "2": 2 / 4}) and found["sampled"] == pytest.approx({"1": 1 / 2, "2": 1})


def test_prefixes_by_hand():
    codes = np.array([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]])
    # query 0, positive 1: item 2 ties (one shared code), 3 and 4 share none: rank 1 with probability 1/2, at most rank 2
    assert prefix_recall(codes, np.array([[0, 1]]), ks=(1, 2))["full"] == {"1": 0.5, "2": 1.0}
    # the last code alone is no prefix: item 3 (1, 0) shares nothing with (0, 0) and ranks behind 1 and 2, tied with 4
    assert prefix_recall(codes, np.array([[0, 3]]), ks=(2, 3, 4))["full"] == {"2": 0.0, "3": 0.5, "4": 1.0}
    # a single bucket: exactly chance
    collapsed = prefix_recall(np.zeros((5, 2)), np.array([[0, 1], [2, 3]]), ks=(1, 2))
    assert collapsed["full"] == collapsed["chance_full"] == {"1": 0.25, "2": 0.5}


def test_sampled_negatives_match_simulation():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4))
    pairs = rng.integers(0, 60, size=(5, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    hits = []
    for query, positive in pairs:
        known = {positive} | set(pairs[pairs[:, 0] == query, 1]) | set(pairs[pairs[:, 1] == query, 0])
        others = np.setdiff1d(np.arange(60), [query, *known])
        for _ in range(2000):
            drawn = rng.choice(others, 20, replace=False)
            hits.append((unit[drawn] @ unit[query] > unit[positive] @ unit[query]).sum() < 5)
    assert retrieval_recall(x, pairs, ks=(5,), negatives=20)["sampled"]["5"] == pytest.approx(np.mean(hits), abs=0.02)


def test_order_of_rows_and_pairs_does_not_matter_and_the_table_lists_available_figures():
    rng = np.random.default_rng(1)
    codes, pairs = rng.integers(0, 3, size=(40, 3)), rng.integers(0, 40, size=(30, 2))
    order = rng.permutation(40)
    place = np.argsort(order)
    for score, table in ((prefix_recall, codes), (retrieval_recall, rng.normal(size=(40, 5)))):
        first, again = score(table, pairs), score(table[order], place[pairs][rng.permutation(30)])
        assert all(first[which] == pytest.approx(again[which]) for which in first)
    text = retrieval_table({"a": {"retrieval_prefix": first, "retrieval": first}, "b": {}})
    assert "| a | embedding |" in text and "| a | shared prefix |" in text and "| b |" not in text
    assert len({line.count("|") for line in text.splitlines()}) == 1 and retrieval_table({"b": {}}) == ""
    with pytest.raises(ValueError, match="no pair"):
        prefix_recall(codes, np.array([[1, 1]]))
