"""Greedy residual assignment with given code vectors: as fast as float32, and the same codes however items are batched.

The nearest code is sought in float32 matrix products. Their rounding differs between a row alone, in a batch and in another order,
so a row is decided there only if its best code leads by more than rounding can account for; the few others are decided in float64.
"""

from __future__ import annotations

import numpy as np

BLOCK_ROWS = 2048  # rows x codes of one level stay in the processor's cache
_UNIT = 2.0**-24  # float32 rounds by at most this, relatively
_TIE = 1e-10  # relative to the squared norms: float64 rounding, too, differs between a row alone and a row in a batch


def greedy_codes(x: np.ndarray, vectors: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Nearest used code of every level on what the levels before have left; ties go to the lowest index.

    |r_l - e|^2 = |r_l|^2 + |e|^2 - 2 x.e + 2 sum_{j<l} c_j.e: one product x.e per level, and the inner products of code vectors
    looked up. The float32 result is off by at most 2 (D + 8) u (|x| + sum_{j<l} max|e_j|) max|e_l|, u = 2^-24, from the bound
    n u of an inner product of n terms summed in any order (Higham 2002, 3.1); two distances by twice as much.

    Args:
        x: (N, D) float32; vectors: (L, K, D) float32; used: (L, K) bool.
    Returns:
        (N, L) int64. Memory beyond it: one block of rows.
    """
    num_levels, size, dim = vectors.shape
    exact = vectors.astype(np.float64)
    norms = np.where(used, np.square(exact).sum(-1), np.inf)
    reach = np.sqrt(np.square(exact).sum(-1).max(1))
    doubled = np.ascontiguousarray(-2 * vectors.transpose(0, 2, 1))  # a power of two: exact
    # cross[l][j] (K, K): what choosing a code of level j adds to the distances of level l; the norms of level l ride with j = 0
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
    """Nearest code of one level in float64: (n, D) rows and (n, level) codes chosen before -> (n,)."""
    residual = x.astype(np.float64)
    for j in range(level):
        residual -= vectors[j][chosen[:, j]]
    distance = norms - 2 * residual @ vectors[level].T
    finite = norms[np.isfinite(norms)].max()
    margin = _TIE * (np.square(residual).sum(1, keepdims=True) + finite)
    return (distance <= distance.min(axis=1, keepdims=True) + margin).argmax(axis=1)  # numpy promises the first of equals
