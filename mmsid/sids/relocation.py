"""Relocation of colliding items: distinct last codes within a prefix, and other prefixes for items of overfull ones.

Everything that grows with the catalogue is an array. Python steps are taken per colliding prefix and per item that leaves its prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmsid.errors import MmsidError
from mmsid.progress import track
from mmsid.sids.grouping import FreeCodes, Groups, prefix_keys, prefixes_of

T = TypeVar("T")
# (n,) item rows, (n, L-1) prefixes -> (n, K) log pi of the last code given the prefix.
LastScores: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
# item row -> its prefixes (L-1 codes) and their joint log pi, best first. Called only for items of an overfull group.
PrefixCandidates: TypeAlias = Callable[[int], Iterable[tuple[Sequence[int], float]]]
# (n,) item rows, beam width -> (n, b, L-1) the best prefixes of each item, best first.
PrefixBeams: TypeAlias = Callable[[np.ndarray, int], np.ndarray]
# positions of items that need distinct last codes, and the codes that they may take (None: all)
Task: TypeAlias = tuple[np.ndarray, np.ndarray | None]

BEAMS = (16, 1024)  # widths of the prefix searches; the wide one runs for items whose narrow candidates are all full
_HUNGARIAN_ITEMS = 2000  # larger groups are assigned greedily
_BATCH_ROWS = 2048
_SPILL_BATCH = 1024  # items whose narrow candidates are computed at once
_WIDE_BATCH = 16
_MAX_COST = 1e6  # replaces -log 0, because the solver needs finite costs
_TRACKED_ITEMS = 100_000  # smaller relocations finish before a progress bar is of use


class Relocation:
    """Relocation of distinct items, numbered in the order of their content hashes ("positions", as opposed to catalogue rows)."""

    def __init__(
        self,
        rows: np.ndarray,
        codes: np.ndarray,
        sizes: tuple[int, ...],
        last_scores: LastScores,
        prefix_candidates: PrefixCandidates | None,
        prefix_beams: PrefixBeams | None,
    ) -> None:
        self.rows, self.codes, self.sizes = rows, codes, sizes
        self.last_scores, self.prefix_candidates, self.prefix_beams = last_scores, prefix_candidates, prefix_beams
        self.last_size = sizes[-1]

    def run(self) -> None:
        groups = self._groups()
        collides = groups.repeats(self.codes[:, -1])
        if (groups.sizes > self.last_size).any():
            tasks, rows = self._spill(groups, collides)
        else:
            tasks = ((groups[group], None) for group in np.flatnonzero(collides))
            rows = int(groups.sizes[collides].sum())
        for batch in _tracked(_batches(tasks), "relocating", rows, lambda batch: sum(len(positions) for positions, _ in batch)):
            self._assign(batch)

    def _groups(self) -> Groups:
        return Groups.of(prefix_keys(self.codes, self.sizes[:-1]))

    def _spill(self, groups: Groups, collides: np.ndarray) -> tuple[Iterator[Task], int]:
        """Move the worst-fitting items out of overfull groups. Returns what is left to assign, and its number of items."""
        overfull = np.flatnonzero(groups.sizes > self.last_size)
        if self.prefix_candidates is None and self.prefix_beams is None:
            prefix = self.codes[groups[overfull[0]][0], :-1].tolist()
            raise MmsidError(
                f"{len(overfull)} prefixes hold more distinct items than the last level has codes (prefix {prefix}: "
                f"{groups.sizes[overfull[0]]} items, {self.last_size} codes); pass prefix candidates, or use a larger last codebook"
            )
        members = _tracked((groups[group] for group in overfull), "overfull prefixes", int(groups.sizes[overfull].sum()), len)
        leaving = np.sort(np.concatenate([self._choose_residents(group) for group in members]))
        free = FreeCodes(groups.keys, np.maximum(self.last_size - groups.sizes, 0), self.sizes[:-1], self.last_size)
        parts = _tracked(np.split(leaving, range(_SPILL_BATCH, len(leaving), _SPILL_BATCH)), "moving to other prefixes", len(leaving), len)
        keys = [key for part in parts for key in self._next_prefixes(part, free)]
        self.codes[leaving, :-1] = prefixes_of(np.array(keys, dtype=groups.keys.dtype), self.sizes[:-1])
        arrived = np.zeros(len(self.codes), dtype=bool)
        arrived[leaving] = True
        clean = groups.keys[~collides]
        return self._after_spill(arrived, clean)

    def _after_spill(self, arrived: np.ndarray, clean: np.ndarray) -> tuple[Iterator[Task], int]:
        groups = self._groups()
        has_arrivals = groups.any(arrived)
        keeps = has_arrivals & np.isin(groups.keys, clean)  # residents of a group that had no collision keep their codes
        left = np.flatnonzero(has_arrivals | groups.repeats(self.codes[:, -1]))

        def tasks() -> Iterator[Task]:
            for group in left:
                members = groups[group]
                if keeps[group]:
                    new = arrived[members]
                    open_codes = np.setdiff1d(np.arange(self.last_size), self.codes[members[~new], -1])
                    yield members[new], open_codes
                else:
                    yield members, None

        return tasks(), int(groups.sizes[left].sum())

    def _choose_residents(self, group: np.ndarray) -> np.ndarray:
        """Give the `last_size` items of an overfull group that fit best their codes. Returns the items that must leave."""
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
        return np.setdiff1d(group, entering[staying])

    def _next_prefixes(self, positions: np.ndarray, free: FreeCodes) -> list[int]:
        """Key of the best prefix with a free code for each item, in order; every item takes its code before the next one chooses."""
        found = []
        for position, options in zip(positions.tolist(), self._options(positions, free), strict=True):
            key = next((key for key in options if free.take(key)), None)
            if key is None:
                key = free.take_nearest(self.codes[position, :-1].tolist())
            if key is None:
                raise MmsidError(f"no prefix has a free code for row {int(self.rows[position])}; use more levels or larger codebooks")
            found.append(key)
        return found

    def _options(self, positions: np.ndarray, free: FreeCodes) -> Iterator[Iterator[int]]:
        """Keys of the candidate prefixes of each item, best first. Prefixes that are full already are left out, since none gets free."""
        if self.prefix_beams is None:
            assert self.prefix_candidates is not None
            for position in positions:
                prefixes = (prefix for prefix, _ in self.prefix_candidates(int(self.rows[position])))
                yield (int(prefix_keys(np.array([prefix], dtype=np.int64), self.sizes[:-1])[0]) for prefix in prefixes)
            return
        narrow = self._open_keys(positions, BEAMS[0], free)
        lost = np.array([index for index, keys in enumerate(narrow) if not keys], dtype=np.int64)
        wide: dict[int, list[int]] = {}
        for start in range(0, len(lost), _WIDE_BATCH):
            part = lost[start : start + _WIDE_BATCH]
            wide |= dict(zip(part.tolist(), self._open_keys(positions[part], BEAMS[1], free), strict=True))

        def candidates(index: int) -> Iterator[int]:
            yield from narrow[index]
            yield from wide[index] if index in wide else self._open_keys(positions[index : index + 1], BEAMS[1], free)[0]

        for index in range(len(positions)):
            yield candidates(index)

    def _open_keys(self, positions: np.ndarray, beam: int, free: FreeCodes) -> list[list[int]]:
        assert self.prefix_beams is not None
        prefixes = self.prefix_beams(self.rows[positions], beam)
        keys = prefix_keys(prefixes.reshape(-1, prefixes.shape[-1]), self.sizes[:-1]).reshape(prefixes.shape[:2])
        return [row[kept].tolist() for row, kept in zip(keys, free.counts(keys) > 0, strict=True)]

    def _assign(self, batch: list[Task]) -> None:
        """Assign last codes to groups that fit: one call of `last_scores` for all, then one assignment per group."""
        cost = self._cost(np.concatenate([positions for positions, _ in batch]))
        start = 0
        for positions, open_codes in batch:
            own = cost[start : start + len(positions)]
            placed, chosen = self._match(own if open_codes is None else own[:, open_codes])
            self.codes[positions[placed], -1] = chosen if open_codes is None else open_codes[chosen]
            start += len(positions)

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


def _batches(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """Lists of tasks of at most `_BATCH_ROWS` items together, or of one larger task."""
    batch: list[Task] = []
    rows = 0
    for task in tasks:
        if batch and rows + len(task[0]) > _BATCH_ROWS:
            yield batch
            batch, rows = [], 0
        batch.append(task)
        rows += len(task[0])
    if batch:
        yield batch


def _tracked(batches: Iterable[T], what: str, rows: int, size: Callable[[T], int]) -> Iterable[T]:
    """The same batches, with a progress bar if there are many items."""
    return track(batches, what, total=rows, size=size) if rows >= _TRACKED_ITEMS else batches
