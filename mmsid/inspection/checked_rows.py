"""From cells to codes: one number of levels, one form of token per level, codes within their codebooks. Other rows get a reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.errors import ArtifactError
from mmsid.inspection.code_cells import CodeCells

_RARE = 0.1  # share of rows with one level less below which these rows lack a code
_SHOWN = 3
REASONS = (
    "",
    "no item id",
    "item id occurs before",
    "no codes",
    "other number of levels",
    "code is missing or no number",
    "code is negative or too large",
    "token of another form",
    "code is outside the codebook",
    "cell is no list of codes",
)


class Levels(NamedTuple):
    """Usable rows.

    Attributes:
        rows: (n,) their positions in the file, from 0.
        codes: (n, L) int64.
        suffix: (n,) int64 or None.
        sizes: L codebook sizes.
    """

    rows: np.ndarray
    codes: np.ndarray
    suffix: np.ndarray | None
    sizes: tuple[int, ...]


def checked_codes(
    ids: pa.Array, cells: CodeCells, unusable: dict[int, str], sizes: Sequence[int] | None, path: str, notes: list[str]
) -> tuple[Levels, list[dict[str, Any]]]:
    """Usable rows, and one entry per other row: row (from 1), item_id, reason, detail.

    Raises:
        ArtifactError: no row can be used, or `sizes` has another number of levels.
    """
    rows = len(ids)
    reason = np.zeros(rows, dtype=np.int64)

    def mark(where: np.ndarray, what: str) -> None:
        reason[where & (reason == 0)] = REASONS.index(what)

    mark(ids.is_null().to_numpy(zero_copy_only=False), "no item id")
    mark(_repeated(ids), "item id occurs before")
    bad = np.zeros(rows, dtype=bool)
    bad[list(unusable)] = True
    mark(bad, "cell is no list of codes")
    mark(cells.lengths < 1, "no codes")
    lengths = np.maximum(cells.lengths, 0)
    depth, has_suffix = _depth(lengths[reason == 0])
    mark((lengths != depth) & ~((lengths == depth + 1) & has_suffix), "other number of levels")
    width = depth + has_suffix
    row_of = np.repeat(np.arange(rows), lengths)
    position = np.arange(len(row_of)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    inside = position < width
    codes, shapes = np.full((rows, width), -1, dtype=np.int64), np.full((rows, width), -1, dtype=np.int64)
    codes[row_of[inside], position[inside]] = cells.numbers[inside]
    shapes[row_of[inside], position[inside]] = cells.shapes[inside]
    present = shapes >= 0
    mark((present & (codes == -1)).any(axis=1), "code is missing or no number")
    mark((present & (codes == -2)).any(axis=1), "code is negative or too large")
    usual = [_usual(shapes[(reason == 0) & present[:, level], level]) for level in range(width)]
    mark((present & (shapes != np.array(usual))).any(axis=1), "token of another form")
    codes, sizes = _within_codebooks(codes, reason == 0, depth, sizes, path, notes)
    mark((codes[:, :depth] >= np.array(sizes)).any(axis=1) | (codes[:, :depth] < 0).any(axis=1), "code is outside the codebook")
    expected = [cells.forms[usual[level]] for level in range(width)]
    problems = _listed(ids, cells, unusable, reason, depth, has_suffix, expected)
    if not (reason == 0).any():
        examples = "; ".join(f"row {one['row']}: {one['reason']}{one['detail']}" for one in problems[:_SHOWN])
        raise ArtifactError(f"{path}: none of the {rows:,} rows can be used ({examples}); name the columns, or export the file again")
    kept = np.flatnonzero(reason == 0)
    if has_suffix:
        notes.append(f"{int((lengths[kept] > depth).sum()):,} items have one code more than the others; it is read as a collision suffix")
    return Levels(kept, codes[kept, :depth], codes[kept, depth] if has_suffix else None, sizes), problems


def _repeated(ids: pa.Array) -> np.ndarray:
    """(R,) True where an id occurred in an earlier row."""
    codes = pc.fill_null(pc.dictionary_encode(ids).indices, -1).to_numpy(zero_copy_only=False)
    repeated = np.ones(len(codes), dtype=bool)
    repeated[np.unique(codes, return_index=True)[1]] = False
    return repeated & (codes >= 0)


def _depth(lengths: np.ndarray) -> tuple[int, bool]:
    """Number of levels, and whether some rows have a collision suffix as one code more."""
    counts = np.bincount(lengths) if len(lengths) else np.array([0, 1])
    usual = int(counts.argmax())
    if usual + 1 < len(counts) and counts[usual + 1]:
        return usual, True
    if usual > 1 and counts[usual - 1] >= _RARE * counts.sum():
        return usual - 1, True
    return max(usual, 1), False


def _usual(shapes: np.ndarray) -> int:
    return int(np.bincount(shapes).argmax()) if len(shapes) else 0


def _within_codebooks(
    codes: np.ndarray, usable: np.ndarray, depth: int, sizes: Sequence[int] | None, path: str, notes: list[str]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Codes counted from 0 at every level, and the codebook sizes."""
    found = codes[usable, :depth]
    numbered_through = depth > 1 and len(found) > 1 and bool((found[:, 1:].min(axis=0) > found[:, :-1].max(axis=0)).all())
    if sizes is None:
        if numbered_through:
            notes.append(
                "the codes of every level are larger than those of the level before, so levels may be numbered through; give the "
                "codebook size (--codebook-size) to count each level from 0"
            )
        return codes, (int(found.max(initial=0)) + 1,) * depth
    sizes = tuple(sizes) * depth if len(sizes) == 1 else tuple(sizes)
    if len(sizes) != depth:
        raise ArtifactError(
            f"{path}: {len(sizes)} codebook sizes are given, the codes have {depth} levels; give one size per level, or one"
        )
    starts = np.cumsum([0, *sizes[:-1]])
    if numbered_through and bool(((found >= starts) & (found < starts + np.array(sizes))).all()):
        notes.append("the levels are numbered through; each is counted from 0 here")
        codes = codes.copy()
        codes[:, :depth] -= starts
    return codes, sizes


def _listed(
    ids: pa.Array, cells: CodeCells, unusable: dict[int, str], reason: np.ndarray, depth: int, has_suffix: bool, expected: list[str]
) -> list[dict[str, Any]]:
    starts = np.cumsum(np.maximum(cells.lengths, 0)) - np.maximum(cells.lengths, 0)
    levels = f"{depth} or {depth + 1}" if has_suffix else str(depth)
    listed = []
    for row in np.flatnonzero(reason).tolist():
        length, what = max(int(cells.lengths[row]), 0), REASONS[reason[row]]
        detail = ""
        if what == "other number of levels":
            detail = f": {length}, expected {levels}"
        elif what == "cell is no list of codes":
            detail = f": {unusable[row]}"
        elif what.startswith(("code is", "token")):
            written = cells.texts.slice(int(starts[row]), length).to_pylist()
            forms = "" if what != "token of another form" else f", expected {' '.join(expected[:length])}"
            detail = f": {' '.join('(none)' if one is None else str(one)[:40] for one in written[:8])}{forms}"
        listed.append({"row": row + 1, "item_id": ids[row].as_py(), "reason": what, "detail": detail})
    return listed
