"""Behaviour vectors: factorised co-engagement (PPMI-SVD), and their fusion with text embeddings."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import svds

from mmsid.errors import MmsidError

_DENSE_BELOW = 600  # up to this number of rows, an exact dense decomposition is as fast as the iterative one
_SMOOTHING = 0.75  # exponent of the context distribution (Levy, Goldberg & Dagan 2015)


def ppmi_svd(pairs: sp.spmatrix, dim: int = 64, seed: int = 0) -> np.ndarray:
    """Item vectors from weighted co-engagement: truncated SVD of the positive pointwise mutual information, u sqrt(sigma).

    PMI_ij = log( p_ij / (p_i q_j) ) with q proportional to (column sum)^0.75, which lowers the PMI of rare contexts
    (Levy, Goldberg & Dagan 2015). The sign of each dimension is fixed by its largest entry.

    Args:
        pairs: (N, N) non-negative weights; the diagonal is ignored.
    Returns:
        (N, dim) float32 with rows of norm 1. Items without positive PMI have a zero row; dimensions beyond the rank of the matrix are
        zero.
    Raises:
        MmsidError: `pairs` is not square, or has negative or NaN weights.
        ValueError: `dim` is not positive.
    """
    weights = sp.csr_matrix(pairs, dtype=np.float64, copy=True)
    if weights.shape[0] != weights.shape[1]:
        raise MmsidError(f"co-engagement must be square (items x items), got {weights.shape}")
    if weights.nnz and not (np.isfinite(weights.data).all() and weights.data.min() >= 0):
        raise MmsidError("co-engagement weights must be finite and not negative; check how the pairs were made")
    if dim < 1:
        raise ValueError(f"dim must be positive, got {dim}")
    weights.setdiag(0)
    weights.eliminate_zeros()
    num_items = weights.shape[0]
    result = np.zeros((num_items, dim), dtype=np.float32)
    if not weights.nnz:
        return result
    entries = weights.tocoo()
    total = entries.data.sum()
    row_sums = np.asarray(weights.sum(axis=1)).ravel()
    context = np.asarray(weights.sum(axis=0)).ravel() ** _SMOOTHING
    context /= context.sum()
    information = np.log(entries.data / row_sums[entries.row] / context[entries.col])  # p_ij / p_i = w_ij / row sum
    keep = information > 1e-12 * max(1.0, np.log1p(total))
    ppmi = sp.csr_matrix((information[keep], (entries.row[keep], entries.col[keep])), shape=weights.shape)
    if not ppmi.nnz:
        return result
    left, sigma = _truncated_svd(ppmi, min(dim, num_items), seed)
    rank = sigma > 1e-9 * sigma[0]
    left, sigma = left[:, rank], sigma[rank]
    largest = left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])]
    vectors = left * np.where(largest < 0, -1.0, 1.0) * np.sqrt(sigma)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    empty = norms < 1e-9 * norms.max()  # rounding noise of items without information must not be scaled to norm 1
    result[:, : vectors.shape[1]] = np.where(empty, 0.0, vectors / np.where(empty, 1.0, norms))
    return result


def fuse(text: np.ndarray, behaviour: np.ndarray, weight: float = 1.0) -> np.ndarray:
    """Concatenate [text normalised ; weight x behaviour]: (N, D) and (N, M) -> (N, D + M) float32. Zero rows stay zero.

    Raises:
        ValueError: `text` and `behaviour` have different numbers of rows.
    """
    text, behaviour = np.asarray(text, dtype=np.float32), np.asarray(behaviour, dtype=np.float32)
    if len(text) != len(behaviour):
        raise ValueError(f"text has {len(text)} rows, behaviour {len(behaviour)}")
    norms = np.linalg.norm(text, axis=1, keepdims=True)
    return np.concatenate([text / np.where(norms > 0, norms, 1.0), np.float32(weight) * behaviour], axis=1)


def _truncated_svd(matrix: sp.csr_matrix, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors (N, d) and singular values (d,), descending, d <= dim."""
    if matrix.shape[0] <= max(_DENSE_BELOW, dim + 1):
        left, sigma, _ = np.linalg.svd(matrix.toarray(), full_matrices=False)
        return left[:, :dim], sigma[:dim]
    start = np.random.default_rng(seed).normal(size=matrix.shape[0])
    left, sigma, _ = svds(matrix, k=dim, v0=start, solver="arpack", return_singular_vectors="u")
    order = np.argsort(-sigma, kind="stable")
    return left[:, order], sigma[order]
