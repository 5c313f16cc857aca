"""Collision handling: turn raw codes, where several items may share a SID, into published codes.

`relocate` moves the items of a colliding prefix group (all levels but the last) to distinct last codes at minimal total cost
-log pi. `suffix` numbers the items of a colliding bucket. `none` keeps collisions. Exact duplicates (equal content hashes) count as
one item. The result does not depend on row order or item ids: content hashes decide every order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from mmsid.errors import MmsidError
from mmsid.sids.distribution import prefix_labels
from mmsid.sids.grouping import Groups, distinct_items
from mmsid.sids.relocation import LastScores, PrefixBeams, PrefixCandidates, Relocation

Policy = Literal["relocate", "suffix", "none"]


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
    content_hashes: Sequence[str] | np.ndarray,
    codebook_sizes: Sequence[int],
    last_scores: LastScores | None = None,
    prefix_candidates: PrefixCandidates | None = None,
    prefix_beams: PrefixBeams | None = None,
) -> Resolution:
    """Apply a collision policy to (N, L) raw codes.

    `relocate` needs `last_scores`, and `prefix_candidates` or `prefix_beams` if a prefix group may hold more items than the last level
    has codes.

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
    codes = relocate(raw_codes, last_scores, content_hashes, codebook_sizes, prefix_candidates, prefix_beams)
    spilled = (codes[:, :-1] != raw_codes[:, :-1]).any(axis=1)
    return Resolution(codes, None, int((codes != raw_codes).any(axis=1).sum()), int(spilled.sum()))


def add_suffix(raw_codes: np.ndarray, content_hashes: Sequence[str] | np.ndarray) -> np.ndarray:
    """Number the items of colliding buckets: (N, L) codes -> (N,) int64.

    A bucket of n > 1 distinct items gets 0..n-1 in the order of the content hashes, any other item -1. Exact duplicates share a number.
    """
    raw_codes = np.asarray(raw_codes, dtype=np.int64)
    distinct, inverse, codes = distinct_items(raw_codes, content_hashes)
    buckets = Groups.of(prefix_labels(codes)[:, -1])
    suffix = np.full(len(distinct), -1, dtype=np.int64)
    within = np.arange(len(distinct)) - np.repeat(buckets.starts[:-1], buckets.sizes)
    suffix[buckets.order] = np.where(np.repeat(buckets.sizes, buckets.sizes) > 1, within, -1)
    return suffix[inverse]


def relocate(
    raw_codes: np.ndarray,
    last_scores: LastScores,
    content_hashes: Sequence[str] | np.ndarray,
    codebook_sizes: Sequence[int] | int,
    prefix_candidates: PrefixCandidates | None = None,
    prefix_beams: PrefixBeams | None = None,
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
        content_hashes: N strings, or integers (N,); equal hash = exact duplicate.
        codebook_sizes: codes per level; one integer applies to all levels.
        prefix_candidates: `prefix_candidates(row) -> [(prefix, log p), ...]`, best first; needed only if a group overflows.
            If all candidates are full, the item moves to the first free prefix that keeps most of its leading codes.
        prefix_beams: `prefix_beams(rows (n,), beam) -> (n, b, L-1)` the best prefixes of several items at once, used instead of
            `prefix_candidates`, which costs a call per item. It is called with a narrow and, where that is not enough, a wide beam.
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
    relocation = Relocation(rows, codes, sizes, last_scores, prefix_candidates, prefix_beams)
    relocation.run()
    return relocation.codes[inverse]
