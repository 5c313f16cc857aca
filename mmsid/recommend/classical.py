"""Classical baselines: popularity, item-kNN, TF-IDF kNN and the classical hybrid, tuned on valid.

Similarities use train prefixes alone, and histories are weighted by recency, decay^(steps back). Item-kNN counts pairs
within 5 steps, weight 1 / distance, divided by the root of both items' train counts. TF-IDF uses words and bigrams of
title, attributes, categories and description. The hybrid is kNN + weight x TF-IDF. Parameters maximise valid NDCG@10.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse

from mmsid.catalog.coengagement import co_engagement
from mmsid.catalog.item import Item
from mmsid.catalog.splits import Split
from mmsid.recommend.evaluate import Score, evaluate
from mmsid.recommend.sparse_rows import history_weights
from mmsid.recommend.words import fit_words

CLASSICAL_NAMES = ("popularity", "item_knn", "tfidf_knn", "hybrid_knn")
WINDOW = 5
DECAYS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
TUNING_USERS = 10_000
DENSE_UP_TO = 12_500  # items; the dense matrix of text similarities takes 4 N^2 bytes


@dataclass(frozen=True)
class ClassicalBaseline:
    """A classical ranker: its scoring function, the parameters tuned on valid, and the seconds of tuning."""

    name: str
    score: Score
    parameters: dict[str, float]
    seconds: float


class _Similarities(NamedTuple):
    knn: sparse.csr_matrix  # (N, N)
    text: sparse.csr_matrix  # (N, V), rows of norm one or zero
    text_similarity: np.ndarray | None  # (N, N) float32, None for a large catalogue


def classical_baselines(items: list[Item], split: Split) -> list[ClassicalBaseline]:
    """Fit and tune popularity, item-kNN, TF-IDF kNN and the classical hybrid."""
    started = time.perf_counter()
    num_items, similarities = len(items), _similarities(items, split)
    popularity = torch.from_numpy(item_counts(split.train, num_items, split.train_weights).astype(np.float32))
    baselines = [ClassicalBaseline("popularity", lambda histories: popularity.repeat(len(histories), 1), {}, time.perf_counter() - started)]
    chosen: dict[str, float] = {}
    for name, grid in (
        ("item_knn", [{"knn_decay": decay} for decay in DECAYS]),
        ("tfidf_knn", [{"text_decay": decay} for decay in DECAYS]),
        ("hybrid_knn", [{"text_weight": weight} for weight in WEIGHTS]),
    ):
        started = time.perf_counter()
        base = chosen if name == "hybrid_knn" else {}
        figures = [
            evaluate(_scorer(similarities, base | point), split, "valid", num_items, TUNING_USERS).summary()["NDCG@10"] for point in grid
        ]
        point = base | grid[int(np.argmax(figures))]
        chosen |= point
        baselines.append(ClassicalBaseline(name, _scorer(similarities, point), point, time.perf_counter() - started))
    return baselines


def classical_scorers(items: list[Item], split: Split, parameters: Mapping[str, dict[str, float]]) -> dict[str, Score]:
    """Scoring functions of several classical baselines by name, from one computation of the similarities."""
    similarities = _similarities(items, split)
    return {name: _scorer(similarities, point) for name, point in parameters.items()}


def item_counts(histories: Sequence[np.ndarray], num_items: int, weights: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """Number of occurrences (N,) of each item in the histories, or the sum of its event weights."""
    summed = None if weights is None else np.concatenate([*weights, np.zeros(0)])
    return np.bincount(np.concatenate([*histories, np.zeros(0, np.int64)]), summed, minlength=num_items)


def _similarities(items: list[Item], split: Split) -> _Similarities:
    _, text = fit_words(items)
    # one product of all pairs is much cheaper than a product per user
    dense = (text @ text.T).toarray() if len(items) <= DENSE_UP_TO else None
    return _Similarities(item_similarity(split.train, item_counts(split.train, len(items)), split.train_weights), text, dense)


def item_similarity(histories: Sequence[np.ndarray], counts: np.ndarray, weights: Sequence[np.ndarray] | None = None) -> sparse.csr_matrix:
    """Co-engagement within `WINDOW` steps, weight 1/distance, cosine-normalised by popularity; (N, N), empty diagonal."""
    scale = sparse.diags(1 / np.sqrt(np.maximum(counts, 1)))
    return (scale @ co_engagement(histories, len(counts), WINDOW, weights) @ scale).tocsr()


def _scorer(similarities: _Similarities, point: dict[str, float]) -> Score:
    num_items = similarities.knn.shape[0]
    text = similarities.text.T.tocsr()

    def score(histories: list[np.ndarray]) -> torch.Tensor:
        total = np.zeros((len(histories), num_items))
        if "knn_decay" in point:
            total += (history_weights(histories, num_items, point["knn_decay"]) @ similarities.knn).toarray()
        if "text_decay" in point:
            weights = history_weights(histories, num_items, point["text_decay"])
            dense = similarities.text_similarity
            matches = weights @ dense if dense is not None else (weights @ similarities.text @ text).toarray()
            total += point.get("text_weight", 1.0) * matches
        return torch.from_numpy(total)

    return score
