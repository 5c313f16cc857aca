"""Behaviour vectors: factorised co-engagement (PPMI-SVD), and their fusion with text embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import svds

from mmsid.errors import MmsidError

_DENSE_BELOW = 600  # up to this number of rows, an exact dense decomposition is as fast as the iterative one
_MIN_SIGMA = 1e-6  # relative size below which a singular value is rounding noise
_MIN_INFORMATION = 1e-9  # nats below which PMI is rounding noise
_SMOOTHING = 0.75  # exponent of the context distribution (Levy, Goldberg & Dagan 2015)


@dataclass(frozen=True)
class CoEngagementFactors:
    """Truncated SVD of the positive pointwise mutual information (PPMI) of co-engagement, in a form that gives vectors of any item.

    PMI_ij = log( p(j | i) / q_j ) with q proportional to (column sum)^0.75, which lowers the PMI of rare contexts (Levy, Goldberg & Dagan
    2015). With PPMI = U S V^T, the vector of a row is its PPMI times V S^(-1/2), which equals U S^(1/2) for the rows of the fit.

    Attributes:
        context: (N, M) float32, V S^(-1/2). The sign of each dimension is fixed by the largest entry of U. Dimensions beyond the rank of
            the matrix are zero.
        log_share: (N,) float64, log q of every context item; 0 for items without co-engagement, whose PMI is then never positive.
    """

    context: np.ndarray
    log_share: np.ndarray

    @classmethod
    def fit(cls, pairs: sp.spmatrix, dim: int = 64, seed: int = 0) -> CoEngagementFactors:
        """Factorise weights (N, N), which must be non-negative; the diagonal is ignored.

        Raises:
            MmsidError: `pairs` is not square, or has negative or NaN weights.
            ValueError: `dim` is not positive.
        """
        if pairs.shape[0] != pairs.shape[1]:
            raise MmsidError(f"co-engagement must be square (items x items), got {pairs.shape}")
        if dim < 1:
            raise ValueError(f"dim must be positive, got {dim}")
        weights = _without_diagonal(pairs)
        columns = np.asarray(weights.sum(axis=0)).ravel() ** _SMOOTHING
        with np.errstate(divide="ignore", invalid="ignore"):
            log_share = np.where(columns > 0, np.log(columns / columns.sum()), 0.0)
        context = np.zeros((weights.shape[0], dim), dtype=np.float32)
        ppmi = _ppmi(weights, log_share)
        if ppmi.nnz:
            left, sigma = _truncated_svd(ppmi, min(dim, weights.shape[0]), seed)
            rank = sigma > _MIN_SIGMA * sigma[0]
            left, sigma = left[:, rank], sigma[rank]
            largest = left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])]
            context[:, : left.shape[1]] = (ppmi.T @ left) * np.where(largest < 0, -1.0, 1.0) * sigma**-1.5
        return cls(context, log_share)

    def vectors(self, pairs: sp.spmatrix) -> np.ndarray:
        """Behaviour vectors of items: weights (n, N) to the context items -> (n, M) float32, rows of norm 1.

        A row without positive PMI is zero. A row depends on its own weights only.
        """
        found = _ppmi(sp.csr_matrix(pairs, dtype=np.float64), self.log_share) @ self.context.astype(np.float64)
        norms = np.linalg.norm(found, axis=1, keepdims=True)
        return (found / np.where(norms > 0, norms, 1.0)).astype(np.float32)


def ppmi_svd(pairs: sp.spmatrix, dim: int = 64, seed: int = 0) -> np.ndarray:
    """Behaviour vectors (N, dim) of the items of a co-engagement matrix (N, N); see `CoEngagementFactors`."""
    return CoEngagementFactors.fit(pairs, dim, seed).vectors(_without_diagonal(pairs))


def _without_diagonal(pairs: sp.spmatrix) -> sp.csr_matrix:
    weights = sp.csr_matrix(pairs, dtype=np.float64, copy=True)
    if weights.nnz and not (np.isfinite(weights.data).all() and weights.data.min() >= 0):
        raise MmsidError("co-engagement weights must be finite and not negative; check how the pairs were made")
    weights.setdiag(0)
    weights.eliminate_zeros()
    return weights


def _ppmi(weights: sp.csr_matrix, log_share: np.ndarray) -> sp.csr_matrix:
    """Positive PMI of rows (n, N): log( w_ij / row sum ) - log q_j where that is positive."""
    entries = weights.tocoo()
    row_sums = np.asarray(weights.sum(axis=1)).ravel()
    information = np.log(entries.data / row_sums[entries.row]) - log_share[entries.col]
    keep = information > _MIN_INFORMATION
    return sp.csr_matrix((information[keep], (entries.row[keep], entries.col[keep])), shape=weights.shape)


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
