"""Operations on the rows of sparse matrices: recency weights of histories, truncation to the largest values, and lookups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse


def history_weights(histories: Sequence[np.ndarray], num_items: int, decay: float) -> sparse.csr_matrix:
    """Recency weights (B, N): decay^k for the item k steps back. The weights of repeated items add up."""
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    steps = [np.arange(len(history) - 1, -1, -1) for history in histories]
    columns, back = (np.concatenate([*arrays, np.zeros(0, np.int64)]).astype(np.int64) for arrays in (histories, steps))
    return sparse.csr_matrix((decay**back, (rows, columns)), shape=(len(histories), num_items))


def heaviest(matrix: sparse.csr_matrix, count: int) -> sparse.csr_matrix:
    """Keep the `count` largest values of every row. Ties go to the lower column."""
    matrix.sort_indices()
    kept = np.ones(matrix.nnz, dtype=bool)
    for row in np.flatnonzero(np.diff(matrix.indptr) > count):
        part = slice(matrix.indptr[row], matrix.indptr[row + 1])
        kept[part] = False
        kept[part.start + np.argsort(-matrix.data[part], kind="stable")[:count]] = True
    indptr = np.concatenate([[0], np.cumsum(kept)])[matrix.indptr]
    return sparse.csr_matrix((matrix.data[kept].astype(np.float32), matrix.indices[kept], indptr), shape=matrix.shape)


def values_at(scores: sparse.csr_matrix, items: np.ndarray) -> np.ndarray:
    """Values float32 (B, C) of sparse scores (B, N) at items (B, C); 0 where nothing is stored."""
    scores.sort_indices()
    found = np.zeros(items.shape, dtype=np.float32)
    for user, row in enumerate(items):
        part = slice(scores.indptr[user], scores.indptr[user + 1])
        stored = scores.indices[part]
        if len(stored):
            place = np.searchsorted(stored, row).clip(max=len(stored) - 1)
            found[user] = np.where(stored[place] == row, scores.data[part][place], 0)
    return found
