"""Groups of items with equal codes, for catalogues of 10 million items and more: sorted arrays instead of a Python object per group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_MAX_KEY = 2**62


def prefix_keys(codes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """One number per row of (n, d) codes, ordered like the rows: (n,) int64, or Python integers where int64 is too small.

    Args:
        sizes: d integers, codes per level. Codes must be below them.
    """
    capacity = 1
    for size in sizes:
        capacity *= int(size)
    keys = np.zeros(len(codes), dtype=np.int64 if capacity <= _MAX_KEY else object)
    for level, size in enumerate(sizes):
        keys = keys * int(size) + codes[:, level]
    return keys


def prefixes_of(keys: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Inverse of `prefix_keys`: (n,) keys -> (n, d) int64 codes."""
    codes = np.zeros((len(keys), len(sizes)), dtype=np.int64)
    for level in reversed(range(len(sizes))):
        codes[:, level] = keys % int(sizes[level])
        keys = keys // int(sizes[level])
    return codes


def lexicographic_order(codes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Order (n,) that sorts the rows of (n, d) codes; equal rows keep their order. Codes must be in [0, size)."""
    keys = prefix_keys(codes, sizes) if np.prod([float(size) for size in sizes]) <= _MAX_KEY else None
    return np.lexsort(codes.T[::-1]) if keys is None else np.argsort(keys, kind="stable")


@dataclass
class Groups:
    """Items (positions 0..n-1) grouped by key.

    Attributes:
        order: (n,) positions in the order of their keys; equal keys keep the order of the positions.
        starts: (g + 1,) group i holds order[starts[i] : starts[i + 1]].
        keys: (g,) key of each group, ascending.
    """

    order: np.ndarray
    starts: np.ndarray
    keys: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray) -> Groups:
        """Group positions by (n,) keys."""
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(keys) else np.zeros(0, dtype=np.int64)
        return cls(order, np.append(first, len(keys)), ordered[first])

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, group: int) -> np.ndarray:
        """Positions of one group, ascending."""
        return self.order[self.starts[group] : self.starts[group + 1]]

    @cached_property
    def sizes(self) -> np.ndarray:
        """(g,) number of positions per group."""
        return np.diff(self.starts)

    def any(self, marked: np.ndarray) -> np.ndarray:
        """(n,) bool per position -> (g,) True where a group has a marked position."""
        return np.add.reduceat(marked[self.order], self.starts[:-1], dtype=np.int64) > 0 if len(self) else np.zeros(0, dtype=bool)

    def repeats(self, values: np.ndarray) -> np.ndarray:
        """(n,) non-negative integers per position -> (g,) True where a value occurs twice in a group."""
        span = int(values.max(initial=0)) + 1
        pairs = np.sort(np.repeat(np.arange(len(self)), self.sizes) * span + values[self.order])
        found = np.zeros(len(self), dtype=bool)
        found[pairs[1:][pairs[1:] == pairs[:-1]] // span] = True
        return found


class FreeCodes:
    """Number of free last codes per prefix, while items move from full prefixes to others.

    Args:
        keys: (g,) keys of the prefixes that have items, ascending (`prefix_keys`).
        free: (g,) their free codes. A prefix without items has `last_size` free codes.
        sizes: codes per level of the prefix.
        last_size: codes of the last level.
    """

    _CHUNK = 65_536

    def __init__(self, keys: np.ndarray, free: np.ndarray, sizes: Sequence[int], last_size: int) -> None:
        self._keys, self._free, self._sizes, self._last_size = keys, free.copy(), tuple(int(size) for size in sizes), last_size
        self._others: dict[int, int] = {}  # prefixes that had no items before
        self._full_others: list[int] = []

    def counts(self, keys: np.ndarray) -> np.ndarray:
        """Free codes of prefixes, in the shape of `keys`."""
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        counts = np.where(self._keys[at] == keys, self._free[at], self._last_size)
        if self._full_others:
            counts[np.isin(keys, np.array(self._full_others, dtype=self._keys.dtype))] = 0
        return counts

    def take(self, key: int) -> bool:
        """Take one code of a prefix; False if none is free."""
        at = int(np.searchsorted(self._keys, key))
        if at < len(self._keys) and self._keys[at] == key:
            if self._free[at] <= 0:
                return False
            self._free[at] -= 1
            return True
        left = self._others.get(key, self._last_size)
        if left <= 0:
            return False
        self._others[key] = left - 1
        if left == 1:
            self._full_others.append(key)
        return True

    def take_nearest(self, own: Sequence[int]) -> int | None:
        """Take a code of the first free prefix among those that keep most leading codes of `own`; returns its key, None if all are full."""
        for kept in range(len(own) - 1, -1, -1):
            width = 1
            for size in self._sizes[kept:]:
                width *= size
            low = int(prefix_keys(np.array([own[:kept]], dtype=np.int64).reshape(1, kept), self._sizes[:kept])[0]) * width
            for start in range(0, width, self._CHUNK):
                keys = np.arange(start, min(start + self._CHUNK, width)).astype(self._keys.dtype) + low
                free = self.counts(keys) > 0
                if free.any():
                    key = int(keys[int(free.argmax())])
                    self.take(key)
                    return key
        return None


def content_ranks(contents: Sequence[str] | np.ndarray) -> np.ndarray:
    """Number the contents of N items: equal numbers = exact duplicates, numbers in the order of the contents. (N,) int64 from 0.

    Args:
        contents: N strings (content hashes), or an array (N,) of integers, which costs less for millions of items.
    """
    if isinstance(contents, np.ndarray) and contents.dtype.kind in "iu":
        keys = contents
    else:
        keys = np.array([content.encode() for content in contents])  # bytes take a quarter of the memory of str
    return np.unique(keys, return_inverse=True)[1]


def distinct_items(raw_codes: np.ndarray, contents: Sequence[str] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group rows by content. Returns, sorted by content, (n,) one row per item, (N,) item index of each row, (n, L) codes (a copy).

    Duplicates should have equal raw codes. If rounding made them differ, the lexicographically smallest codes are used.
    """
    if len(contents) != len(raw_codes):
        raise ValueError(f"{len(raw_codes)} rows of codes but {len(contents)} content hashes")
    groups = Groups.of(content_ranks(contents))
    inverse = np.empty(len(raw_codes), dtype=np.int64)
    inverse[groups.order] = np.repeat(np.arange(len(groups)), groups.sizes)
    rows = groups.order[groups.starts[:-1]]
    repeated = np.flatnonzero(groups.sizes[inverse] > 1)
    if len(repeated):
        repeated = repeated[np.lexsort((*raw_codes[repeated].T[::-1], inverse[repeated]))]
        items = inverse[repeated]
        first = np.append(True, items[1:] != items[:-1])
        rows[items[first]] = repeated[first]
    return rows, inverse, raw_codes[rows].copy()


def groups_of(keys: np.ndarray) -> list[np.ndarray]:
    """(n, d) keys -> groups of positions with equal rows, ascending within a group, groups in the order of their keys."""
    if not len(keys):
        return []
    if keys.shape[1] == 0:
        return [np.arange(len(keys))]
    order = np.lexsort(keys.T[::-1])
    starts = np.flatnonzero((keys[order][1:] != keys[order][:-1]).any(axis=1)) + 1
    return np.split(order, starts)
