"""Embedding source of the hybrid recommender: cosine of a user vector with item embeddings, and nearest-neighbour search (faiss).

A user vector is the recency-weighted sum of the embeddings in the history. Small catalogues are searched exactly, large ones
by an inverted file (IVF) whose centroids are fitted on the items the recommender is trained with.
"""

from __future__ import annotations

import faiss
import numpy as np

from mmsid.recommend.history_batch import HistoryBatch

EXACT_UP_TO = 50_000  # items: below, the search compares all items
LISTS_PER_ROOT = 4  # an inverted file has 4 sqrt(N) lists
PROBED = 1 / 64  # share of the lists that a search reads
TRAINED_ON = 64  # vectors per list that the centroids are fitted on
DECAYS = (0.0, 0.85)
PROPOSING = 0.85


class EmbeddingSource:
    """Scores and proposals by embeddings.

    Args:
        embeddings: (N, D) float32, rows of norm one or zero (`unit_rows`).
        centroids: (lists, D) of the inverted file, as `fit_centroids` returns them; None for an exact search.
    """

    def __init__(self, embeddings: np.ndarray, centroids: np.ndarray | None = None) -> None:
        self.embeddings, self.centroids = embeddings, centroids
        dim = self.embeddings.shape[1]
        if centroids is None:
            self.index = faiss.IndexFlatIP(dim)
        else:
            coarse = faiss.IndexFlatIP(dim)
            coarse.add(np.ascontiguousarray(centroids, dtype=np.float32))
            # half precision: candidates are scored again from the embeddings
            self.index = faiss.IndexIVFScalarQuantizer(
                coarse, dim, len(centroids), faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
            )
            self.index.is_trained = True
            self._coarse = coarse  # faiss does not own it
        self.index.add(self.embeddings)

    def add(self, embeddings: np.ndarray) -> None:
        """Append items (M, D), rows of norm one or zero."""
        self.embeddings = np.concatenate([self.embeddings, embeddings])
        self.index.add(embeddings)

    def propose(self, batch: HistoryBatch, count: int) -> dict[str, np.ndarray]:
        """Proposed items (B, count) by source name, best first, padded with -1."""
        excluded = max((len(items) for items in batch.excluded), default=0)
        wanted = min(count + excluded, self.index.ntotal)
        settings = {}
        if batch.allowed is not None:
            settings["sel"] = faiss.IDSelectorBitmap(np.packbits(batch.allowed, bitorder="little"))
        if self.centroids is None:
            parameters = faiss.SearchParameters(**settings)
        else:
            parameters = faiss.SearchParametersIVF(nprobe=max(8, round(PROBED * len(self.centroids))), **settings)
        _, items = self.index.search(self._queries(batch, PROPOSING), wanted, params=parameters)
        return {"embedding": batch.first(items, count)}

    def scores(self, batch: HistoryBatch, items: np.ndarray) -> dict[str, np.ndarray]:
        """Scores float32 (B, C) of items (B, C) by source name."""
        queries = np.stack([self._queries(batch, decay) for decay in DECAYS], -1)  # (B, D, decays)
        found = np.stack([self.embeddings[row] @ query for row, query in zip(items, queries, strict=True)])
        return {f"embedding {decay}": found[..., place] for place, decay in enumerate(DECAYS)}

    def _queries(self, batch: HistoryBatch, decay: float) -> np.ndarray:
        """User vectors float32 (B, D)."""
        unlisted = None if batch.unlisted is None else batch.unlisted.embeddings
        return batch.memo(("embedding", decay), lambda: np.asarray(batch.weighted_sum(decay, self.embeddings, unlisted), dtype=np.float32))


def fit_centroids(embeddings: np.ndarray) -> np.ndarray | None:
    """Centroids float32 (4 sqrt(N), D) of the inverted file of embeddings (N, D), None for a small catalogue.

    They are fitted by spherical k-means on an even sample of the rows.
    """
    if len(embeddings) <= EXACT_UP_TO:
        return None
    lists = round(LISTS_PER_ROOT * len(embeddings) ** 0.5)
    rows = np.linspace(0, len(embeddings) - 1, min(len(embeddings), TRAINED_ON * lists)).astype(np.int64)
    kmeans = faiss.Kmeans(embeddings.shape[1], lists, niter=10, seed=0, spherical=True, min_points_per_centroid=1)
    kmeans.train(embeddings[rows])
    return kmeans.centroids


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows divided by their norms, float32; zero rows stay zero."""
    vectors = np.asarray(vectors, dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)
