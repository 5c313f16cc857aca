"""Append: new items get Semantic IDs beside published ones, and no published one moves.

Retraining and `relocate` weigh all items against each other and may move any of them; whoever serves SIDs cannot have that for
every new item. Here the published codes are taken, and the distinct new items come in the order of their content hashes:

1. an item of the content of a published one shares its codes (exact duplicates are one item);
2. an item whose raw SID nobody has takes it; of several new ones that want it, the first by content hash;
3. the others take, in the same order, the free last code of their prefix that fits best; a full prefix sends them to their next
   best prefix with room.

So the outcome depends on which items are appended together, never on the order of their rows or on their ids. Two appends in
turn give the same raw codes as one, and the same codes wherever nothing of the second wants a SID that the first gave away.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmsid.errors import MmsidError
from mmsid.sids.collisions import LastScores, Policy, PrefixCandidates, distinct_items, groups_of, nearest_prefixes


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
    """Codes (N, L) int64 of all items: those of `published` as they are, the new ones unique but for exact duplicates.

    Args:
        policy: what the published codes were made with. `none` publishes the raw codes; `suffix` is refused, because a lone
            published item would have to get a number.
        raw_codes: (N, L); only rows of new items are looked at.
        published: (N, L), -1 throughout the rows of new items.
        last_scores, prefix_candidates: log pi of the tokenizer, as for `relocate`; asked about new items only.
        retired: (R, L) codes of items that left the catalogue: never given again.

    Raises:
        MmsidError: the policy `suffix`; or more distinct items than SIDs.
    """
    if policy == "suffix":
        raise MmsidError(
            "items cannot be appended under the collision policy 'suffix': a published item that was alone with its codes would "
            "have to get a number; publish with 'relocate'"
        )
    raw_codes, published = np.asarray(raw_codes, dtype=np.int64), np.asarray(published, dtype=np.int64)
    new = np.flatnonzero(published[:, 0] < 0)
    codes = published.copy()
    if policy == "none" or not len(new):
        codes[new] = raw_codes[new]
        return codes
    known: dict[str, list[int]] = {}
    for row in np.flatnonzero(published[:, 0] >= 0):
        found = known.setdefault(content_hashes[row], published[row].tolist())
        known[content_hashes[row]] = min(found, published[row].tolist())  # whichever row comes first
    rows, inverse, wanted = distinct_items(raw_codes[new], [content_hashes[row] for row in new])
    rows = new[rows]
    taken = published[published[:, 0] >= 0] if retired is None else np.concatenate([published[published[:, 0] >= 0], retired])
    space = _Space(taken, tuple(int(size) for size in codebook_sizes))
    given, waiting = np.full_like(wanted, -1), []
    for place, row in enumerate(rows):
        if (shared := known.get(content_hashes[row])) is not None:
            given[place] = shared
        elif space.take(wanted[place]):
            given[place] = wanted[place]
        else:
            waiting.append(place)
    space.check_room(len(waiting))
    for place in waiting:
        given[place] = _next_best(int(rows[place]), wanted[place, :-1], space, last_scores, prefix_candidates)
        space.take(given[place])
    codes[new] = given[inverse]
    return codes


def _next_best(row: int, own: np.ndarray, space: _Space, last_scores: LastScores, prefix_candidates: PrefixCandidates) -> tuple[int, ...]:
    """The free SID that an item takes whose raw SID is taken: in its own prefix, else in the next one with room."""
    candidates = (tuple(int(code) for code in prefix) for prefix, _ in prefix_candidates(row))
    for source in ([tuple(own.tolist())], candidates, nearest_prefixes(tuple(own.tolist()), space.sizes)):
        for prefix in source:
            free = space.free(prefix)
            if free.any():
                scores = np.asarray(last_scores(np.array([row]), np.array([prefix], dtype=np.int64)), dtype=np.float64)[0]
                if np.isnan(scores).any():
                    raise MmsidError(f"log pi of row {row} is NaN; check the tokenizer's weights and that item's input")
                open_codes = np.flatnonzero(free)
                return (*prefix, int(open_codes[scores[open_codes].argmax()]))
    raise MmsidError(f"no prefix has room for row {row}; use more levels or larger codebooks")


class _Space:
    """Which SIDs are taken: the last codes of every prefix."""

    def __init__(self, taken: np.ndarray, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.capacity = float(np.prod([float(size) for size in sizes]))
        taken = np.unique(taken, axis=0)
        self._count = len(taken)
        self._last = {tuple(taken[group[0], :-1].tolist()): taken[group, -1].tolist() for group in groups_of(taken[:, :-1])}

    def free(self, prefix: tuple[int, ...]) -> np.ndarray:
        """(K,) bool: the last codes that are free under a prefix."""
        free = np.ones(self.sizes[-1], dtype=bool)
        free[self._last.get(prefix, [])] = False
        return free

    def take(self, codes: Sequence[int] | np.ndarray) -> bool:
        """Take a SID if it is free."""
        *prefix, last = (int(code) for code in codes)
        if not self.free(tuple(prefix))[last]:
            return False
        self._last.setdefault(tuple(prefix), []).append(last)
        self._count += 1
        return True

    def check_room(self, many: int) -> None:
        """Refuse before anything is searched for in vain."""
        if self._count + many > self.capacity:
            raise MmsidError(
                f"{many} new items cannot have unique SIDs: {self._count} of {int(self.capacity)} are taken (those of items that left the "
                "catalogue are never given again); train a tokenizer with more levels or larger codebooks"
            )
