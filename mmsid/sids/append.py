"""Append new items to a published SID table without changing any published code.

New items are processed in the order of their content hashes. An exact duplicate of a published item shares its codes; another item
gets its raw codes if they are free, otherwise the best free last code of its prefix, otherwise one of its next best prefix.
The result depends on which items are appended together, not on their row order or ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from mmsid.errors import MmsidError
from mmsid.sids.collisions import Policy
from mmsid.sids.grouping import distinct_items, groups_of
from mmsid.sids.relocation import LastScores, PrefixCandidates


def append_codes(
    policy: Policy,
    raw_codes: np.ndarray,
    content_hashes: Sequence[str],
    published: np.ndarray,
    codebook_sizes: Sequence[int],
    last_scores: LastScores,
    prefix_candidates: PrefixCandidates,
    retired: np.ndarray | None = None,
) -> np.ndarray:
    """Return the codes (N, L) int64 of published and new items.

    Published rows are unchanged. New rows are unique except for exact duplicates. Two appends in a row give the same codes as one,
    except where an item of the second append competes for a SID that the first append assigned.

    Args:
        policy: collision policy of the published codes. `none` publishes the raw codes of new items.
        raw_codes: (N, L); only the rows of new items are read.
        content_hashes: N strings; equal hash = exact duplicate.
        published: (N, L); rows of new items are filled with -1.
        codebook_sizes: codes per level.
        last_scores, prefix_candidates: log pi of the tokenizer, as for `relocate`; called for new items only.
        retired: (R, L) codes of items that left the catalogue; they are never assigned again.

    Raises:
        MmsidError: the policy is `suffix` (a single published item would need a new suffix), or there are more distinct items than
            SIDs.
    """
    raw_codes, published = np.asarray(raw_codes, dtype=np.int64), np.asarray(published, dtype=np.int64)
    old, new = np.flatnonzero(published[:, 0] >= 0), np.flatnonzero(published[:, 0] < 0)
    growing = GrowingSids(policy, published[old], [content_hashes[row] for row in old], codebook_sizes, retired)
    codes = published.copy()
    codes[new] = growing.append(raw_codes[new], [content_hashes[row] for row in new], last_scores, prefix_candidates, new)
    return codes


class GrowingSids:
    """Published codes to which new items are appended again and again. An append costs time for its own items only.

    Args:
        policy, codebook_sizes, retired: as `append_codes`.
        codes: (N, L) of the published items.
        content_hashes: N strings.

    Raises:
        MmsidError: the policy is `suffix`.
    """

    def __init__(
        self,
        policy: Policy,
        codes: np.ndarray,
        content_hashes: Sequence[str],
        codebook_sizes: Sequence[int],
        retired: np.ndarray | None = None,
    ) -> None:
        if policy == "suffix":
            raise MmsidError(
                "items cannot be appended under the collision policy 'suffix': a published item without a suffix would need one when a new "
                "item gets the same codes; publish with 'relocate'"
            )
        self.policy = policy
        codes = np.asarray(codes, dtype=np.int64)
        self._known: dict[str, list[int]] = {}
        self._remember(content_hashes, codes)
        taken = codes if retired is None else np.concatenate([codes, retired])
        self._space = _TakenSids(taken, tuple(int(size) for size in codebook_sizes))

    def take(self, codes: np.ndarray, content_hashes: Sequence[str]) -> None:
        """Add items (n, L) whose codes were assigned earlier."""
        self._remember(content_hashes, codes)
        for row in codes:
            self._space.take(row)

    def append(
        self,
        raw_codes: np.ndarray,
        content_hashes: Sequence[str],
        last_scores: LastScores,
        prefix_candidates: PrefixCandidates,
        rows: np.ndarray | None = None,
    ) -> np.ndarray:
        """Codes (n, L) int64 of new items from their raw codes (n, L).

        Args:
            rows: (n,) row numbers by which the functions know the items; by default 0 to n - 1.

        Raises:
            MmsidError: there are more distinct items than SIDs. Nothing is added then.
        """
        raw_codes = np.asarray(raw_codes, dtype=np.int64)
        if self.policy == "none" or not len(raw_codes):
            return raw_codes.copy()
        rows = np.arange(len(raw_codes)) if rows is None else rows
        first, inverse, raw = distinct_items(raw_codes, list(content_hashes))
        unknown = [place for place in first if content_hashes[place] not in self._known]
        self._space.check_capacity(len(unknown))
        assigned, colliding = np.full_like(raw, -1), []
        for index, place in enumerate(first):
            if (shared := self._known.get(content_hashes[place])) is not None:
                assigned[index] = shared
            elif self._space.take(raw[index]):
                assigned[index] = raw[index]
            else:
                colliding.append(index)
        for index in colliding:
            assigned[index] = _best_free_sid(int(rows[first[index]]), raw[index, :-1], self._space, last_scores, prefix_candidates)
            self._space.take(assigned[index])
        codes = assigned[inverse]
        self._remember(content_hashes, codes)
        return codes

    def _remember(self, content_hashes: Sequence[str], codes: np.ndarray) -> None:
        for content, row in zip(content_hashes, codes.tolist(), strict=True):
            self._known[content] = min(self._known.get(content, row), row)  # independent of the row order


def _best_free_sid(
    row: int, own: np.ndarray, space: _TakenSids, last_scores: LastScores, prefix_candidates: PrefixCandidates
) -> tuple[int, ...]:
    """Best free SID of an item whose raw SID is taken: in its own prefix, or in its next best prefix with a free code."""
    candidates = (tuple(int(code) for code in prefix) for prefix, _ in prefix_candidates(row))
    for source in ([tuple(own.tolist())], candidates, _nearest_prefixes(tuple(own.tolist()), space.sizes)):
        for prefix in source:
            free = space.free(prefix)
            if free.any():
                scores = np.asarray(last_scores(np.array([row]), np.array([prefix], dtype=np.int64)), dtype=np.float64)[0]
                if np.isnan(scores).any():
                    raise MmsidError(f"log pi of row {row} is NaN; check the tokenizer's weights and that item's input")
                open_codes = np.flatnonzero(free)
                return (*prefix, int(open_codes[scores[open_codes].argmax()]))
    raise MmsidError(f"no prefix has a free code for row {row}; use more levels or larger codebooks")


def _nearest_prefixes(own: tuple[int, ...], sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield every prefix (all levels but the last); prefixes that keep most leading codes of `own` come first."""
    for kept in range(len(own) - 1, -1, -1):
        for tail in itertools.product(*(range(size) for size in sizes[kept:-1])):
            yield own[:kept] + tail


