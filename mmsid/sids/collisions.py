"""Collision handling: turn raw codes, where several items may share a SID, into published codes.

`relocate` moves the items of a colliding prefix group (all levels but the last) to distinct last codes at minimal total cost
-log pi. `suffix` numbers the items of a colliding bucket. `none` keeps collisions. Exact duplicates (equal content hashes) count as
one item. The result does not depend on row order or item ids: content hashes decide every order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmsid.errors import MmsidError

Policy = Literal["relocate", "suffix", "none"]
# (n,) item rows, (n, L-1) prefixes -> (n, K) log pi of the last code given the prefix.
LastScores = Callable[[np.ndarray, np.ndarray], np.ndarray]
# item row -> its prefixes (L-1 codes) and their joint log pi, best first. Called only for items of an overfull group.
PrefixCandidates = Callable[[int], Iterable[tuple[Sequence[int], float]]]

_HUNGARIAN_ITEMS = 2000  # larger groups are assigned greedily
_BATCH_ROWS = 2048
_MAX_COST = 1e6  # replaces -log 0, because the solver needs finite costs


class Resolution(NamedTuple):
    """Result of collision handling.

    Attributes:
        codes: (N, L) published codes.
        suffix: (N,) or None.
        moved: number of items whose codes changed.
        spilled: number of items that left their prefix.
    """

    codes: np.ndarray
    suffix: np.ndarray | None
    moved: int
    spilled: int


def resolve(
    policy: Policy,
    raw_codes: np.ndarray,
    content_hashes: Sequence[str],
    codebook_sizes: Sequence[int],
    last_scores: LastScores | None = None,
    prefix_candidates: PrefixCandidates | None = None,
) -> Resolution:
    """Apply a collision policy to (N, L) raw codes.

    `relocate` needs `last_scores`, and `prefix_candidates` if a prefix group may hold more items than the last level has codes.

    Raises:
        MmsidError: unknown policy, missing scores, or an error of `relocate`.
    """
    raw_codes = np.asarray(raw_codes, dtype=np.int64)
    if policy == "none":
        return Resolution(raw_codes.copy(), None, 0, 0)
    if policy == "suffix":
        return Resolution(raw_codes.copy(), add_suffix(raw_codes, content_hashes), 0, 0)
    if policy != "relocate":
        raise MmsidError(f"collision policy {policy!r} is unknown; choose relocate, suffix or none")
    if last_scores is None:
        raise MmsidError("collision policy 'relocate' needs log pi of the last level; use 'suffix' for codes without scores")
    codes = relocate(raw_codes, last_scores, content_hashes, codebook_sizes, prefix_candidates)
    spilled = (codes[:, :-1] != raw_codes[:, :-1]).any(axis=1)
    return Resolution(codes, None, int((codes != raw_codes).any(axis=1).sum()), int(spilled.sum()))


def add_suffix(raw_codes: np.ndarray, content_hashes: Sequence[str]) -> np.ndarray:
    """Number the items of colliding buckets: (N, L) codes -> (N,) int64.

    A bucket of n > 1 distinct items gets 0..n-1 in the order of the content hashes, any other item -1. Exact duplicates share a number.
    """
    raw_codes = np.asarray(raw_codes, dtype=np.int64)
    distinct, inverse, codes = distinct_items(raw_codes, content_hashes)
    suffix = np.full(len(distinct), -1, dtype=np.int64)
    for bucket in groups_of(codes):
        if len(bucket) > 1:
            suffix[bucket] = np.arange(len(bucket))
    return suffix[inverse]


def relocate(
    raw_codes: np.ndarray,
    last_scores: LastScores,
    content_hashes: Sequence[str],
    codebook_sizes: Sequence[int] | int,
    prefix_candidates: PrefixCandidates | None = None,
) -> np.ndarray:
    """Return codes (N, L) int64 that are unique except for exact duplicates. Prefix groups without a collision keep their codes.

    Groups of up to 2,000 distinct items are assigned optimally (Hungarian algorithm). In larger groups each item, in the order of
    the content hashes, takes its best free code. A group with more distinct items than codes keeps the items that fit best. The
    others move, in the order of their hashes, to their best prefix with a free code. There they take free codes only, unless that
    group holds a collision as well. Peak memory: the code table and the scores of one group, or of a batch of small groups.

    Args:
        raw_codes: (N, L).
        last_scores: `last_scores(rows (n,), prefixes (n, L-1)) -> (n, K)` log pi, for example
            `mmsid.quantize.CodebookScores.last_scores`.
        content_hashes: N strings; equal hash = exact duplicate.
        codebook_sizes: codes per level; one integer applies to all levels.
        prefix_candidates: `prefix_candidates(row) -> [(prefix, log p), ...]`, best first; needed only if a group overflows.
            If all candidates are full, the item moves to the first free prefix that keeps most of its leading codes.
    Raises:
        MmsidError: more distinct items than SIDs; an overfull group without `prefix_candidates`; NaN scores or scores of a wrong shape.
        ValueError: `raw_codes` is not (N, L), or `codebook_sizes` has another number of levels.
    """
    raw_codes = np.asarray(raw_codes, dtype=np.int64)
    if raw_codes.ndim != 2 or raw_codes.shape[1] == 0:
        raise ValueError(f"raw_codes must be (N, L), got shape {raw_codes.shape}")
    num_levels = raw_codes.shape[1]
    sizes = tuple(np.atleast_1d(codebook_sizes).astype(int).tolist()) * (num_levels if np.ndim(codebook_sizes) == 0 else 1)
    if len(sizes) != num_levels:
        raise ValueError(f"codes have {num_levels} levels, codebook_sizes {len(sizes)}")
    rows, inverse, codes = distinct_items(raw_codes, content_hashes)
    capacity = int(np.prod([float(size) for size in sizes]))
    if len(rows) > capacity:
        raise MmsidError(f"{len(rows)} distinct items cannot have unique SIDs out of {capacity}; use more levels or larger codebooks")
    relocation = _Relocation(rows, codes, sizes, last_scores, prefix_candidates)
    relocation.run()
    return relocation.codes[inverse]


class _Relocation:
    """Relocation of distinct items, numbered in the order of their content hashes ("positions", as opposed to catalogue rows)."""

    def __init__(
        self,
        rows: np.ndarray,
        codes: np.ndarray,
        sizes: tuple[int, ...],
        last_scores: LastScores,
        prefix_candidates: PrefixCandidates | None,
    ) -> None:
        self.rows, self.codes, self.sizes = rows, codes, sizes
        self.last_scores, self.prefix_candidates = last_scores, prefix_candidates
        self.last_size = sizes[-1]

    def run(self) -> None:
        groups = list(groups_of(self.codes[:, :-1]))
        colliding = [group for group in groups if self._collides(group) and len(group) <= self.last_size]
        overfull = [group for group in groups if len(group) > self.last_size]
        if overfull:
            colliding = self._spill(groups, overfull)
        batch: list[np.ndarray] = []
        for group in colliding:
            if batch and sum(map(len, batch)) + len(group) > _BATCH_ROWS:
                self._assign(batch)
                batch = []
            batch.append(group)
        if batch:
            self._assign(batch)

    def _collides(self, group: np.ndarray) -> bool:
        return len(group) > 1 and len(np.unique(self.codes[group, -1])) < len(group)

    def _spill(self, groups: list[np.ndarray], overfull: list[np.ndarray]) -> list[np.ndarray]:
        """Move the worst-fitting items out of overfull groups. Returns the groups that still hold a collision."""
        if self.prefix_candidates is None:
            prefix = self.codes[overfull[0][0], :-1].tolist()
            raise MmsidError(
                f"{len(overfull)} prefixes hold more distinct items than the last level has codes (prefix {prefix}: "
                f"{len(overfull[0])} items, {self.last_size} codes); pass prefix candidates, or use a larger last codebook"
            )
        free = {tuple(self.codes[group[0], :-1].tolist()): self.last_size - len(group) for group in groups}
        clean = {tuple(self.codes[group[0], :-1].tolist()) for group in groups if not self._collides(group)}
        leaving = []
        for group in overfull:
            prefix = tuple(self.codes[group[0], :-1].tolist())
            stay, go = self._choose_residents(group)
            leaving.append(go)
            free[prefix] = self.last_size - len(stay)
        arrivals: dict[tuple[int, ...], list[int]] = {}
        for position in np.sort(np.concatenate(leaving)):
            prefix = self._next_prefix(int(position), free)
            free[prefix] = free.get(prefix, self.last_size) - 1
            arrivals.setdefault(prefix, []).append(int(position))
            self.codes[position, :-1] = prefix
        rest = []
        for group in groups_of(self.codes[:, :-1]):
            prefix = tuple(self.codes[group[0], :-1].tolist())
            if prefix in arrivals and prefix in clean:
                self._place_arrivals(group, np.array(arrivals[prefix]))
            elif prefix in arrivals or self._collides(group):
                rest.append(group)
        return rest

    def _choose_residents(self, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Split an overfull group into the `last_size` items that fit best and the items that must leave."""
        limit = max(_HUNGARIAN_ITEMS, self.last_size)
        if len(group) > limit:  # only the best-fitting items enter the assignment, so that its matrix stays bounded
            cost = np.concatenate(
                [self._cost(group[start : start + _BATCH_ROWS]).min(axis=1) for start in range(0, len(group), _BATCH_ROWS)]
            )
            entering = np.sort(group[np.argsort(cost, kind="stable")[:limit]])
        else:
            entering = group
        staying, last_codes = self._match(self._cost(entering))
        self.codes[entering[staying], -1] = last_codes
        return entering[staying], np.setdiff1d(group, entering[staying])

    def _next_prefix(self, position: int, free: dict[tuple[int, ...], int]) -> tuple[int, ...]:
        assert self.prefix_candidates is not None
        own = tuple(self.codes[position, :-1].tolist())
        for prefix, _ in self.prefix_candidates(int(self.rows[position])):
            candidate = tuple(int(code) for code in prefix)
            if free.get(candidate, self.last_size) > 0:
                return candidate
        for candidate in nearest_prefixes(own, self.sizes):
            if free.get(candidate, self.last_size) > 0:
                return candidate
        raise MmsidError(f"no prefix has a free code for row {int(self.rows[position])}; use more levels or larger codebooks")

    def _place_arrivals(self, group: np.ndarray, arrivals: np.ndarray) -> None:
        """Assign free codes of a group without a collision to new arrivals; the other items keep their codes."""
        residents = np.setdiff1d(group, arrivals)
        cost = self._cost(arrivals)
        open_codes = np.setdiff1d(np.arange(self.last_size), self.codes[residents, -1])
        placed, chosen = self._match(cost[:, open_codes])
        self.codes[arrivals[placed], -1] = open_codes[chosen]

    def _assign(self, batch: list[np.ndarray]) -> None:
        """Assign last codes to groups that fit: one call of `last_scores` for all, then one assignment per group."""
        cost = self._cost(np.concatenate(batch))
        start = 0
        for group in batch:
            placed, last_codes = self._match(cost[start : start + len(group)])
            self.codes[group[placed], -1] = last_codes
            start += len(group)

    def _match(self, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, k) cost -> min(n, k) pairs (item, code); optimal up to `_HUNGARIAN_ITEMS` items, greedy for more."""
        if len(cost) <= _HUNGARIAN_ITEMS or len(cost) > cost.shape[1]:
            return linear_sum_assignment(cost)
        cost = cost.copy()
        chosen = np.empty(len(cost), dtype=np.int64)
        for item in range(len(cost)):
            chosen[item] = cost[item].argmin()
            cost[:, chosen[item]] = np.inf
        return np.arange(len(cost)), chosen

    def _cost(self, positions: np.ndarray) -> np.ndarray:
        """(n,) positions -> (n, K) finite -log pi under the items' current prefixes."""
        scores = np.asarray(self.last_scores(self.rows[positions], self.codes[positions, :-1]), dtype=np.float64)
        if scores.shape != (len(positions), self.last_size):
            raise MmsidError(f"last_scores returned shape {scores.shape}, expected ({len(positions)}, {self.last_size})")
        if np.isnan(scores).any():
            row = int(self.rows[positions[int(np.isnan(scores).any(axis=1).argmax())]])
            raise MmsidError(f"log pi of row {row} is NaN; check the tokenizer's weights and that item's input")
        return np.clip(-scores, -_MAX_COST, _MAX_COST)


