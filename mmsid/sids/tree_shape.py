"""Shape of the prefix tree of a SID table: branching and concentration at every depth, and the groups of items that share a path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmsid.sids.grouping import Groups, prefix_keys
from mmsid.sids.table import SidTable
from mmsid.sids.trie import Trie


def tree_shape(table: SidTable) -> list[dict[str, float]]:
    """One record per depth 1 .. D of the tree of the published paths; a suffix is one more depth.

    Returns:
        nodes: distinct prefixes of this length. largest_share: share of the items under the largest of them.
        children, max_children: codes that may follow a node, mean and largest (0 at the last depth).
        single_child: share of the nodes that have exactly one child, where the next code is no choice.
    """
    trie, shape = Trie.from_table(table), []
    for depth in range(1, trie.depth + 1):
        items = (trie.item_end[depth] - trie.item_start[depth]).numpy()
        children = trie.child_offsets[depth].diff().numpy() if depth < trie.depth else np.zeros(len(items), dtype=np.int64)
        shape.append(
            {
                "nodes": len(items),
                "largest_share": float(items.max(initial=0)) / len(table),
                "children": float(children.mean()) if len(children) else 0.0,
                "max_children": int(children.max(initial=0)),
                "single_child": float((children == 1).mean()) if len(children) else 0.0,
            }
        )
    return shape


def shared_paths(table: SidTable, shown: int = 5, examples: int = 3) -> dict[str, Any]:
    """Groups of items that share a published path, suffix included.

    Returns:
        sizes: group size above 1 -> number of groups.
        largest: the `shown` largest groups: sid (tokens), items, examples (item ids).
    """
    codes = table.full_codes()
    sizes: Sequence[int] = [int(column.max(initial=0)) + 2 for column in codes.T]
    groups = Groups.of(prefix_keys(codes + 1, sizes))
    found, counts = np.unique(groups.sizes[groups.sizes > 1], return_counts=True)
    order = np.argsort(-groups.sizes, kind="stable")[:shown]
    largest = []
    for group in order[groups.sizes[order] > 1].tolist():
        rows = groups[group]
        tokens = table.align([table.item_ids[rows[0]]]).sid_tokens()[0]
        largest.append({"sid": "".join(tokens), "items": len(rows), "examples": [table.item_ids[row] for row in rows[:examples]]})
    return {"sizes": dict(zip(map(str, found.tolist()), counts.tolist())), "largest": largest}
