"""Retrieval recall R@K of co-engaged items, by an embedding and by the codes made from it, under one protocol.

Candidates are the whole catalogue, or one positive among 999 negatives (UniSID, table 3). The second figure is the exact
expectation over all draws, without sampling noise. Equal similarities count at expectation, which matters because codes tie often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.special import gammaln

_BLOCK = 128  # queries per block; 128 x N similarities are held at once
_TIE = 1e-5  # cosines closer than this count as equal: exact duplicates must tie in any order of summation

# (n,) query rows -> (n, N) similarity to every item, as a new array that the caller may overwrite
Similarity = Callable[[np.ndarray], np.ndarray]


def retrieval_recall(
    embeddings: np.ndarray, pairs: np.ndarray, ks: tuple[int, ...] = (1, 5, 10, 20), negatives: int = 999, max_pairs: int = 20_000
) -> dict[str, dict[str, float]]:
    """R@K by cosine for pairs (query row, positive row).

    `full` ranks the whole catalogue. `sampled` ranks the positive among `negatives` items drawn without replacement, at expectation
    (hypergeometric); a smaller catalogue uses all its items. Both leave out the query and all other items paired with it in either
    direction, because these are no negatives.

    Args:
        embeddings: (N, D), for example sums of code vectors.
        pairs: (P, 2).
        max_pairs: upper limit; more pairs are thinned evenly.
    Returns:
        {"full": {"1": ..., ...}, "sampled": {...}, "chance_full": {...}}; chance is the figure of random similarities.
    Raises:
        ValueError: no pair of two different items.
    """
    x = np.asarray(embeddings, dtype=np.float32)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x = x / np.where(norms > 0, norms, 1)
    return _recall(lambda rows: x[rows] @ x.T, len(x), pairs, ks, negatives, max_pairs)


def prefix_recall(
    codes: np.ndarray, pairs: np.ndarray, ks: tuple[int, ...] = (1, 5, 10, 20), negatives: int = 999, max_pairs: int = 20_000
) -> dict[str, dict[str, float]]:
    """`retrieval_recall` for (N, L) codes; items are ranked by the length of the prefix that they share with the query."""
    codes = np.ascontiguousarray(np.asarray(codes).T, dtype=np.int32)

    def shared(rows: np.ndarray) -> np.ndarray:
        same, length = np.ones((len(rows), codes.shape[1]), dtype=bool), np.zeros((len(rows), codes.shape[1]), dtype=np.float32)
        for level in codes:
            same &= level[rows][:, None] == level
            length += same
        return length

    return _recall(shared, codes.shape[1], pairs, ks, negatives, max_pairs)


def retrieval_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Format retrieval figures as Markdown, one row per method and search key; '' if there are no figures.

    Args:
        metrics: method name -> result of `intrinsic_metrics`.
    """
    rows = []
    for method, figures in metrics.items():
        for key, name in (("retrieval", "embedding"), ("retrieval_decoded", "decoded codes"), ("retrieval_prefix", "shared prefix")):
            if key in figures:
                cells = [f"{value:.3f}" for which in ("sampled", "full") for value in figures[key][which].values()]
                rows.append((list(figures[key]["full"]), f"| {method} | {name} | " + " | ".join(cells) + " |"))
    if not rows:
        return ""
    headers = [f"R@{k}, {which}" for which in ("1 + 999", "full") for k in rows[0][0]]
    return (
        "\n".join(["| SIDs | searched with | " + " | ".join(headers) + " |", "|" + "---|" * (len(headers) + 2), *[row for _, row in rows]])
        + "\n"
    )


def _recall(
    similarity: Similarity, num_items: int, pairs: np.ndarray, ks: Iterable[int], negatives: int, max_pairs: int
) -> dict[str, dict[str, float]]:
    pairs = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    if not len(pairs):
        raise ValueError("no pair of two different items")
    paired = sp.coo_matrix((np.ones(len(pairs), dtype=bool), tuple(pairs.T)), shape=(num_items, num_items)).tocsr()
    paired = (paired + paired.T).tocsr()
    if len(pairs) > max_pairs:
        pairs = pairs[np.linspace(0, len(pairs) - 1, max_pairs).astype(np.int64)]
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    better, tied = np.empty(len(pairs), dtype=np.int64), np.empty(len(pairs), dtype=np.int64)
    for start in range(0, len(pairs), _BLOCK):
        queries, positives = pairs[start : start + _BLOCK].T
        similar = similarity(queries)
        own = similar[np.arange(len(queries)), positives][:, None]
        similar[np.arange(len(queries)), queries] = -np.inf
        similar[paired[queries].nonzero()] = -np.inf
        better[start : start + len(queries)] = (similar > own + _TIE).sum(axis=1)
        tied[start : start + len(queries)] = (similar >= own - _TIE).sum(axis=1) - better[start : start + len(queries)]
    others = num_items - 1 - np.diff(paired.indptr)[pairs[:, 0]]  # all but the query and its positives
    result: dict[str, dict[str, float]] = {"full": {}, "sampled": {}, "chance_full": {}}
    for k in ks:
        result["full"][str(k)] = _mean(np.clip((k - better) / (tied + 1), 0, 1))
        sampled = np.empty(len(pairs))
        for count in np.unique(others):
            rows = others == count
            running = np.concatenate([[0.0], np.cumsum(_fewer_than(k, int(count), min(negatives, int(count))))])
            sampled[rows] = (running[better[rows] + tied[rows] + 1] - running[better[rows]]) / (tied[rows] + 1)
        result["sampled"][str(k)] = _mean(sampled)
        result["chance_full"][str(k)] = _mean(np.minimum(1.0, k / (others + 1)))
    return result


def _mean(values: np.ndarray) -> float:
    return float(np.sort(values).mean())  # sorting fixes the order of summation


def _fewer_than(k: int, others: int, drawn: int) -> np.ndarray:
    """(others + 1,): entry g is the probability that a draw of `drawn` of `others` items contains fewer than k of g marked items."""
    marked = np.arange(others + 1, dtype=np.float64)

    def log_choose(total: np.ndarray | float, part: float) -> np.ndarray:
        total = np.maximum(total, part)  # impossible draws are masked out below
        return gammaln(total + 1) - gammaln(part + 1) - gammaln(total - part + 1)

    probability = np.zeros(others + 1)
    for found in range(min(k, drawn + 1)):
        possible = (marked >= found) & (others - marked >= drawn - found)
        log_mass = log_choose(marked, found) + log_choose(others - marked, drawn - found) - log_choose(float(others), drawn)
        probability += np.where(possible, np.exp(log_mass), 0.0)
    return np.minimum(probability, 1.0)
