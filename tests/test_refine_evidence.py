"""Reward components by hand on small tables, and codes that they must not reward (T10)."""

import numpy as np
import pytest
from scipy import sparse

from mmsid.quantize.nearest_items import implied_neighbours, smoothed_co_engagement
from mmsid.refine import evidence
from mmsid.refine.evidence import CodeTable, EvidenceConfig, NeighboursCodes, prefix_keys, split_users

CONFIG = EvidenceConfig()


def _neighbours(size: int, edges: list[tuple[int, int, float]]) -> sparse.csr_matrix:
    matrix = np.zeros((size, size))
    for left, right, weight in edges:
        matrix[left, right] = matrix[right, left] = weight
    return sparse.csr_matrix(matrix)


def _clustered(rng: np.random.Generator, clusters: int = 8, per: int = 16, codebook: int = 16):
    """Items of a cluster share the first code and are each other's neighbours; codes are unique."""
    items = clusters * per
    cluster = np.arange(items) // per
    codes = np.stack([cluster, np.arange(items) % 4, np.arange(items) % per], axis=1)
    left, right = rng.integers(0, items, 4000), rng.integers(0, items, 4000)
    keep = (cluster[left] == cluster[right]) & (left != right)
    counts = sparse.coo_matrix((np.ones(keep.sum()), (left[keep], right[keep])), shape=(items, items)).tocsr()
    return codes, counts + counts.T, codebook


def _mean_evidence(codes, neighbours, codebook, content=None):
    table = CodeTable(codes, codebook, neighbours, content)
    rows = np.arange(len(codes))
    parts = table.components(rows, codes[:, None], CONFIG)
    assert (parts["neighbours"] == table.neighbours(rows, codes[:, None], CONFIG)).all()
    return float((parts["neighbours"] + 0.05 * parts["crowding"]).mean())


def test_prefix_keys():
    assert prefix_keys(np.array([[1, 2, 3]]), 10).tolist() == [[1, 12, 123]]
    with pytest.raises(ValueError, match="64 bits"):
        prefix_keys(np.zeros((1, 6), dtype=np.int64), 8192)


def test_agreement_by_hand():
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    table = CodeTable(codes, 2, _neighbours(4, [(0, 1, 3.0), (0, 2, 1.0), (2, 3, 2.0)]), prior=0.0)
    assert table.degree.tolist() == [4, 3, 3, 2]
    excess, chance = table.agreement(np.array([0]), np.array([[[0, 1], [1, 1]]]))
    # of the others' 8 units of weight 3 lie under code 0 (item 1) and 5 under code 1; item 0 has 3/4 of its own weight under code 0
    assert chance[0].tolist() == [[3 / 8, 3 / 8], [5 / 8, 2 / 8]]
    assert excess[0].tolist() == [[3 / 4 - 3 / 8, 3 / 4 - 3 / 8], [1 / 4 - 5 / 8, 0 - 2 / 8]]


def test_prior_shrinks_and_no_neighbours_score_zero():
    codes = np.array([[0], [0], [1]])
    table = CodeTable(codes, 2, _neighbours(3, [(0, 1, 1.0)]), prior=1.0)
    excess, _ = table.agreement(np.array([0, 2]), np.array([[[0]], [[0]]]))
    assert excess[:, 0, 0].tolist() == [(1 - 1.0) / 2, 0.0]  # all the others' weight is under code 0: chance 1


def test_the_code_of_most_neighbours_is_proposed():
    codes, neighbours, codebook = _clustered(np.random.default_rng(0))
    lost = codes.copy()
    lost[5, 0] = 7  # its neighbours stayed under 0
    rows, nothing = np.arange(len(codes)), np.zeros((len(codes), 1, 0), dtype=np.int64)
    found = NeighboursCodes(lost, codebook, neighbours, None, EvidenceConfig()).after(rows, nothing, count=2)[:, 0]
    assert found.shape == (len(codes), 2) and found[5, 0] == 0
    assert (np.delete(found[:, 0], 5) == np.delete(codes[:, 0], 5)).all()
    alone = NeighboursCodes(codes, codebook, sparse.csr_matrix(neighbours.shape), None, EvidenceConfig()).after(rows, nothing, count=1)
    assert (alone == -1).all(), "an item without neighbours gets no proposal"


