"""Classical baselines without training: popularity, item-kNN, TF-IDF kNN, and their hybrid, tuned on valid.

Similarities come from train prefixes alone; histories are weighted by recency, decay^(steps back). Item-kNN: items
within 5 steps of each other, weight 1/distance, divided by the root of both items' train counts. TF-IDF: words and
bigrams of title, brand and other attributes, categories and description, sublinear, in at least two items. The hybrid
is kNN + weight x TF-IDF. Decays and weight are those with the best valid NDCG@10.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from mmsid.catalog.coengagement import co_engagement
from mmsid.catalog.items import Item
from mmsid.catalog.splits import Split
from mmsid.recommend.evaluate import Score, evaluate

CLASSICAL_NAMES = ("popularity", "item_knn", "tfidf_knn", "hybrid_knn")
WINDOW = 5
DECAYS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
TUNING_USERS = 10_000
DENSE_UP_TO = 12_500  # items; the matrix of all text similarities takes 4 N^2 bytes


@dataclass(frozen=True)
class ClassicalBaseline:
    """A tuned classical ranker: its scoring function, the parameters chosen on valid, and the seconds that took."""

    name: str
    score: Score
    parameters: dict[str, float]
    seconds: float


class _Parts(NamedTuple):
    knn: sparse.csr_matrix  # (N, N)
    text: sparse.csr_matrix  # (N, V), rows of length one or zero
    text_similarity: np.ndarray | None  # (N, N) float32, where it fits


def classical_baselines(items: list[Item], split: Split) -> list[ClassicalBaseline]:
    """Popularity, item-kNN, TF-IDF and hybrid, tuned on valid and ready to score."""
    started = time.perf_counter()
    num_items, parts = len(items), _parts(items, split)
    counts = np.bincount(np.concatenate([*split.train, np.zeros(0, np.int64)]), minlength=num_items)
    popularity = torch.from_numpy(counts.astype(np.float32))
    baselines = [ClassicalBaseline("popularity", lambda histories: popularity.repeat(len(histories), 1), {}, time.perf_counter() - started)]
    chosen: dict[str, float] = {}
    for name, grid in (
        ("item_knn", [{"knn_decay": decay} for decay in DECAYS]),
        ("tfidf_knn", [{"text_decay": decay} for decay in DECAYS]),
        ("hybrid_knn", [{"text_weight": weight} for weight in WEIGHTS]),
    ):
        started = time.perf_counter()
        base = chosen if name == "hybrid_knn" else {}
        found = [
            (evaluate(_scorer(parts, base | point), split, "valid", num_items, TUNING_USERS).summary()["NDCG@10"], point) for point in grid
        ]
        point = base | max(found, key=lambda pair: pair[0])[1]
        chosen |= point
        baselines.append(ClassicalBaseline(name, _scorer(parts, point), point, time.perf_counter() - started))
    return baselines


def classical_scorer(items: list[Item], split: Split, parameters: dict[str, float]) -> Score:
    """The scoring function of kNN, TF-IDF or hybrid with parameters that were tuned before."""
    return _scorer(_parts(items, split), parameters)


def _parts(items: list[Item], split: Split) -> _Parts:
    counts = np.bincount(np.concatenate([*split.train, np.zeros(0, np.int64)]), minlength=len(items))
    text = text_vectors(items)
    # once all pairs cost far less than every user's profile against all items
    return _Parts(item_similarity(split.train, counts), text, (text @ text.T).toarray() if len(items) <= DENSE_UP_TO else None)


def item_similarity(histories: list[np.ndarray], counts: np.ndarray) -> sparse.csr_matrix:
    """Co-engagement within `WINDOW` steps, weight 1/distance, cosine-normalised by popularity; (N, N), empty diagonal."""
    scale = sparse.diags(1 / np.sqrt(np.maximum(counts, 1)))
    return (scale @ co_engagement(histories, len(counts), window=WINDOW) @ scale).tocsr()


def text_vectors(items: list[Item]) -> sparse.csr_matrix:
    """TF-IDF rows (N, V) of unit length; items without known words have an empty row."""
    texts = []
    for item in items:
        labels = [label for _, values in sorted(item.attributes.items()) for label in values]
        further = [name for name in item.categories if name not in labels]  # a column may be mapped as both
        texts.append(" ".join([item.title, *labels, *further, item.description]))
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2), dtype=np.float32)
    try:
        return vectorizer.fit_transform(texts).tocsr()
    except ValueError:  # scikit-learn's answer to an empty vocabulary: no word stands in two items
        return sparse.csr_matrix((len(items), 1), dtype=np.float32)


def history_weights(histories: list[np.ndarray], num_items: int, decay: float) -> sparse.csr_matrix:
    """(B, N): decay^k at the item k steps back; an item that occurs twice adds up."""
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    steps = [np.arange(len(history) - 1, -1, -1) for history in histories]
    columns, back = (np.concatenate([*arrays, np.zeros(0, np.int64)]).astype(np.int64) for arrays in (histories, steps))
    return sparse.csr_matrix((decay**back, (rows, columns)), shape=(len(histories), num_items))


def _scorer(parts: _Parts, point: dict[str, float]) -> Score:
    num_items = parts.knn.shape[0]
    text = parts.text.T.tocsr()

    def score(histories: list[np.ndarray]) -> torch.Tensor:
        total = np.zeros((len(histories), num_items))
        if "knn_decay" in point:
            total += (history_weights(histories, num_items, point["knn_decay"]) @ parts.knn).toarray()
        if "text_decay" in point:
            weights = history_weights(histories, num_items, point["text_decay"])
            matched = weights @ parts.text_similarity if parts.text_similarity is not None else (weights @ parts.text @ text).toarray()
            total += point.get("text_weight", 1.0) * matched
        return torch.from_numpy(total)

    return score