def nearest_prefixes(own: tuple[int, ...], sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield every prefix (all levels but the last); prefixes that keep most leading codes of `own` come first."""
    for kept in range(len(own) - 1, -1, -1):
        for tail in itertools.product(*(range(size) for size in sizes[kept:-1])):
            yield own[:kept] + tail


def distinct_items(raw_codes: np.ndarray, content_hashes: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group rows by content hash. Returns, sorted by hash, (n,) one row per item, (N,) item index of each row, (n, L) codes (a copy).

    Duplicates should have equal raw codes. If rounding made them differ, the lexicographically smallest codes are used.
    """
    if len(content_hashes) != len(raw_codes):
        raise ValueError(f"{len(raw_codes)} rows of codes but {len(content_hashes)} content hashes")
    keys = np.array([content.encode() for content in content_hashes])  # bytes take a quarter of the memory of str
    _, inverse = np.unique(keys, return_inverse=True)
    order = np.lexsort((*raw_codes.T[::-1], inverse))
    first = np.ones(len(order), dtype=bool)
    first[1:] = inverse[order][1:] != inverse[order][:-1]
    rows = order[first]
    return rows, inverse, raw_codes[rows].copy()


def groups_of(keys: np.ndarray) -> Iterable[np.ndarray]:
    """(n, d) keys -> groups of positions with equal rows, ascending within a group, groups in the order of their keys."""
    if not len(keys):
        return []
    if keys.shape[1] == 0:
        return [np.arange(len(keys))]
    order = np.lexsort(keys.T[::-1])
    starts = np.flatnonzero((keys[order][1:] != keys[order][:-1]).any(axis=1)) + 1
    return np.split(order, starts)