def test_after_a_prefix_the_code_of_most_neighbours_under_it_is_proposed(monkeypatch):
    codes = np.array([[0, 0], [0, 1], [0, 1], [1, 0], [1, 1]])
    weighed = EvidenceConfig(level_weights=(0.6, 0.4), code_weights=(0.0,))
    near = NeighboursCodes(codes, 2, _neighbours(5, [(0, 1, 1.0), (0, 2, 1.0), (0, 3, 1.0), (3, 4, 1.0)]), None, weighed)
    rows, prefixes = np.array([0, 4]), np.array([[[0], [1]], [[0], [1]]])
    found = near.after(rows, prefixes, count=2)
    # item 0 has a third of its weight under (1, 0), where 2/5 of the others' is; item 4 all of it, where 2/7 is
    assert found.tolist() == [[[1, -1], [-1, -1]], [[-1, -1], [0, -1]]]
    monkeypatch.setattr(evidence, "MAX_PATHS", 1)
    assert (near.after(rows, prefixes, count=2) == found).all(), "in pieces the same"


def test_code_agreement_by_hand():
    codes = np.array([[0, 0, 0], [0, 1, 1], [1, 1, 1], [1, 0, 0], [2, 1, 2]])
    table = CodeTable(codes, 3, _neighbours(5, [(0, 1, 1.0), (0, 2, 2.0), (3, 4, 1.0)]), prior=1.0)
    found = table.code_agreement(np.array([0]), np.array([[[0, 1, 1], [2, 0, 0]]]))
    # item 0 has weight 3, the others 5: items 1, 2 and 4 of second code 1 hold 1 + 2 + 1 of it, item 3 of code 0 the rest; the neighbour
    # under (0, 1) is not counted, nor is its chance of 1/5. All shrunk by 3 + 1.
    second = ((3 - 1) - 3 * (4 / 5 - 1 / 5)) / 4
    third = ((3 - 1) - 3 * (3 / 5 - 1 / 5)) / 4  # items 1 and 2 hold third code 1, item 1 under the same prefix
    none = (0 - 3 * 1 / 5) / 4
    np.testing.assert_allclose(found[0], [[second, third], [none, none]], atol=1e-12)
    parts = table.components(np.array([0]), np.array([[[0, 1, 1], [2, 0, 0]]]), EvidenceConfig(code_weights=(0.5, 0.25)))
    np.testing.assert_allclose(parts["codes"], [[0.5 * second + 0.25 * third, 0.75 * none]], atol=1e-12)


def test_a_code_is_proposed_that_neighbours_hold_under_other_prefixes():
    codes = np.array([[0, 0, 0], [1, 1, 2], [1, 1, 2], [2, 0, 1], [2, 0, 1]])
    near = NeighboursCodes(codes, 3, _neighbours(5, [(0, 1, 1.0), (0, 2, 1.0), (3, 4, 1.0)]), None, EvidenceConfig())
    assert near.after(np.array([0]), np.array([[[0], [2]]]), count=1).tolist() == [[[1], [1]]]
    assert near.after(np.array([0]), np.array([[[0, 0], [2, 1]]]), count=1).tolist() == [[[2], [2]]]


def test_crowding_counts_other_items_without_duplicates():
    codes = np.array([[0, 0], [0, 0], [0, 1], [0, 1]])
    table = CodeTable(codes, 2, _neighbours(4, []), content=np.array([0, 1, 2, 2]))
    others = table.others(np.arange(4), codes[:, None])
    assert others[:, 0].tolist() == [[2.0, 1.0], [2.0, 1.0], [2.0, 0.0], [2.0, 0.0]]
    parts = table.components(np.array([0]), np.array([[[0, 0], [1, 0]]]), CONFIG)
    assert parts["crowding"].tolist() == [[-(1.0 + 1.0), 0.0]]


def test_balance_by_hand():
    codes = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    table = CodeTable(codes, 4, _neighbours(4, []))
    parts = table.components(np.array([0, 3]), np.array([[[0, 0, 3], [1, 1, 3], [2, 0, 3]]] * 2), CONFIG)
    # a fair share is 1 item of 4 per code: of the first level item 0 would be the third of three, the second of two, or alone; of the
    # second one of three, two, three; of the third, whose code 3 no item holds, alone
    expected = -np.log([[3 * 3, 2 * 2, 1 * 3], [4 * 3, 1 * 2, 1 * 3]])
    np.testing.assert_allclose(parts["balance"], expected, atol=1e-12)


