"""Behaviour as a vector: factorised co-engagement, and its fusion with text embeddings."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import svds

from mmsid.errors import MmsidError

_DENSE_BELOW = 600  # rows under which an exact dense decomposition is as fast as the iterative one


def ppmi_svd(pairs: sp.spmatrix, dim: int = 64, smoothing: float = 0.75, seed: int = 0) -> np.ndarray:
    """Item vectors from weighted co-engagement: truncated SVD of the positive pointwise mutual information, u sqrt(sigma).

    PMI_ij = log( p_ij / (p_i q_j) ), with q proportional to (column sum)^smoothing: it damps the bonus of rare contexts
    (Levy, Goldberg & Dagan 2015). Each vector's sign is fixed by its largest entry.

    Args:
        pairs: (N, N) non-negative weights; the diagonal is left out.
    Returns:
        (N, dim) float32 with rows of norm 1; an item without positive information keeps a zero row, and dimensions
        beyond the matrix' rank are zero.
    Raises:
        MmsidError: not square, or negative or NaN weights.
    """
    weights = sp.csr_matrix(pairs, dtype=np.float64, copy=True)
    if weights.shape[0] != weights.shape[1]:
        raise MmsidError(f"co-engagement must be square (items x items), got {weights.shape}")
    if weights.nnz and not (np.isfinite(weights.data).all() and weights.data.min() >= 0):
        raise MmsidError("co-engagement weights must be finite and not negative; check the pair builder")
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
    context = np.asarray(weights.sum(axis=0)).ravel() ** smoothing
    context /= context.sum()
    information = np.log(entries.data / row_sums[entries.row] / context[entries.col])  # p_ij / p_i = w_ij / row sum: `total` cancels
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
    silent = norms < 1e-9 * norms.max()  # rounding dust of items without information must not be blown up to norm 1
    result[:, : vectors.shape[1]] = np.where(silent, 0.0, vectors / np.where(silent, 1.0, norms))
    return result


def fuse(text: np.ndarray, behaviour: np.ndarray, weight: float = 1.0) -> np.ndarray:
    """[text normalised ; weight x behaviour]: (N, D) and (N, M) -> (N, D + M) float32. Zero rows stay zero.

    Raises:
        ValueError: the numbers of rows differ.
    """
    text, behaviour = np.asarray(text, dtype=np.float32), np.asarray(behaviour, dtype=np.float32)
    if len(text) != len(behaviour):
        raise ValueError(f"text has {len(text)} rows, behaviour {len(behaviour)}")
    norms = np.linalg.norm(text, axis=1, keepdims=True)
    return np.concatenate([text / np.where(norms > 0, norms, 1.0), np.float32(weight) * behaviour], axis=1)


def _truncated_svd(matrix: sp.csr_matrix, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Left vectors (N, d) and values (d,), descending, d <= dim."""
    if matrix.shape[0] <= max(_DENSE_BELOW, dim + 1):
        left, sigma, _ = np.linalg.svd(matrix.toarray(), full_matrices=False)
        return left[:, :dim], sigma[:dim]
    start = np.random.default_rng(seed).normal(size=matrix.shape[0])
    left, sigma, _ = svds(matrix, k=dim, v0=start, solver="arpack", return_singular_vectors="u")
    order = np.argsort(-sigma, kind="stable")
    return left[:, order], sigma[order]
