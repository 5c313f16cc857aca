"""Category paths of a batch, and the separator of paths that are written as one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.fields.cells import Column, lists_of, split_values
from mmsid.catalog.fields.ragged import Ragged, bounds, joined_rows

_ARROWS = (" &gt; ", " -> ", " » ", " › ", ">")  # hardly ever a part of a name
_SHARE_OF_ARROWS = 0.1
_SHARE_OF_MARKS = 0.8  # `|` and `/` are parts of names as well ("TV/Video")


def category_paths(
    columns: Sequence[Column], list_separator: str, separators: Mapping[str, str], roots: Sequence[str], rows: int
) -> Ragged:
    """(N,) category paths, from root to leaf.

    Args:
        columns: columns of the categories, from root to leaf. Each holds a text or a list.
        list_separator: separator of lists in csv cells.
        separators: column -> separator of the paths that it writes as one text.
        rows: number of rows N.
        roots: names at which a path may start. Earlier values are dropped. An empty list drops nothing.
    """
    parts = []
    for column in columns:
        lists = lists_of(column, list_separator, first_path_only=True)
        separator = separators.get(column.name)
        parts.append(lists if separator is None else _split_paths(lists, separator))
    if not parts:
        return Ragged(np.zeros(rows + 1, dtype=np.int64), pa.array([], pa.large_string()))
    paths = joined_rows(parts)
    return _from_roots(paths, roots) if roots else paths


def _split_paths(lists: Ragged, separator: str) -> Ragged:
    """The first text of each list that contains the separator, split. Lists without such a text stay as they are."""
    each = split_values(Ragged(np.arange(len(lists.values) + 1), lists.values), separator)
    is_path = each.lengths > 1
    rows = lists.rows
    first_path = np.full(len(lists.offsets) - 1, -1)
    positions = np.flatnonzero(is_path)[::-1]
    first_path[rows[positions]] = positions
    chosen = (first_path[rows] < 0) | (first_path[rows] == np.arange(len(rows)))
    kept = Ragged(bounds(each.lengths), each.values).kept(np.repeat(chosen, each.lengths))
    return Ragged(kept.offsets[lists.offsets], kept.values)


def _from_roots(paths: Ragged, roots: Sequence[str]) -> Ragged:
    is_root = np.flatnonzero(pc.is_in(paths.values, value_set=pa.array(roots, pa.large_string())))[::-1]
    rows = paths.rows
    first = np.full(len(paths.offsets) - 1, len(paths.values))
    first[rows[is_root]] = is_root
    return paths.kept(np.arange(len(paths.values)) >= first[rows])


def detected_separator(lists: Ragged, is_one_of_several: bool) -> str | None:
    """Separator of category paths that a column writes as one text, or None when its texts are names.

    An arrow (`>`, `»`, `›`, `->`) separates when a tenth of the texts has one. `|` and `/` separate when 80 % of the texts have one, and
    the texts form a tree: most have three levels, or the distinct first parts are at most half as many as the distinct texts and one
    second part hardly ever has two parents. So "Shoes / Bags" and "TV/Video" stay names.

    Args:
        lists: values of a sample of the column.
        is_one_of_several: whether the categories have several columns, one per level. Then only arrows separate.
    """
    values = lists.values
    if not len(values):
        return None
    for arrow in _ARROWS:
        if pc.mean(pc.match_substring(values, arrow).cast(pa.float64())).as_py() >= _SHARE_OF_ARROWS:
            return arrow.strip()
    if is_one_of_several or lists.lengths.max() > 1:
        return None
    return next((mark for mark in ("|", "/") if _is_tree(values, mark)), None)


def _is_tree(values: pa.LargeStringArray, mark: str) -> bool:
    if pc.mean(pc.match_substring(values, mark).cast(pa.float64())).as_py() < _SHARE_OF_MARKS:
        return False
    if pc.mean(pc.match_substring(values, "://").cast(pa.float64())).as_py() > 0.5:
        return False
    counts = pc.value_counts(values)
    weights = np.asarray(counts.field("counts"))
    parts = [[part.strip() for part in text.split(mark) if part.strip()] for text in counts.field("values").to_pylist()]
    deep = sum(weight for path, weight in zip(parts, weights) if len(path) > 2)
    if deep >= _SHARE_OF_MARKS * weights.sum():
        return True
    pairs = {(path[0], path[1]) for path in parts if len(path) > 1}
    firsts, seconds = {first for first, _ in pairs}, {second for _, second in pairs}
    return len(pairs) > 1 and 2 * len(firsts) <= len(parts) and len(pairs) <= 1.1 * len(seconds)
