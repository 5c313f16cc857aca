"""Which items a training step reads: a pure function of (seed, step, rank).

Nothing about the order is state, so that a resumed run reads what the uninterrupted one would have read, on any number of
processes. A batch holds pairs: half are anchors, walked through in shuffled epochs (items of like text length together), the
other half their partners: a co-engaged train item, drawn by weight; else one that shares the finest category; else anyone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import sparse


class PairBatch(NamedTuple):
    """`rows` (2A,): A anchors, then their partners. `engaged` (A,) True where the partner is a co-engaged item,
    `paired` (A,) True where it is a positive at all (co-engaged or of the same category)."""

    rows: np.ndarray
    engaged: np.ndarray
    paired: np.ndarray


class PairPlan:
    """Args: `lengths` (N,) of the texts, `category` (N,) finest category id or -1, `pairs` co-engagement or None, `rows` the
    items trained on (default all)."""

    def __init__(
        self,
        lengths: Sequence[int],
        category: np.ndarray,
        pairs: sparse.csr_matrix | None,
        *,
        batch_size: int,
        seed: int,
        rows: np.ndarray | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.rows = np.arange(len(self.lengths)) if rows is None else np.asarray(rows)
        allowed = np.zeros(len(self.lengths), bool)
        allowed[self.rows] = True
        self.category, self.allowed, self.seed = np.asarray(category), allowed, seed
        self.anchors = max(1, batch_size // 2)
        self.pairs = pairs
        self.members: dict[int, np.ndarray] = {}
        for one in np.unique(self.category[self.rows]):
            if one >= 0:
                self.members[int(one)] = self.rows[self.category[self.rows] == one]
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> PairBatch:
        """The pairs that process `rank` of `world` reads at (micro-)step `step`."""
        first = (step * world + rank) * self.anchors
        places = np.arange(first, first + self.anchors)
        anchors = np.array([self._epoch(int(place // len(self.rows)))[place % len(self.rows)] for place in places])
        rng = np.random.default_rng([self.seed, 1, step, rank])
        drawn = [self._partner(int(anchor), rng) for anchor in anchors]
        partners, engaged, paired = (np.array(column) for column in zip(*drawn, strict=True))
        return PairBatch(np.concatenate([anchors, partners]), engaged, paired)

    def _partner(self, anchor: int, rng: np.random.Generator) -> tuple[int, bool, bool]:
        if self.pairs is not None:
            span = slice(self.pairs.indptr[anchor], self.pairs.indptr[anchor + 1])
            near, weight = self.pairs.indices[span], self.pairs.data[span]
            near, weight = near[self.allowed[near]], weight[self.allowed[near]]
            if len(near):
                return int(rng.choice(near, p=weight / weight.sum())), True, True
        siblings = self.members.get(int(self.category[anchor]), np.zeros(0, np.int64))
        if len(siblings) > 1:
            other = siblings[rng.integers(len(siblings) - 1)]
            return int(siblings[-1] if other == anchor else other), False, True
        return int(self.rows[rng.integers(len(self.rows))]), False, False

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, 0, epoch])
        order = rng.permutation(self.rows)
        window = 16 * self.anchors
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            groups = [part[i : i + self.anchors] for i in range(0, len(part), self.anchors)]
            order[start : start + window] = np.concatenate([groups[i] for i in rng.permutation(len(groups))])
        return order
