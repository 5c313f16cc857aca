"""Paths of items through the levels of a SID table, and the trie of all paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from mmsid.recommend.trie_constraint import LevelConstraint, TrieConstraint
from mmsid.sids.trie import Trie


class ItemPaths(NamedTuple):
    """Paths of N items over D levels.

    Attributes:
        tokens: int64 (N, D), the code of each item at each level. A collision suffix is one more level.
        sizes: codes per level, length D.
    """

    tokens: np.ndarray
    sizes: tuple[int, ...]


def item_paths(codes: np.ndarray, suffix: np.ndarray | None, codebook_sizes: tuple[int, ...]) -> ItemPaths:
    """Build the paths of all items from their codes and collision suffixes.

    Args:
        codes: (N, L).
        suffix: (N,), -1 for no suffix. If any item has one, the paths get one more level whose code is suffix + 1.
    """
    codes = np.asarray(codes, dtype=np.int64)
    if suffix is None or (suffix < 0).all():
        return ItemPaths(codes, tuple(codebook_sizes))
    last = np.maximum(np.asarray(suffix, dtype=np.int64), -1) + 1
    return ItemPaths(np.column_stack([codes, last]), (*codebook_sizes, int(last.max()) + 1))


@dataclass(frozen=True)
class TrieLevel:
    """Edges from one depth of the trie to the next. `constraint.code[n]` is the code that leads to node n of the next depth.

    Attributes:
        constraint: the children of every node as a mask over codes.
        parent: (nodes,) int64, parent of each node of the next depth.
        items: (nodes,) int64, number of items below each node of the next depth.
    """

    constraint: LevelConstraint
    parent: torch.Tensor
    items: torch.Tensor

    def has_siblings(self, node: torch.Tensor) -> torch.Tensor:
        """Bool (...): True where the parent of a node (...) has other children, so that this level is a choice."""
        parent, first = self.parent[node], self.constraint.first
        return first[parent + 1] - first[parent] > 1

    def log_prob(self, logits: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
        """Log-probability (P,) of nodes (P,) among all children of their parents, from logits (P, K) of the level's codes."""
        parent = self.parent[node]
        candidates = self.constraint.mask(logits, parent)
        return -F.cross_entropy(candidates, self.constraint.candidate(parent, node), reduction="none")


@dataclass(frozen=True)
class PathTrie:
    """The trie of the paths of all items, or of some of the N items, level by level.

    Attributes:
        levels: D levels, from the root down.
        node_of: int64 (D, N), the node of each item after each level, -1 for an item outside the trie. The last row holds the leaves.
    """

    levels: tuple[TrieLevel, ...]
    node_of: torch.Tensor

    @property
    def num_items(self) -> int:
        """Number of items N."""
        return self.node_of.shape[1]

    @property
    def num_leaves(self) -> int:
        """Number of distinct paths. Items that share a SID share a leaf."""
        return len(self.levels[-1].parent)

    @classmethod
    def build(cls, paths: ItemPaths, device: torch.device | str = "cpu", rows: np.ndarray | None = None) -> PathTrie:
        """Build the trie. Nodes are numbered in the lexicographic order of their prefixes.

        Args:
            rows: int64, the items whose paths are in the trie, at least one; None: all items.
        """
        rows = np.arange(len(paths.tokens)) if rows is None else rows
        trie = Trie.from_codes(paths.tokens[rows], paths.sizes).to(device)
        members = torch.from_numpy(rows).to(device)[trie.items]
        levels, nodes_of_items = [], []
        for depth, constraint in enumerate(TrieConstraint.from_trie(trie).levels):
            children = constraint.first.diff()
            parent = torch.repeat_interleave(torch.arange(len(children), device=device), children)
            items = trie.item_end[depth + 1] - trie.item_start[depth + 1]
            levels.append(TrieLevel(constraint, parent, items))
            node = torch.full((len(paths.tokens),), -1, device=device)
            node[members] = torch.repeat_interleave(torch.arange(len(parent), device=device), items)
            nodes_of_items.append(node)
        return cls(tuple(levels), torch.stack(nodes_of_items))
