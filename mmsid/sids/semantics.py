"""Semantic metrics of SIDs: agreement with categories, reconstruction of the embedding, and agreement of nearest neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

from mmsid.sids.distribution import entropy, prefix_labels

_BLOCK = 128  # queries per block; 128 x N similarities are held at once


def cluster_agreement(clusters: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """Agreement of two labelings of the same n items (integer labels from 0).

    Returns:
        homogeneity: 1 - H(class|cluster) / H(class). completeness: 1 - H(cluster|class) / H(cluster). v_measure: their harmonic mean
        (= NMI with the arithmetic mean). nmi: NMI with the geometric mean. purity. Homogeneity and completeness are 1 where their
        denominator is 0 (Rosenberg & Hirschberg 2007).
    """
    table = sp.coo_matrix((np.ones(len(clusters)), (clusters, classes))).tocsr()
    table.sort_indices()  # fixes the order of summation, independent of the order of the items
    cluster_entropy, class_entropy, joint = (
        entropy(np.bincount(clusters)),
        entropy(np.bincount(classes)),
        entropy(table.data),
    )
    shared = max(0.0, cluster_entropy + class_entropy - joint)
    homogeneity = min(1.0, shared / class_entropy) if class_entropy > 0 else 1.0
    completeness = min(1.0, shared / cluster_entropy) if cluster_entropy > 0 else 1.0
    both = homogeneity + completeness
    geometric = np.sqrt(cluster_entropy * class_entropy)
    return {
        "v_measure": 2 * homogeneity * completeness / both if both > 0 else 0.0,
        "homogeneity": homogeneity,
        "completeness": completeness,
        "nmi": min(1.0, float(shared / geometric)) if geometric > 0 else float(cluster_entropy == class_entropy),
        "purity": float(table.max(axis=1).toarray().sum()) / len(clusters),
    }


def category_agreement(codes: np.ndarray, categories: list[tuple[str, ...]], seed: int = 0) -> list[dict[str, Any]]:
    """Agreement of each SID prefix with the category path down to each depth. Items without a category at that depth are left out.

    Returns:
        One record per (depth, level), both counted from 1: depth, level, items, classes, prefixes, the figures of
        `cluster_agreement`, v_measure_chance (the same prefixes against shuffled categories, because many small prefixes score high
        by chance), v_measure_adjusted = (v - chance) / (1 - chance). Depths with fewer than two classes are left out.
    """
    records = []
    for depth in range(1, max(map(len, categories), default=0) + 1):
        rows = np.array([row for row, path in enumerate(categories) if len(path) >= depth], dtype=np.int64)
        names = sorted({categories[row][:depth] for row in rows})
        if len(names) < 2:
            continue
        number = {name: index for index, name in enumerate(names)}
        classes = np.array([number[categories[row][:depth]] for row in rows])
        shuffled = np.random.default_rng([seed, depth]).permutation(np.sort(classes))
        labels = prefix_labels(np.asarray(codes)[rows])
        for level in range(labels.shape[1]):
            found = cluster_agreement(labels[:, level], classes)
            # Both sides are sorted before the shuffle, so that the chance level does not depend on the order of the items.
            chance = cluster_agreement(np.sort(labels[:, level]), shuffled)["v_measure"]
            records.append(
                {"depth": depth, "level": level + 1, "items": len(rows), "classes": len(names), "prefixes": int(labels[:, level].max()) + 1}
                | found
                | {"v_measure_chance": chance, "v_measure_adjusted": (found["v_measure"] - chance) / max(1 - chance, 1e-12)}
            )
    return records


def fidelity(x: np.ndarray, vectors: np.ndarray, codes: np.ndarray) -> list[dict[str, float]]:
    """Reconstruction error of the embedding from its code vectors, after 1..L levels.

    Args:
        x: (N, D). vectors: (L, K, D). codes: (N, L).
    Returns:
        Per level: mse (squared distance, mean over items), r2 = 1 - residual / variance about the mean, cosine (mean).
    """
    x = np.asarray(x, dtype=np.float64)
    vectors = np.asarray(vectors, dtype=np.float64)
    variance = ((x - x.mean(axis=0)) ** 2).sum()
    decoded = np.zeros_like(x)
    norms = np.linalg.norm(x, axis=1)
    metrics = []
    for level in range(codes.shape[1]):
        decoded += vectors[level][codes[:, level]]
        error = ((x - decoded) ** 2).sum()
        lengths = norms * np.linalg.norm(decoded, axis=1)
        cosine = np.divide((x * decoded).sum(axis=1), lengths, out=np.zeros(len(x)), where=lengths > 0)
        metrics.append(
            {"mse": float(error / len(x)), "r2": float(1 - error / variance) if variance > 0 else 0.0, "cosine": float(cosine.mean())}
        )
    return metrics


def nearest_neighbour_lcp(codes: np.ndarray, embeddings: np.ndarray, max_queries: int = 2000, seed: int = 0) -> float:
    """Mean longest common SID prefix of an item and its nearest neighbour by cosine, over at most `max_queries` random items.

    Compare it with the chance level (`chance_agreement` summed over levels): a collapsed table scores L.
    """
    x = np.asarray(embeddings, dtype=np.float32)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x = x / np.where(norms > 0, norms, 1)
    queries = np.arange(len(x))
    if len(x) > max_queries:
        queries = np.sort(np.random.default_rng(seed).choice(len(x), max_queries, replace=False))
    nearest = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK]
        similar = x[block] @ x.T
        similar[np.arange(len(block)), block] = -np.inf
        nearest[start : start + len(block)] = similar.argmax(axis=1)
    same = np.asarray(codes)[queries] == np.asarray(codes)[nearest]
    return float(np.logical_and.accumulate(same, axis=1).sum(axis=1).mean())
