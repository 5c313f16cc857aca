"""Greedy residual assignment to given code vectors, at float32 speed and with codes that do not depend on the batching.

The nearest code is found by float32 matrix products. Their rounding depends on batch size and row order, so a row is decided in
float32 only if its best code leads by more than the rounding error. The few other rows are decided in float64.
"""

from __future__ import annotations

import numpy as np

BLOCK_ROWS = 2048  # the distances of one level (rows x codes) stay in the CPU cache
_UNIT = 2.0**-24  # relative rounding error of float32
_TIE = 1e-10  # relative to the squared norms; distances this close are ties, because float64 rounding depends on the batch as well


def greedy_codes(x: np.ndarray, vectors: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Nearest used code of every level, on the residual of the previous levels; ties go to the lowest index.

    |r_l - e|^2 = |r_l|^2 + |e|^2 - 2 x.e + 2 sum_{j<l} c_j.e. Each level needs one product x.e; the inner products of code vectors
    are computed once. The error of a float32 distance is at most 2 (D + 8) u (|x| + sum_{j<l} max|e_j|) max|e_l|, u = 2^-24, by the
    bound n u of an inner product of n terms in any order of summation (Higham 2002, 3.1). The difference of two distances has twice
    this error.

    Args:
        x: (N, D) float32. vectors: (L, K, D) float32. used: (L, K) bool.
    Returns:
        (N, L) int64. Additional memory: one block of rows.
    """
    num_levels, size, dim = vectors.shape
    exact = vectors.astype(np.float64)
    norms = np.where(used, np.square(exact).sum(-1), np.inf)
    reach = np.sqrt(np.square(exact).sum(-1).max(1))
    doubled = np.ascontiguousarray(-2 * vectors.transpose(0, 2, 1))  # a factor of two is exact
    # cross[l][j] (K, K): contribution of the chosen code of level j to the distances of level l; j = 0 includes the norms of level l
    cross = [
        [(2 * exact[j] @ exact[level].T + (norms[level] if j == 0 else 0)).astype(np.float32) for j in range(level)]
        for level in range(num_levels)
    ]
    first_norms = norms[0].astype(np.float32)
    codes = np.empty((len(x), num_levels), dtype=np.int64)
    for start in range(0, len(x), BLOCK_ROWS):
        block = np.ascontiguousarray(x[start : start + BLOCK_ROWS])
        found = codes[start : start + BLOCK_ROWS]
        span = np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))
        for level in range(num_levels):
            distance = block @ doubled[level]
            if level == 0:
                distance += first_norms
            for j in range(level):
                distance += cross[level][j][found[:, j]]
            length = span + reach[level]
            margin = 4 * (dim + 8) * _UNIT * length * reach[level] + 2 * _TIE * np.square(length)
            limit = distance.min(axis=1) + margin.astype(np.float32)
            row, code = np.divmod(np.flatnonzero(distance <= limit[:, None]), size)
            first = np.flatnonzero(np.diff(row, prepend=-1))
            found[:, level] = code[first]
            if len(row) > len(block):
                unsure = np.flatnonzero(np.diff(np.append(first, len(row))) > 1)
                found[unsure, level] = _exact(block[unsure], found[unsure, :level], exact, norms[level], level)
            span += reach[level]
    return codes


def _exact(x: np.ndarray, chosen: np.ndarray, vectors: np.ndarray, norms: np.ndarray, level: int) -> np.ndarray:
    """Nearest code of one level in float64: (n, D) rows and (n, level) codes of the previous levels -> (n,)."""
    residual = x.astype(np.float64)
    for j in range(level):
        residual -= vectors[j][chosen[:, j]]
    distance = norms - 2 * residual @ vectors[level].T
    finite = norms[np.isfinite(norms)].max()
    margin = _TIE * (np.square(residual).sum(1, keepdims=True) + finite)
    return (distance <= distance.min(axis=1, keepdims=True) + margin).argmax(axis=1)  # argmax returns the first of equal values
