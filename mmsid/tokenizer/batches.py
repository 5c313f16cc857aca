"""Batches of item pairs as a pure function of (seed, step, rank), so that a resumed training reads the same batches.

Half of a batch are anchors, taken from shuffled epochs with items of similar text length together. The other half are their partners:
a co-engaged item drawn by weight, otherwise an item of the same finest category, otherwise any item.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import sparse


class PairBatch(NamedTuple):
    """A batch of A pairs.

    Attributes:
        rows: (2A,) row numbers of the A anchors, then of their partners.
        engaged: (A,) True if the partner is a co-engaged item.
        paired: (A,) True if the partner is a positive: co-engaged, or of the same category.
    """

    rows: np.ndarray
    engaged: np.ndarray
    paired: np.ndarray


class PairPlan:
    """Draws the pairs of every training step.

    Args:
        lengths: (N,) text lengths.
        category: (N,) id of the finest category, -1 for none.
        pairs: (N, N) co-engagement weights, or None.
    """

    def __init__(
        self, lengths: Sequence[int], category: np.ndarray, pairs: sparse.csr_matrix | None, *, batch_size: int, seed: int
    ) -> None:
        self.lengths, self.category, self.pairs, self.seed = np.asarray(lengths), np.asarray(category), pairs, seed
        self.anchors = max(1, batch_size // 2)
        self.members = {int(one): np.flatnonzero(self.category == one) for one in np.unique(self.category) if one >= 0}
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> PairBatch:
        """Pairs of process `rank` of `world` at (micro-)step `step`."""
        first, size = (step * world + rank) * self.anchors, len(self.lengths)
        anchors = np.array([self._epoch(position // size)[position % size] for position in range(first, first + self.anchors)])
        rng = np.random.default_rng([self.seed, 1, step, rank])
        drawn = [self._partner(int(anchor), rng) for anchor in anchors]
        partners, engaged, paired = (np.array(column) for column in zip(*drawn, strict=True))
        return PairBatch(np.concatenate([anchors, partners]), engaged, paired)

    def _partner(self, anchor: int, rng: np.random.Generator) -> tuple[int, bool, bool]:
        if self.pairs is not None:
            span = slice(self.pairs.indptr[anchor], self.pairs.indptr[anchor + 1])
            neighbours, weight = self.pairs.indices[span], self.pairs.data[span]
            if len(neighbours):
                return int(rng.choice(neighbours, p=weight / weight.sum())), True, True
        siblings = self.members.get(int(self.category[anchor]), np.zeros(0, np.int64))
        if len(siblings) > 1:
            other = siblings[rng.integers(len(siblings) - 1)]
            return int(siblings[-1] if other == anchor else other), False, True
        return int(rng.integers(len(self.lengths))), False, False

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, 0, epoch])
        order = rng.permutation(len(self.lengths))
        window = 16 * self.anchors
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            groups = [part[i : i + self.anchors] for i in range(0, len(part), self.anchors)]
            order[start : start + window] = np.concatenate([groups[i] for i in rng.permutation(len(groups))])
        return order
