"""Co-engagement: how often items occur near each other in user histories, as sparse matrices and as ordered pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse


def co_engagement(
    histories: Sequence[np.ndarray], num_items: int, window: int = 3, weights: Sequence[np.ndarray] | None = None
) -> sparse.csr_matrix:
    """Symmetric co-engagement weights, (num_items, num_items) float64 with an empty diagonal.

    Two items d <= window steps apart in a history add 1/d to each other. `histories` must be train prefixes only.

    Args:
        weights: event weights of each history; a pair then adds the product of its two weights, divided by d. The minimum of the
            weights would be blind to rare types: nearly all neighbours of a conversion are clicks, and the pair would count as a click.
    """
    forward = followed_by(histories, num_items, window, weights)
    total = (forward + forward.T).tocsr()
    total.sort_indices()
    return total


def followed_by(
    histories: Sequence[np.ndarray], num_items: int, window: int = 3, weights: Sequence[np.ndarray] | None = None
) -> sparse.csr_matrix:
    """Directed co-engagement weights, (num_items, num_items) float64 with an empty diagonal: row item, then column item.

    An item d <= window steps after another adds 1/d, times the product of both event weights (`co_engagement`). `histories` must be
    train prefixes only.
    """
    items, users = _concatenated(histories)
    event_weights = np.ones(len(items)) if weights is None else np.concatenate([*weights, np.zeros(0)])
    total = sparse.csr_matrix((num_items, num_items), dtype=np.float64)
    for distance in range(1, window + 1):
        left, right = items[:-distance], items[distance:]
        kept = (users[:-distance] == users[distance:]) & (left != right)
        pair_weights = (event_weights[:-distance] * event_weights[distance:])[kept]
        # integer counts are divided once, because sums of fractions depend on their order
        counts = sparse.coo_matrix((pair_weights, (left[kept], right[kept])), shape=(num_items, num_items)).tocsr()
        total = total + counts / distance
    total.sort_indices()
    return total.tocsr()


def adjacent_pairs(histories: Sequence[np.ndarray]) -> np.ndarray:
    """Consecutive items of each history, (P, 2) int64, in time order. Pairs of an item with itself are left out."""
    items, users = _concatenated(histories)
    kept = (users[:-1] == users[1:]) & (items[:-1] != items[1:])
    return np.stack([items[:-1][kept], items[1:][kept]], axis=1)


def _concatenated(histories: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Item rows of all histories end to end, and the index of the history of each."""
    lengths = [len(rows) for rows in histories]
    items = np.concatenate([np.asarray(rows, dtype=np.int64) for rows in histories]) if histories else np.empty(0, np.int64)
    return items, np.repeat(np.arange(len(histories)), lengths)
