"""Co-engagement source of the hybrid recommender: sparse item-to-item statistics of train histories.

Four matrices count pairs near by (near), in time order (next), over whole histories (far) and in the same history (basket),
each divided by the root of both items' counts. Each row keeps its best neighbours only, so that a large catalogue fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import sparse

from mmsid.catalog.coengagement import co_engagement, followed_by
from mmsid.recommend.classical import WINDOW, item_counts, item_similarity
from mmsid.recommend.history_batch import HistoryBatch
from mmsid.recommend.sparse_rows import heaviest, values_at

FAR = 50  # steps; nearly all histories are shorter
NEIGHBOURS = 256  # kept per item and matrix
SCORES = {"near": (0.3, 0.6, 0.85), "next": (0.0, 0.6), "far": (0.85,), "basket": (1.0,)}  # matrix -> decays of the history weights
PROPOSING = {"near": 0.6, "next": 0.6, "far": 0.85}


class CoEngagementSource:
    """Scores and proposals from co-engagement matrices.

    Args:
        matrices: name -> (M, M) sparse, row: item of the history, column: candidate. M <= N: rows from M on were added later
            and have no statistics.
    """

    def __init__(self, matrices: Mapping[str, sparse.csr_matrix]) -> None:
        self.matrices = dict(matrices)

    @classmethod
    def fit(cls, histories: Sequence[np.ndarray], num_items: int, weights: Sequence[np.ndarray] | None = None) -> CoEngagementSource:
        """Count the pairs of train histories; event weights of each history multiply (`co_engagement`), except in `basket`."""
        counts = item_counts(histories, num_items)
        scale = sparse.diags(1 / np.sqrt(np.maximum(counts, 1)))
        whole = {
            "near": item_similarity(histories, counts, weights),
            "next": scale @ followed_by(histories, num_items, WINDOW, weights) @ scale,
            "far": scale @ co_engagement(histories, num_items, FAR, weights) @ scale,
            "basket": scale @ _baskets(histories, num_items) @ scale,
        }
        return cls({name: heaviest(matrix.tocsr(), NEIGHBOURS) for name, matrix in whole.items()})

    def propose(self, batch: HistoryBatch, count: int) -> dict[str, np.ndarray]:
        """Proposed items (B, count) by source name, best first, padded with -1."""
        return {name: batch.best(self._product(batch, name, decay), count) for name, decay in PROPOSING.items()}

    def scores(self, batch: HistoryBatch, items: np.ndarray) -> dict[str, np.ndarray]:
        """Scores float32 (B, C) of items (B, C) by source name."""
        return {
            f"{name} {decay}": values_at(self._product(batch, name, decay), items) for name, decays in SCORES.items() for decay in decays
        }

    def _product(self, batch: HistoryBatch, name: str, decay: float) -> sparse.csr_matrix:
        matrix = self.matrices[name]
        size = matrix.shape[0]
        return batch.memo((name, decay), lambda: (batch.weights(decay)[:, :size] @ matrix).tocsr())


def _baskets(histories: Sequence[np.ndarray], num_items: int) -> sparse.csr_matrix:
    """Number of histories (N, N) that contain both items, at any distance; empty diagonal."""
    users = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    items = np.concatenate([*histories, np.zeros(0, np.int64)]).astype(np.int64)
    present = sparse.csr_matrix((np.ones(len(items)), (users, items)), shape=(len(histories), num_items))
    present.data[:] = 1.0
    together = (present.T @ present).tocsr()
    together.setdiag(0)
    together.eliminate_zeros()
    return together
