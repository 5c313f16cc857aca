"""A batch of user histories as the sources of candidates read it: recency weights, items that must not be proposed, and the
selection of the best items from sparse or listed scores. Nothing has the shape (users, items) in dense form.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from mmsid.recommend.sparse_rows import history_weights

RECENT = 200  # items of a history that the sources read, the most recent ones


@dataclass(frozen=True)
class UnlistedRows:
    """Content of U items that occur in histories and are not in the catalogue. They are read, and never proposed.

    Attributes:
        tokens: int64 (U, D), their paths.
        words, labels: (U, V) each, their term vectors.
        embeddings: (U, E), or None if the sources read no embeddings.
    """

    tokens: np.ndarray
    words: sparse.csr_matrix
    labels: sparse.csr_matrix
    embeddings: np.ndarray | None


class HistoryBatch:
    """B histories over N catalogue rows.

    Args:
        histories: item rows in time order, one array per user. Row N + u is the unlisted item u.
        num_items: N.
        exclude_seen: items of a history (all of it, not only the recent part) are not proposed to its user.
        allowed: (N,) bool, items that may be proposed; None: all.
        unlisted: content of the U items that are not in the catalogue; None: there are none.
    """

    def __init__(
        self,
        histories: Sequence[np.ndarray],
        num_items: int,
        *,
        exclude_seen: bool = True,
        allowed: np.ndarray | None = None,
        unlisted: UnlistedRows | None = None,
    ) -> None:
        whole = [np.asarray(history, dtype=np.int64) for history in histories]
        self.histories = [history[-RECENT:] for history in whole]
        self.num_items, self.allowed, self.unlisted = num_items, allowed, unlisted
        self.excluded = [np.unique(history) if exclude_seen else history[:0] for history in whole]
        self._memo: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self.histories)

    def weights(self, decay: float) -> sparse.csr_matrix:
        """Recency weights float32 (B, N + U): decay^k for the item k steps back; decay 0 reads the last item alone.

        The weights of repeated items add up.
        """
        histories = [history[-1:] for history in self.histories] if decay == 0 else self.histories
        width = self.num_items + (0 if self.unlisted is None else len(self.unlisted.tokens))
        return self.memo(("weights", decay), lambda: history_weights(histories, width, decay or 1.0).astype(np.float32))

    def weighted_sum(self, decay: float, listed: Any, unlisted: Any) -> Any:
        """Sum of the vectors of each history by recency weight: (N, V) of the catalogue and (U, V) of the unlisted items -> (B, V)."""
        weights = self.weights(decay)
        if self.unlisted is None:
            return weights @ listed
        return weights[:, : self.num_items] @ listed + weights[:, self.num_items :] @ unlisted

    def memo(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """The value computed for this key, once per batch."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def may_propose(self, user: int, items: np.ndarray) -> np.ndarray:
        """Bool (n,): True where an item (n,) may be proposed to this user of the batch."""
        excluded = self.excluded[user]
        if len(excluded):
            allowed = excluded[np.searchsorted(excluded, items).clip(max=len(excluded) - 1)] != items
        else:
            allowed = np.ones(len(items), dtype=bool)
        return allowed if self.allowed is None else allowed & self.allowed[items]

    def best(self, scores: sparse.csr_matrix, count: int) -> np.ndarray:
        """Items int64 (B, count) with the highest positive scores (B, N), best first, padded with -1. Ties go to the lower row."""
        found = np.full((len(self), count), -1, dtype=np.int64)
        for user in range(len(self)):
            part = slice(scores.indptr[user], scores.indptr[user + 1])
            items, values = scores.indices[part], scores.data[part]
            kept = self.may_propose(user, items) & (values > 0)
            items, values = items[kept], values[kept]
            if len(items) > count:
                border = np.partition(values, len(values) - count)[len(values) - count]
                items, values = items[values >= border], values[values >= border]
            chosen = items[np.lexsort((items, -values))][:count]
            found[user, : len(chosen)] = chosen
        return found

    def first(self, ordered: np.ndarray, count: int) -> np.ndarray:
        """The first `count` proposable items of each row of `ordered` (B, n), padded with -1 in both. -> int64 (B, count)."""
        found = np.full((len(self), count), -1, dtype=np.int64)
        for user, items in enumerate(ordered):
            items = items[items >= 0]
            chosen = items[self.may_propose(user, items)][:count]
            found[user, : len(chosen)] = chosen
        return found
