"""Intrinsic metrics: values computed by hand, random and collapsed codes, independence of row order."""

import json
from math import log, sqrt

import numpy as np
import pytest
from sklearn.metrics import homogeneity_completeness_v_measure, normalized_mutual_info_score

from mmsid.quantize import CodebookScores, balanced_residual_kmeans
from mmsid.sids import SidTable, intrinsic_metrics, intrinsic_table, resolve
from mmsid.sids.distribution import (
    bucket_metrics,
    chance_agreement,
    entropy,
    flip_rate,
    gini,
    level_metrics,
    pair_agreement,
)
from mmsid.sids.semantics import category_agreement, cluster_agreement, fidelity, nearest_neighbour_lcp

CODES = np.array([[0, 0], [0, 0], [0, 1], [2, 1]])  # K = 4


def test_buckets_by_hand():
    metrics = bucket_metrics(CODES, ["a", "a", "b", "c"])
    assert metrics == {
        "items": 4,
        "uniqueness": 0.75,
        "items_lost": 1,
        "colliding_share": 0.5,
        "buckets": 3,
        "max_bucket": 2,
        "mean_bucket": 4 / 3,
        "exact_duplicates": 1,
    }


def test_levels_by_hand():
    first, second = level_metrics(CODES, (4, 4))
    # level 1: counts 3,0,1,0; H = -(3/4 ln 3/4 + 1/4 ln 1/4). level 2: counts 2,2,0,0; H = ln 2
    expected = -(0.75 * log(0.75) + 0.25 * log(0.25))
    assert first["utilisation"] == 0.5 and first["entropy"] == pytest.approx(expected)
    assert second["perplexity"] == pytest.approx(2) and second["normalised_entropy"] == pytest.approx(0.5)
    # gini, counts ascending 0,0,1,3: 2 (3*1 + 4*3) / (4*4) - 5/4 = 30/16 - 20/16 = 5/8; 0,0,2,2: 2 (6 + 8) / 16 - 5/4 = 1/2
    assert first["gini"] == pytest.approx(5 / 8) and second["gini"] == pytest.approx(1 / 2)
    # joint: buckets 2,1,1 -> H = 1/2 ln 2 + 2 * 1/4 ln 4 = 1.5 ln 2
    assert second["conditional_entropy"] == pytest.approx(1.5 * log(2) - expected)


def test_gini_is_high_for_a_collapse_and_zero_for_balance():
    assert gini(np.array([9, 0, 0, 0])) == pytest.approx(0.75) and gini(np.array([3, 3, 3])) == pytest.approx(0)
    assert entropy(np.array([0, 5, 0])) == 0


def test_chance_and_lift_by_hand():
    # level 1: groups of 3 and 1 -> 3*2 / (4*3) = 1/2. whole SID: one bucket of 2 -> 2 / 12 = 1/6
    assert chance_agreement(CODES) == pytest.approx([1 / 2, 1 / 6])
    pairs = np.array([[0, 1], [0, 2], [2, 3], [1, 1]])  # the self pair is left out; 2-3 agree on level 2 but not on the prefix
    assert pair_agreement(CODES, pairs) == pytest.approx([2 / 3, 1 / 3])
    metrics = intrinsic_metrics(SidTable.from_codes(list("abcd"), CODES, (4, 4)), held_out_pairs=pairs)["coengagement"]
    assert metrics["lift"] == pytest.approx([4 / 3, 2]) and metrics["pairs"] == 3
    # level 2 alone: two groups of 2 -> chance 1/3; 0-1 and 2-3 agree
    assert metrics["code_lift"] == pytest.approx([4 / 3, 2])
    assert metrics["lcp"] == pytest.approx(1) and metrics["lcp_chance"] == pytest.approx(2 / 3)
    assert metrics["lcp_ratio"] == pytest.approx(1.5) and metrics["lcp_difference"] == pytest.approx(1 / 3)


def test_chance_equals_the_agreement_of_random_pairs():
    rng = np.random.default_rng(0)
    codes = rng.choice(8, p=rng.dirichlet(np.ones(8)), size=(400, 2))
    pairs = rng.integers(0, 400, size=(200_000, 2))
    assert pair_agreement(codes, pairs) == pytest.approx(chance_agreement(codes), rel=0.03)


