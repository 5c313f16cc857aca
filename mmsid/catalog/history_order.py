"""Hashes of histories by the content of their items, and the order of users that follows from them.

Neither depends on ids, on row numbers or on the order of the rows in the user's files, except between users of equal content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from mmsid.catalog.histories import Histories, Slices

_ROWS_AT_ONCE = 1 << 20  # interactions whose content hashes are gathered together, 64 bytes each
_DIGITS = 64  # of a SHA-256 in hexadecimal


def content_digests(histories: Slices, content_sha256: Sequence[str]) -> np.ndarray:
    """SHA-256 (U, 32) uint8 of the joined content hashes of the items of each history.

    Args:
        histories: item rows of each user.
        content_sha256: content hash of each item, in hexadecimal.
    """
    if any(len(each) != _DIGITS for each in content_sha256):
        joined = ("".join(content_sha256[row] for row in rows).encode() for rows in histories)
        digests = b"".join(hashlib.sha256(each).digest() for each in joined)
        return np.frombuffer(digests, np.uint8).reshape(-1, 32)
    digits = np.frombuffer("".join(content_sha256).encode(), np.uint8).reshape(-1, _DIGITS)
    users, found = len(histories), []
    ends = np.cumsum(histories.lengths)
    first = 0
    while first < users:
        done = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _ROWS_AT_ONCE, side="right")))
        positions, offsets = histories[first:last].positions()
        text = memoryview(digits[histories.values[positions]].reshape(-1))
        places = (offsets * _DIGITS).tolist()
        found.append(b"".join([hashlib.sha256(text[a:b]).digest() for a, b in pairwise(places)]))
        first = last
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32)


def order_of(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (U,) that sort digests (U, 32) by their first 8 bytes, and a mask (U,) of the places that tie with a neighbour."""
    first = np.ascontiguousarray(digests[:, :8]).view(">u8").reshape(-1).astype(np.uint64)
    order = np.argsort(first, kind="stable")
    equal = first[order][1:] == first[order][:-1]
    tied = np.zeros(len(order), dtype=bool)
    tied[1:] |= equal
    tied[:-1] |= equal
    return order, tied


def sorted_by_content(histories: Histories, content_sha256: Sequence[str]) -> Histories:
    """Users by the hash of their history's content, then by item rows, timestamps, weights and user id."""
    digests = content_digests(histories.pieces(), content_sha256)
    order, tied = order_of(digests)
    members = order[tied]
    if len(members):
        order[tied] = members[sorted(range(len(members)), key=_keys(histories.take(members), digests[members]).__getitem__)]
    return histories.take(order)


def _keys(histories: Histories, digests: np.ndarray) -> list[tuple[Any, ...]]:
    text, offsets = digests.tobytes(), histories.offsets.tolist()
    columns = [values.tolist() for values in (histories.rows, histories.timestamps, histories.weights) if values is not None]
    return [
        (text[32 * user : 32 * user + 32], *(column[offsets[user] : offsets[user + 1]] for column in columns), user_id)
        for user, user_id in enumerate(histories.user_ids.to_pylist())
    ]


def engagement_of_duplicates(histories: Histories, content_sha256: Sequence[str]) -> dict[int, str]:
    """Row -> hash of the histories (by content) and positions in which the item occurs, for items with equal content."""
    _, inverse, copies = np.unique(np.asarray(content_sha256, dtype=str), return_inverse=True, return_counts=True)
    is_copy = copies[inverse] > 1
    if not is_copy.any():
        return {}
    occurrences: dict[int, list[str]] = {int(row): [] for row in np.flatnonzero(is_copy)}
    found = np.flatnonzero(is_copy[histories.rows])
    users, place = np.unique(np.searchsorted(histories.offsets, found, side="right") - 1, return_inverse=True)
    digests = [each.tobytes().hex() for each in content_digests(histories.pieces().take(users), content_sha256)]
    starts = histories.offsets[users]
    for at, user in zip(found.tolist(), place.tolist(), strict=True):
        time = "" if histories.timestamps is None else histories.timestamps[at]
        weight = "" if histories.weights is None else f":{histories.weights[at]}"
        occurrences[int(histories.rows[at])].append(f"{digests[user]}:{at - starts[user]}:{time}{weight}")
    return {row: hashlib.sha256("\n".join(sorted(each)).encode()).hexdigest() for row, each in occurrences.items()}


def update_hash(digest: hashlib._Hash, histories: Histories) -> None:
    """Add rows, timestamps and weights of all users, in their order and without ids, to a running hash."""
    for first in range(0, len(histories), 4096):
        part = histories[first : first + 4096]
        offsets = part.offsets.tolist()
        rows, times, weights = (None if each is None else each.tolist() for each in (part.rows, part.timestamps, part.weights))
        lines = []
        for start, end in pairwise(offsets):
            weighed = "" if weights is None else f"{weights[start:end]}\n"
            lines.append(f"{rows[start:end]}\n{None if times is None else times[start:end]}\n{weighed}")
        digest.update("".join(lines).encode())
