"""Retrieval evidence of the hybrid recommender: statistics and similarities that score all items, given a history.

Each source weights the items of a history by recency, decay^(steps back); decay 0 uses the last item alone. Sources are
co-engagement near by (near), in time order (next), over whole histories (far) and in the same history (basket), TF-IDF
(words), dense text embeddings (embedding), attribute labels (labels) and popularity. They use train prefixes and item
content only. Nothing is fitted here; `hybrid.py` learns the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from mmsid.catalog.coengagement import co_engagement, followed_by
from mmsid.catalog.items import Item
from mmsid.recommend.classical import WINDOW, history_weights, item_counts, item_similarity, text_vectors

FAR = 50  # steps; nearly all histories are shorter
COUNT_SOURCES = ("near", "next", "far", "basket")  # sparse and heavy-tailed


class Evidence:
    """Scores of all items from each source of evidence.

    Args:
        items: of the catalogue, in its order.
        embeddings: (N, D) dense text embeddings of unit norm.
        histories: train prefixes that the statistics are computed from.
    """

    def __init__(self, items: Sequence[Item], embeddings: np.ndarray, histories: Sequence[np.ndarray]) -> None:
        histories = [history for history in histories if len(history)]
        num_items = self.num_items = len(items)
        counts = item_counts(histories, num_items)
        scale = sparse.diags(1 / np.sqrt(np.maximum(counts, 1)))
        self.popularity = np.log1p(counts).astype(np.float32)
        self.near = item_similarity(histories, counts)
        self.next = (scale @ followed_by(histories, num_items, WINDOW) @ scale).tocsr()
        self.far = (scale @ co_engagement(histories, num_items, window=FAR) @ scale).tocsr()
        self.basket = (scale @ _baskets(histories, num_items) @ scale).tocsr()
        self.text, self.labels = text_vectors(list(items)), _label_vectors(items)
        self.embeddings = np.asarray(embeddings, dtype=np.float32)

    def __call__(self, histories: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Scores float32 (B, N) of all items by source name, for non-empty histories."""
        rows = {decay: history_weights(list(histories), self.num_items, decay) for decay in (0.3, 0.6, 0.85, 1.0)}
        rows[0.0] = history_weights([history[-1:] for history in histories], self.num_items, 1.0)
        scores = {f"near {decay}": rows[decay] @ self.near for decay in (0.3, 0.6, 0.85)}
        scores |= {f"next {decay}": rows[decay] @ self.next for decay in (0.0, 0.6)}
        scores |= {"far 0.85": rows[0.85] @ self.far, "basket 1.0": rows[1.0] @ self.basket}
        scores |= {f"words {decay}": rows[decay] @ self.text @ self.text.T for decay in (0.0, 0.3, 0.6, 0.85)}
        scores |= {f"labels {decay}": rows[decay] @ self.labels @ self.labels.T for decay in (0.0, 0.6)}
        dense = {name: np.asarray(values.toarray(), dtype=np.float32) for name, values in scores.items()}
        dense |= {f"embedding {decay}": (rows[decay] @ self.embeddings) @ self.embeddings.T for decay in (0.0, 0.85)}
        return dense | {"popularity": np.broadcast_to(self.popularity, (len(histories), self.num_items))}


def ranker_features(scores: dict[str, np.ndarray]) -> np.ndarray:
    """Features float32 (..., F) of the ranker. Sources made of counts enter by logarithm and by root, all others unchanged."""
    features = []
    for name, values in scores.items():
        if name.startswith(COUNT_SOURCES):
            features += [np.log1p(1000 * np.maximum(values, 0)) / 3, np.sqrt(100 * np.maximum(values, 0))]
        else:
            features.append(values)
    return np.stack(features, -1).astype(np.float32)


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


def _label_vectors(items: Sequence[Item]) -> sparse.csr_matrix:
    """TF-IDF vectors of attribute labels and category names, each label one term; rows of norm one or zero."""
    labels = [
        [f"{name}={label}" for name, values in sorted(item.attributes.items()) for label in values]
        + [f"category={name}" for name in item.categories]
        for item in items
    ]
    if not any(labels):
        return sparse.csr_matrix((len(items), 1), dtype=np.float32)
    return TfidfVectorizer(analyzer=lambda terms: terms, dtype=np.float32).fit_transform(labels).tocsr()
