"""Canonical order of items: by content hash, items of equal content by the histories that contain them, by id as the last resort.

Row order and ids in the files therefore do not change seeded results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from mmsid.catalog.histories import Histories
from mmsid.catalog.history_order import engagement_of_duplicates

_NO_HISTORY = hashlib.sha256(b"").hexdigest()


def break_ties(
    order: np.ndarray, content: np.ndarray, id_rank: np.ndarray, histories: Histories, hashes: Callable[[], Sequence[str]]
) -> np.ndarray:
    """(N,) rows in canonical order.

    Args:
        order: (N,) rows sorted by content hash, then by id.
        content: (N, 4) uint64, content hash of each row.
        id_rank: (N,) position of each row in the order of ids.
        histories: histories whose entries are rows.
        hashes: gives the content hash (hex) of each row; called if there are ties.
    """
    same = (content[order[1:]] == content[order[:-1]]).all(axis=1)
    if not same.any() or not len(histories):
        return order
    engagement = engagement_of_duplicates(histories, hashes())
    result, ends = order.copy(), np.append(np.flatnonzero(~same) + 1, len(order))
    starts = np.concatenate([[0], ends[:-1]])
    for start, end in zip(starts[ends - starts > 1].tolist(), ends[ends - starts > 1].tolist()):
        group = order[start:end].tolist()
        result[start:end] = sorted(group, key=lambda row: (engagement.get(row, _NO_HISTORY), id_rank[row]))
    return result