def test_share_under_by_hand():
    table = CodeTable(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), 2, _neighbours(4, []))
    found = table.share_under(np.array([[1, 2, 3]]), np.array([[0.5, 0.3, 0.2]]), np.array([[[0, 0], [0, 1], [1, 1]]]))
    np.testing.assert_allclose(found, [[[0.5, 0.0], [0.5, 0.5], [0.5, 0.2]]])


def test_mean_under_leaves_the_item_out():
    vectors = np.array([[1.0, 0], [0, 1], [4, 4]])
    table = CodeTable(np.array([[0, 0], [0, 1], [1, 0]]), 2, _neighbours(3, []))
    mean, size = table.mean_under(vectors, np.array([0]), np.array([[[0, 1], [1, 1]]]), level=0)
    assert mean[0].tolist() == [[0, 1], [4, 4]] and size[0].tolist() == [1, 1]
    mean, size = table.mean_under(vectors, np.array([0]), np.array([[[0, 0], [1, 1]]]), level=1)
    assert mean[0].tolist() == [[0, 0], [0, 0]] and size[0].tolist() == [0, 0]


def test_t10_scrambling_and_collapse_score_below_the_start():
    rng = np.random.default_rng(0)
    codes, neighbours, codebook = _clustered(rng)
    start = _mean_evidence(codes, neighbours, codebook)
    scrambled = _mean_evidence(codes[rng.permutation(len(codes))], neighbours, codebook)
    collapsed = _mean_evidence(np.zeros_like(codes), neighbours, codebook)
    assert start > 0.3 > abs(scrambled) and collapsed < scrambled


def test_t10_permuting_labels_changes_nothing():
    rng = np.random.default_rng(1)
    codes, neighbours, codebook = _clustered(rng)
    relabelled = np.stack([rng.permutation(codebook)[codes[:, level]] for level in range(3)], axis=1)
    assert _mean_evidence(relabelled, neighbours, codebook) == pytest.approx(_mean_evidence(codes, neighbours, codebook), abs=1e-12)


def test_t10_duplicating_an_item_does_not_raise_the_total():
    codes, neighbours, codebook = _clustered(np.random.default_rng(2))
    content = np.arange(len(codes))
    total = _mean_evidence(codes, neighbours, codebook, content) * len(codes)
    wider = sparse.block_diag([neighbours, sparse.csr_matrix((1, 1))]).tocsr()
    again = np.concatenate([codes, codes[:1]])
    doubled = _mean_evidence(again, wider, codebook, np.append(content, 0)) * len(again)
    assert doubled <= total + 1e-9


def test_split_users_is_disjoint_whole_and_seeded():
    histories = [np.array([user]) for user in range(100)]
    parts = split_users(histories, (0.4, 0.4, 0.2), seed=3)
    assert [len(part) for part in parts] == [40, 40, 20]
    assert sorted(int(history[0]) for part in parts for history in part) == list(range(100))
    assert [[int(h[0]) for h in part] for part in split_users(histories, (0.4, 0.4, 0.2), seed=3)] == [
        [int(h[0]) for h in part] for part in parts
    ]


def test_neighbours_implied_by_behaviour_vectors_by_hand():
    vectors = np.array([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [0.0, 0.0], [-1.0, -0.1]])
    weight = implied_neighbours(vectors, count=1).toarray()
    assert weight[0, 1] == pytest.approx(2.0), "each is nearest to the other, whatever the length of the vectors"
    assert weight[2, 0] + weight[2, 1] == pytest.approx(np.sqrt(0.5)), "cosine of 45 degrees, from one side"
    assert (weight == weight.T).all() and not weight.diagonal().any()
    assert not weight[3].any(), "an item without behaviour"
    assert not weight[4].any(), "its nearest item points elsewhere"
    assert implied_neighbours(np.zeros((3, 0))).shape == (3, 3)


def test_half_of_the_weight_comes_from_the_implied_neighbours():
    vectors = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    counts = _neighbours(3, [(0, 2, 3.0)])
    both = smoothed_co_engagement(counts, vectors).toarray()
    assert both[0, 2] == pytest.approx(1.5) and both[0, 1] == pytest.approx(1.5), "the total weight stays"
    assert (smoothed_co_engagement(counts, np.zeros((3, 2))) != counts).nnz == 0