def test_cluster_agreement_by_hand_and_against_sklearn():
    # clusters {0: x x y, 1: y}: H(class) = ln 2, H(cluster) = h(1/4), joint = 1/2,1/4,1/4 -> 1.5 ln 2
    clusters, classes = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    cluster_entropy = -(0.75 * log(0.75) + 0.25 * log(0.25))
    shared = log(2) + cluster_entropy - 1.5 * log(2)
    found = cluster_agreement(clusters, classes)
    assert found["homogeneity"] == pytest.approx(shared / log(2)) and found["completeness"] == pytest.approx(shared / cluster_entropy)
    assert found["nmi"] == pytest.approx(shared / sqrt(log(2) * cluster_entropy)) and found["purity"] == 0.75
    rng = np.random.default_rng(1)
    clusters, classes = rng.integers(0, 9, 300), rng.integers(0, 5, 300)
    found = cluster_agreement(clusters, classes)
    theirs = homogeneity_completeness_v_measure(classes, clusters)
    assert (found["homogeneity"], found["completeness"], found["v_measure"]) == pytest.approx(theirs)
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(classes, clusters, average_method="geometric"))


def test_ragged_categories_leave_items_out():
    categories = [("a", "x"), ("a", "x"), ("b",), ("b", "z"), ()]
    codes = np.array([[0], [0], [1], [1], [2]])
    first, second = category_agreement(codes, categories)
    assert (first["depth"], first["items"], first["classes"], first["v_measure"]) == (1, 4, 2, pytest.approx(1))
    assert (second["depth"], second["items"], second["classes"]) == (2, 3, 2)
    assert category_agreement(codes, [("a",)] * 5) == []  # a single class
    # the same leaf name under two parents is two categories
    assert category_agreement(codes[:2], [("a", "x"), ("b", "x")])[1]["classes"] == 2


def test_adjusted_v_measure_of_many_small_prefixes_is_zero():
    rng = np.random.default_rng(0)
    codes = np.arange(300)[:, None]
    record = category_agreement(codes, [(str(label),) for label in rng.integers(0, 20, 300)])[0]
    assert record["v_measure"] > 0.6 and abs(record["v_measure_adjusted"]) < 1e-6


def test_fidelity_by_hand():
    x = np.array([[3.0, 0], [-3, 0]])
    vectors = np.array([[[2.0, 0], [-2, 0]], [[1.0, 0], [-1, 0]]])
    first, second = fidelity(x, vectors, np.array([[0, 0], [1, 1]]))
    assert first["mse"] == 1 and first["r2"] == pytest.approx(1 - 2 / 18) and first["cosine"] == pytest.approx(1)
    assert second["mse"] == 0 and second["r2"] == 1
    assert fidelity(x, vectors, np.array([[1, 1], [0, 0]]))[1]["cosine"] == pytest.approx(-1)


def test_flip_rate_by_hand():
    other = np.array([[0, 0], [1, 0], [0, 2], [1, 1]])
    assert flip_rate(CODES, other) == pytest.approx([0.5, 0.25, 0.75])
    with pytest.raises(ValueError):
        flip_rate(CODES, other[:2])