class _TakenSids:
    """The taken last codes of every prefix."""

    def __init__(self, taken: np.ndarray, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.capacity = float(np.prod([float(size) for size in sizes]))
        taken = np.unique(taken, axis=0)
        self._count = len(taken)
        self._last = {tuple(taken[group[0], :-1].tolist()): taken[group, -1].tolist() for group in groups_of(taken[:, :-1])}

    def free(self, prefix: tuple[int, ...]) -> np.ndarray:
        """(K,) bool: True where a last code is free under `prefix`."""
        free = np.ones(self.sizes[-1], dtype=bool)
        free[self._last.get(prefix, [])] = False
        return free

    def take(self, codes: Sequence[int] | np.ndarray) -> bool:
        """Mark a SID as taken; returns False if it was taken before."""
        *prefix, last = (int(code) for code in codes)
        if not self.free(tuple(prefix))[last]:
            return False
        self._last.setdefault(tuple(prefix), []).append(last)
        self._count += 1
        return True

    def check_capacity(self, num_new: int) -> None:
        """Raise an MmsidError if `num_new` more items cannot get unique SIDs."""
        if self._count + num_new > self.capacity:
            raise MmsidError(
                f"{num_new} new items cannot have unique SIDs: {self._count} of {int(self.capacity)} are taken (SIDs of items that left "
                "the catalogue are not reused); train a tokenizer with more levels or larger codebooks"
            )
