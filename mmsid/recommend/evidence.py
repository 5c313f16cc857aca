"""Retrieval evidence: what a classical recommender knows about every item, given a history. Train prefixes and content only.

Each source scores all items from what the user did, weighted by recency (decay^(steps back); decay 0: the last item alone):
co-engagement near by, in the order of time, in whole histories, and in baskets; TF-IDF, MiniLM and label similarity; popularity.
Nothing here is fitted: `grounded.py` learns how much each source is worth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from mmsid.catalog.coengagement import co_engagement, followed_by
from mmsid.catalog.items import Item
from mmsid.recommend.classical import WINDOW, history_weights, item_similarity, text_vectors

FAR = 50  # steps: a whole history, nearly always
COUNTS = ("near", "next", "far", "basket")  # sources made of counts: sparse, heavy-tailed


class Evidence:
    """The sources, ready for any history.

    Args:
        items: of the catalogue, in its order.
        embeddings: (N, D) dense text embeddings of unit length.
        histories: train prefixes that statistics may be taken from.
    """

    def __init__(self, items: Sequence[Item], embeddings: np.ndarray, histories: Sequence[np.ndarray]) -> None:
        histories = [history for history in histories if len(history)]
        num_items = self.num_items = len(items)
        counts = np.bincount(np.concatenate([*histories, np.zeros(0, np.int64)]), minlength=num_items)
        damp = sparse.diags(1 / np.sqrt(np.maximum(counts, 1)))
        self.popularity = np.log1p(counts).astype(np.float32)
        self.near = item_similarity(histories, counts)
        self.next = (damp @ followed_by(histories, num_items, WINDOW) @ damp).tocsr()
        self.far = (damp @ co_engagement(histories, num_items, window=FAR) @ damp).tocsr()
        self.basket = (damp @ _baskets(histories, num_items) @ damp).tocsr()
        self.text, self.labels = text_vectors(list(items)), _label_vectors(items)
        self.embeddings = np.asarray(embeddings, dtype=np.float32)

    def __call__(self, histories: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Source -> scores (B, N) float32 of all items, for non-empty histories."""
        rows = {decay: history_weights(list(histories), self.num_items, decay) for decay in (0.3, 0.6, 0.85, 1.0)}
        rows[0.0] = history_weights([history[-1:] for history in histories], self.num_items, 1.0)
        found = {f"near {decay}": rows[decay] @ self.near for decay in (0.3, 0.6, 0.85)}
        found |= {f"next {decay}": rows[decay] @ self.next for decay in (0.0, 0.6)}
        found |= {"far 0.85": rows[0.85] @ self.far, "basket 1.0": rows[1.0] @ self.basket}
        found |= {f"words {decay}": rows[decay] @ self.text @ self.text.T for decay in (0.0, 0.3, 0.6, 0.85)}
        found |= {f"labels {decay}": rows[decay] @ self.labels @ self.labels.T for decay in (0.0, 0.6)}
        dense = {name: np.asarray(scores.toarray(), dtype=np.float32) for name, scores in found.items()}
        dense |= {f"meaning {decay}": (rows[decay] @ self.embeddings) @ self.embeddings.T for decay in (0.0, 0.85)}
        return dense | {"popularity": np.broadcast_to(self.popularity, (len(histories), self.num_items))}


def columns(scores: dict[str, np.ndarray]) -> np.ndarray:
    """The sources as a ranker reads them, float32 (..., F): counts enter by logarithm and by root, to keep both ends apart."""
    read = []
    for name, values in scores.items():
        if name.startswith(COUNTS):
            read += [np.log1p(1000 * np.maximum(values, 0)) / 3, np.sqrt(100 * np.maximum(values, 0))]
        else:
            read.append(values)
    return np.stack(read, -1).astype(np.float32)


def _baskets(histories: Sequence[np.ndarray], num_items: int) -> sparse.csr_matrix:
    """In how many histories two items stand together, whatever their distance; (N, N), empty diagonal."""
    users = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    items = np.concatenate([*histories, np.zeros(0, np.int64)]).astype(np.int64)
    held = sparse.csr_matrix((np.ones(len(items)), (users, items)), shape=(len(histories), num_items))
    held.data[:] = 1.0
    together = (held.T @ held).tocsr()
    together.setdiag(0)
    together.eliminate_zeros()
    return together


def _label_vectors(items: Sequence[Item]) -> sparse.csr_matrix:
    """Attribute labels and category names as words of their own, rarity-weighted, rows of length one or zero."""
    labels = [
        [f"{name}={label}" for name, values in sorted(item.attributes.items()) for label in values]
        + [f"category={name}" for name in item.categories]
        for item in items
    ]
    if not any(labels):
        return sparse.csr_matrix((len(items), 1), dtype=np.float32)
    return TfidfVectorizer(analyzer=lambda found: found, dtype=np.float32).fit_transform(labels).tocsr()