def planted(seed=0, clusters=16, per_cluster=40):
    """Items whose embedding clusters, categories and co-engagement agree; shuffled order."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(clusters), per_cluster))
    x = (rng.normal(size=(clusters, 16)) * 3)[group] + rng.normal(size=(len(group), 16))
    pairs = np.array([rng.choice(np.flatnonzero(group == group[row]), 2, replace=False) for row in rng.integers(0, len(group), 400)])
    return x.astype(np.float32), [(f"c{label % 4}", f"c{label}") for label in group], pairs


def methods(x):
    num_items = len(x)
    fit = balanced_residual_kmeans(x, 3, 16, rounds=8)
    scores = CodebookScores(fit.codebooks, x)
    hashes = [row.tobytes().hex() for row in x]
    raw = fit.codes.numpy()
    relocated = resolve("relocate", raw, hashes, (16,) * 3, scores.last_scores, scores.prefix_candidates).codes
    ids = [str(row) for row in range(num_items)]
    random = np.random.default_rng(1).permutation(16**3)[:num_items]
    return {
        "raw": SidTable.from_codes(ids, raw, (16,) * 3),
        "relocated": SidTable.from_codes(ids, relocated, (16,) * 3, raw_codes=raw),
        "random": SidTable.from_codes(ids, np.stack(np.unravel_index(random, (16,) * 3), axis=1), (16,) * 3),
        "collapse": SidTable.from_codes(ids, np.zeros((num_items, 3), dtype=int), (16,) * 3),
    }


def test_random_codes_and_a_collapse_each_have_the_best_single_figures():
    """Random codes have perfect uniqueness but hardly any lift; a collapse has perfect raw agreement but no lift and no uniqueness."""
    x, categories, pairs = planted()
    metrics = {name: intrinsic_metrics(table, categories, pairs, x) for name, table in methods(x).items()}
    unique = {name: found["published"]["uniqueness"] for name, found in metrics.items()}
    lift = {name: found["coengagement"]["lift"][0] for name, found in metrics.items()}
    assert unique["random"] == 1 > unique["raw"]
    assert metrics["collapse"]["coengagement"]["agreement"][0] == 1 > metrics["raw"]["coengagement"]["agreement"][0]
    assert metrics["collapse"]["neighbour_lcp"] == 3
    assert lift["collapse"] == pytest.approx(1) and lift["random"] < 2 < lift["raw"]
    assert unique["collapse"] < unique["raw"] < unique["relocated"]
    assert lift["relocated"] > 0.9 * lift["raw"]  # overfull groups spill


def test_code_numbers_row_order_and_ids_do_not_matter():
    x, categories, pairs = planted(per_cluster=10)
    table = methods(x)["raw"]
    metrics = intrinsic_metrics(table, categories, pairs, x)
    rng = np.random.default_rng(3)
    order = rng.permutation(len(x))
    relabel = [rng.permutation(16) for _ in range(3)]
    codes = np.stack([relabel[level][table.codes[order, level]] for level in range(3)], axis=1)
    place = np.argsort(order)
    other = SidTable.from_codes([f"other{row}" for row in range(len(x))], codes, (16,) * 3)
    again = intrinsic_metrics(other, [categories[row] for row in order], place[pairs], x[order])
    assert again["coengagement"] == metrics["coengagement"] and again["published"] == metrics["published"]
    assert again["retrieval"] == metrics["retrieval"] and again["neighbour_lcp"] == pytest.approx(metrics["neighbour_lcp"])
    assert again["min_perplexity"] == pytest.approx(metrics["min_perplexity"])
    # relabelling changes the shuffle of the chance level slightly, reordering does not
    kept = SidTable.from_codes(other.item_ids, table.codes[order], (16,) * 3)
    same = intrinsic_metrics(kept, [categories[row] for row in order], place[pairs], x[order])
    assert same == metrics


def test_metrics_are_json_and_format_as_a_table():
    x, categories, pairs = planted(per_cluster=10)
    tables = methods(x)
    tables["suffix"] = SidTable.from_codes(
        tables["raw"].item_ids, tables["raw"].codes, (16,) * 3, suffix=np.arange(len(x)), margin=np.ones(len(x))
    )
    metrics = {name: intrinsic_metrics(table, categories, pairs, x) for name, table in tables.items()}
    json.dumps(metrics, allow_nan=False)
    assert metrics["suffix"]["with_suffix"]["uniqueness"] == 1 and metrics["suffix"]["margin_median"] == 1
    assert metrics["relocated"]["changed"]["any"] == pytest.approx(metrics["relocated"]["changed"]["levels"][2])
    metrics["codes_only"] = intrinsic_metrics(tables["raw"])
    text = intrinsic_table(metrics)
    lines = text.splitlines()
    assert len(lines) == 2 + len(metrics) and len({line.count("|") for line in lines}) == 1
    assert "| collapse |" in text and "lift" in lines[0] and "V-measure" in lines[0]
    assert "lift" not in intrinsic_table({"codes_only": metrics["codes_only"]})
    with pytest.raises(ValueError, match="categories has 1 rows"):
        intrinsic_metrics(tables["raw"], categories[:1])


def test_single_item():
    metrics = intrinsic_metrics(SidTable.from_codes(["only"], np.zeros((1, 2)), (1, 1)), [("a",)], np.zeros((0, 2)), np.ones((1, 3)))
    assert metrics["published"]["uniqueness"] == 1 and json.dumps(metrics, allow_nan=False)


def test_nearest_neighbour_lcp_by_hand():
    x = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    assert nearest_neighbour_lcp(np.array([[0, 0], [0, 1], [1, 0], [1, 0]]), x) == 1.5
