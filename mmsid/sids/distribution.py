"""Distribution metrics of SIDs: uniqueness, codebook use, prefix agreement by chance, flip rate. They need codes only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmsid.sids.grouping import lexicographic_order


def prefix_labels(codes: np.ndarray) -> np.ndarray:
    """Label the prefixes of every length: (N, L) codes -> (N, L) int64; equal numbers in column l = equal prefixes of length l + 1."""
    codes = np.asarray(codes, dtype=np.int64)
    labels = np.empty_like(codes)
    previous = np.zeros(len(codes), dtype=np.int64)
    for level in range(codes.shape[1]):
        pairs = previous * (int(codes[:, level].max(initial=0)) + 2) + codes[:, level] + 1  # + 1: a suffix may be -1
        _, previous = np.unique(pairs, return_inverse=True)
        labels[:, level] = previous
    return labels


def prefix_counts(codes: np.ndarray) -> list[np.ndarray]:
    """Number of items with each prefix, for every length: (N, L) codes -> L arrays, in the order of the prefixes.

    The same as the counts of `prefix_labels`, from one sort instead of one per level.
    """
    codes = np.asarray(codes, dtype=np.int64)
    spans = [int(column.max(initial=-1)) + 2 for column in codes.T]  # a suffix may be -1
    ordered = codes[lexicographic_order(codes + 1, spans)]
    changed = np.zeros(len(ordered), dtype=bool)
    changed[:1] = True
    counts = []
    for column in ordered.T:
        changed[1:] |= column[1:] != column[:-1]
        counts.append(np.diff(np.append(np.flatnonzero(changed), len(ordered))))
    return counts


def bucket_metrics(codes: np.ndarray, content_hashes: Sequence[str] | np.ndarray | None = None) -> dict[str, Any]:
    """Uniqueness and bucket sizes of (N, L) SIDs. A bucket holds the items with one SID.

    Returns:
        uniqueness: distinct SIDs / N. items_lost: N - distinct SIDs. colliding_share: share of items in buckets of more than one item.
        buckets, max_bucket, mean_bucket: number, largest and mean size of buckets.
        exact_duplicates (with hashes): N - distinct contents, the part of items_lost that no tokenizer can avoid.
    """
    sizes = prefix_counts(codes)[-1]
    num_items = len(codes)
    metrics: dict[str, Any] = {
        "items": num_items,
        "uniqueness": len(sizes) / num_items,
        "items_lost": num_items - len(sizes),
        "colliding_share": float(sizes[sizes > 1].sum()) / num_items,
        "buckets": len(sizes),
        "max_bucket": int(sizes.max()),
        "mean_bucket": num_items / len(sizes),
    }
    if content_hashes is not None:
        contents = np.unique(content_hashes) if isinstance(content_hashes, np.ndarray) else set(content_hashes)
        metrics["exact_duplicates"] = num_items - len(contents)
    return metrics


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution given by counts; zero counts are allowed."""
    share = counts[counts > 0] / counts.sum()
    return max(0.0, float(-(share * np.log(share)).sum()))


def gini(counts: np.ndarray) -> float:
    """Gini coefficient 2 sum(i n_(i)) / (n sum n) - (n + 1) / n over ascending counts.

    Pass the counts of all codes, including unused codes (0): over used codes only, a total collapse scores 0, like perfect balance.
    """
    ordered = np.sort(np.asarray(counts, dtype=np.float64))
    size = len(ordered)
    return float(2 * (np.arange(1, size + 1) * ordered).sum() / (size * ordered.sum()) - (size + 1) / size)


def level_metrics(codes: np.ndarray, codebook_sizes: tuple[int, ...]) -> list[dict[str, float]]:
    """Codebook use of each level, over all K codes.

    Returns:
        Per level: utilisation (used codes / K), entropy (nats), normalised_entropy (/ log K), perplexity (e^entropy), gini over all K
        codes, gini_floor (expected Gini of uniform random codes at this N / K, about 1 / sqrt(pi N / K); differences below it are
        noise), conditional_entropy H(c_l | c_<l).
    """
    of_prefixes = prefix_counts(codes)
    metrics, joint_before = [], 0.0
    for level, size in enumerate(codebook_sizes):
        counts = np.bincount(codes[:, level], minlength=size)
        marginal, joint = entropy(counts), entropy(of_prefixes[level])
        metrics.append(
            {
                "utilisation": float((counts > 0).mean()),
                "entropy": marginal,
                "normalised_entropy": marginal / float(np.log(size)) if size > 1 else 1.0,
                "perplexity": float(np.exp(marginal)),
                "gini": gini(counts),
                "gini_floor": min(1.0, float(np.sqrt(size / (np.pi * len(codes))))),
                "conditional_entropy": max(0.0, joint - joint_before),
            }
        )
        joint_before = joint
    return metrics


def joint_entropy(codes: np.ndarray) -> float:
    """Entropy in nats of whole SIDs, at most log N; e^H is the effective capacity."""
    return entropy(prefix_counts(codes)[-1])


def chance_agreement(codes: np.ndarray) -> np.ndarray:
    """Exact probability that two random different items share the prefix of length l: (N, L) codes -> (L,).

    It is the sum over prefixes of n (n - 1) / (N (N - 1)), and 0 for a single item.
    """
    num_items = len(codes)
    pairs = max(num_items * (num_items - 1), 1)
    counts = [count.astype(np.float64) for count in prefix_counts(codes)]
    return np.array([(count * (count - 1)).sum() / pairs for count in counts])


def pair_agreement(codes: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Share of item pairs with a common prefix of length l: (N, L) codes, (P, 2) item rows -> (L,). Self pairs are left out.

    Raises:
        ValueError: no pair of two different items.
    """
    pairs = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    if not len(pairs):
        raise ValueError("no pair of two different items")
    same = codes[pairs[:, 0]] == codes[pairs[:, 1]]
    return np.logical_and.accumulate(same, axis=1).mean(axis=0)


def flip_rate(codes_a: np.ndarray, codes_b: np.ndarray) -> np.ndarray:
    """Share of items whose code differs between two (N, L) code arrays of the same items: (L + 1,), per level and, last, at any level.

    It measures code stability under noise (another caption seed, JPEG quality or batch), or the change from raw to published codes.

    Raises:
        ValueError: the arrays are empty or have different shapes.
    """
    codes_a, codes_b = np.asarray(codes_a), np.asarray(codes_b)
    if codes_a.shape != codes_b.shape or codes_a.ndim != 2 or not len(codes_a):
        raise ValueError(f"need two (N, L) code arrays of one shape with N > 0, got {codes_a.shape} and {codes_b.shape}")
    differs = codes_a != codes_b
    return np.append(differs.mean(axis=0), differs.any(axis=1).mean())
