"""Popularity allocation: how the interactions of a log are spread over the codes and paths of a SID table."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmsid.sids.distribution import entropy, gini, prefix_labels

HEAD = 0.01  # share of the items that counts as the head
BUSY = 0.1  # share of a codebook that counts as its busiest codes


def popularity_allocation(codes: np.ndarray, counts: np.ndarray, codebook_sizes: tuple[int, ...]) -> dict[str, Any]:
    """Spread of interactions over (N, L) codes. A decoder sees codes as often as their items are engaged with.

    Args:
        counts: (N,) interactions of each item.

    Returns:
        interactions, items_without (items without interaction).
        levels: per level, perplexity (of interactions over codes), gini (over all K codes), busiest_share (share of interactions that
            the busiest tenth of the codebook holds), busiest_share_of_items (share of items on the tenth with most items), idle (codes
            with items but without interaction), correlation (of items and interactions per used code; None for fewer than 3 codes).
        shared_interactions: share of interactions with items that share their path with another item.
        head: items (the most popular hundredth), interactions (their share), shared (share of them that share their path).
        idle_prefixes: per prefix length, the share of prefixes under which no item has an interaction.
    Raises:
        ValueError: no interactions.
    """
    codes, counts = np.asarray(codes), np.asarray(counts, dtype=np.int64)
    total = int(counts.sum())
    if total == 0:
        raise ValueError("no interaction with an item of the table")
    labels = prefix_labels(codes)
    shares_path = np.bincount(labels[:, -1])[labels[:, -1]] > 1
    size = max(1, round(HEAD * len(codes)))
    head = np.argsort(-counts, kind="stable")[:size]
    levels = []
    for level, num_codes in enumerate(codebook_sizes):
        items = np.bincount(codes[:, level], minlength=num_codes)
        traffic = np.bincount(codes[:, level], weights=counts, minlength=num_codes)
        used, busiest = items > 0, max(1, round(BUSY * num_codes))
        levels.append(
            {
                "perplexity": float(np.exp(entropy(traffic))),
                "gini": gini(traffic),
                "busiest_share": float(np.sort(traffic)[-busiest:].sum()) / total,
                "busiest_share_of_items": float(np.sort(items)[-busiest:].sum()) / len(codes),
                "idle": int((used & (traffic == 0)).sum()),
                "correlation": _correlation(items[used], traffic[used]),
            }
        )
    return {
        "interactions": total,
        "items_without": int((counts == 0).sum()),
        "levels": levels,
        "shared_interactions": float(counts[shares_path].sum()) / total,
        "head": {"items": size, "interactions": float(counts[head].sum()) / total, "shared": float(shares_path[head].mean())},
        "idle_prefixes": [float((np.bincount(column, weights=counts) == 0).mean()) for column in labels.T],
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return None
    return float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))
