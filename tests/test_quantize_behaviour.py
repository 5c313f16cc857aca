"""PPMI-SVD and fusion of text and behaviour."""

import numpy as np
import pytest
import scipy.sparse as sp

from mmsid.errors import MmsidError
from mmsid.quantize import fuse, ppmi_svd


def test_ppmi_svd_by_hand():
    # Two pairs, 0-1 and 2-3, with weight 2 each; item 4 has no pair.
    # p_ij = 1/4, p_i = 1/4, q_j = 1/4 (equal columns, smoothing changes nothing): PMI = log 4 in each block [[0,1],[1,0]].
    pairs = sp.coo_matrix(([2, 2, 2, 2.0], ([0, 1, 2, 3], [1, 0, 3, 2])), shape=(5, 5))
    vectors = ppmi_svd(pairs, dim=8)
    assert vectors.shape == (5, 8) and (vectors[4] == 0).all() and (vectors[:, 4:] == 0).all()
    assert np.linalg.norm(vectors[:4], axis=1) == pytest.approx(np.ones(4), abs=1e-6)
    # U of a symmetric permutation block is a rotation: rows are orthonormal, all four sigmas equal
    assert vectors[:4] @ vectors[:4].T == pytest.approx(np.eye(4), abs=1e-6)


def test_co_engaged_items_have_similar_vectors():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(4), 10)
    weights = np.triu((group[:, None] == group[None, :]) * (rng.random((40, 40)) < 0.6) + (rng.random((40, 40)) < 0.02), 1).astype(float)
    pairs = sp.csr_matrix(weights + weights.T)
    vectors = ppmi_svd(pairs, dim=6)
    similar = vectors @ vectors.T
    same = group[:, None] == group[None, :]
    assert similar[same].mean() > similar[~same].mean() + 0.4
    assert np.array_equal(vectors, ppmi_svd(pairs, dim=6))


def test_iterative_matches_dense(monkeypatch):
    rng = np.random.default_rng(1)
    raw = sp.random(150, 150, density=0.1, random_state=2)
    pairs = sp.csr_matrix(raw + raw.T)
    dense = ppmi_svd(pairs, dim=5, seed=int(rng.integers(9)))
    monkeypatch.setattr("mmsid.quantize.behaviour._DENSE_BELOW", 0)
    iterative = ppmi_svd(pairs, dim=5)
    assert np.abs(dense @ dense.T - iterative @ iterative.T).max() < 1e-4
    assert np.allclose(dense, iterative, atol=1e-4)  # the sign convention


def test_empty_and_invalid_pairs():
    assert (ppmi_svd(sp.csr_matrix((3, 3)), dim=4) == 0).all()
    assert (ppmi_svd(sp.csr_matrix(np.eye(3)), dim=4) == 0).all()  # self pairs carry no information
    with pytest.raises(MmsidError, match="square"):
        ppmi_svd(sp.csr_matrix((3, 4)))
    with pytest.raises(MmsidError, match="negative"):
        ppmi_svd(sp.csr_matrix(np.array([[0, -1.0], [-1.0, 0]])))


def test_fuse_by_hand():
    fused = fuse(np.array([[3.0, 4.0], [0, 0]]), np.array([[1.0], [0.0]]), weight=0.5)
    assert fused == pytest.approx(np.array([[0.6, 0.8, 0.5], [0, 0, 0]]))
    assert fused.dtype == np.float32
    with pytest.raises(ValueError, match="2 rows, behaviour 1"):
        fuse(np.zeros((2, 2)), np.zeros((1, 2)))
