"""Nearest items by vectors, and the co-engagement that behaviour vectors imply."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

EXACT_UP_TO = 50_000  # items: below, all are compared
LISTS_PER_ROOT = 4  # above, an inverted file has 4 sqrt(N) lists, and a search reads a 64th of them, at least 8
TRAINED_ON = 64  # vectors per list that its centroids are fitted on
NEIGHBOURS = 20  # by behaviour
_BLOCK = 512


def smoothed_co_engagement(counts: sparse.spmatrix, vectors: NDArray) -> sparse.csr_matrix:
    """Co-engagement (N, N), half of whose weight is replaced by that of the neighbours that behaviour vectors (N, M) imply.

    Counts are sparse for all but popular items, and vectors lose which items directly follow each other. At one seed, codes refined
    on both ranked above those refined on either, on valid (docs/experiments/refinement_content.md). The total weight stays.
    """
    implied = implied_neighbours(vectors)
    if not implied.nnz:
        return sparse.csr_matrix(counts)
    return ((counts + implied * (counts.sum() / implied.sum())) / 2).tocsr()


def implied_neighbours(vectors: NDArray, count: int = NEIGHBOURS) -> sparse.csr_matrix:
    """Symmetric weights (N, N) of each item and the `count` nearest to it by behaviour vectors (N, M): their cosine, if positive.

    A pair in which each is near the other counts twice. An item whose vector is zero has no neighbours.
    """
    known = np.flatnonzero(np.any(vectors, axis=1))
    total = sparse.csr_matrix((len(vectors), len(vectors)))
    if len(known) > 1:
        near, cosine = nearest_items(vectors[known], count)
        rows, weight = np.repeat(known, near.shape[1]), np.maximum(cosine, 0.0).ravel().astype(np.float64)
        half = sparse.csr_matrix((weight, (rows, known[near].ravel())), shape=total.shape)
        total = (half + half.T).tocsr()
        total.eliminate_zeros()
        total.sort_indices()
    return total


def nearest_items(vectors: NDArray, count: int) -> tuple[NDArray[np.int64], NDArray]:
    """The `count` nearest other items of each by the cosine of vectors (N, H), nearest first, and their cosines.

    Both (N, count), or (N, N - 1) in a smaller catalogue. Above `EXACT_UP_TO` items the search is approximate;
    where it finds fewer items, an item is its own neighbour with a cosine of -1.
    """
    unit = (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)).astype(np.float32)
    count = min(count, len(unit) - 1)
    if len(unit) > EXACT_UP_TO:
        return _search(unit, count)
    near, cosine = np.empty((len(unit), count), dtype=np.int64), np.empty((len(unit), count))
    for start in range(0, len(unit), _BLOCK):
        close = unit[start : start + _BLOCK] @ unit.T
        close[np.arange(len(close)), np.arange(start, start + len(close))] = -np.inf
        best = np.argpartition(-close, count - 1, axis=1)[:, :count]
        best = np.take_along_axis(best, np.take_along_axis(-close, best, axis=1).argsort(axis=1, kind="stable"), axis=1)
        near[start : start + _BLOCK], cosine[start : start + _BLOCK] = best, np.take_along_axis(close, best, axis=1)
    return near, cosine


def _search(unit: NDArray, count: int) -> tuple[NDArray[np.int64], NDArray]:
    """`nearest_items` by an inverted file (faiss)."""
    lists = round(LISTS_PER_ROOT * len(unit) ** 0.5)
    index = faiss.index_factory(unit.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.train(unit[:: max(1, len(unit) // (TRAINED_ON * lists))])
    index.add(unit)
    index.nprobe = max(8, lists // 64)
    near, cosine = np.empty((len(unit), count), dtype=np.int64), np.empty((len(unit), count))
    for start in range(0, len(unit), 16 * _BLOCK):
        found, items = index.search(unit[start : start + 16 * _BLOCK], count + 1)
        own = np.arange(start, start + len(items))[:, None]
        found = np.where((items == own) | (items < 0), -1.0, found)
        best = np.argsort(-found, axis=1, kind="stable")[:, :count]
        near[start : start + len(items)] = np.take_along_axis(np.where(items < 0, own, items), best, axis=1)
        cosine[start : start + len(items)] = np.take_along_axis(found, best, axis=1)
    return near, cosine
