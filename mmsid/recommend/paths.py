"""What a recommender reads of a SID table: every item's path of tokens, and the trie of all paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from mmsid.recommend.trie_constraint import TrieConstraint
from mmsid.sids.trie import Trie


class ItemPaths(NamedTuple):
    """What a recommender reads of a SID table: tokens (N, D) int64, codes per level, decided (N, D) bool."""

    tokens: np.ndarray
    sizes: tuple[int, ...]
    decided: np.ndarray


def item_paths(codes: np.ndarray, suffix: np.ndarray | None, codebook_sizes: tuple[int, ...]) -> ItemPaths:
    """Paths of all items: codes (N, L), and one more level for a ragged suffix (N,), -1 = none, token 0 there.

    The suffix is no decision where an item has its raw code to itself.
    """
    codes = np.asarray(codes, dtype=np.int64)
    decided = np.ones_like(codes, dtype=bool)
    if suffix is None or (suffix < 0).all():
        return ItemPaths(codes, tuple(codebook_sizes), decided)
    _, group, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    last = np.maximum(np.asarray(suffix, dtype=np.int64), -1) + 1
    shared = counts[group.reshape(-1)] > 1
    return ItemPaths(np.column_stack([codes, last]), (*codebook_sizes, int(last.max()) + 1), np.column_stack([decided, shared]))


@dataclass(frozen=True)
class TrieLevel:
    """One level as the search reads it: children of node p are first[p] .. first[p + 1] - 1, sorted by token."""

    first: torch.Tensor  # (parents + 1,)
    token: torch.Tensor  # (nodes,)
    parent: torch.Tensor  # (nodes,)
    items: torch.Tensor  # (nodes,) items below each node


@dataclass(frozen=True)
class PathTrie:
    """The trie of all paths, level by level; `node_of` (D, N) is the node of each item per level (last row: its leaf)."""

    levels: tuple[TrieLevel, ...]
    node_of: torch.Tensor
    constraint: TrieConstraint

    @classmethod
    def build(cls, paths: ItemPaths, device: torch.device | str = "cpu") -> PathTrie:
        """From the paths of all items; nodes are numbered in the lexicographic order of their prefixes."""
        trie = Trie.from_codes(paths.tokens, paths.sizes).to(device)
        levels, places = [], []
        for depth in range(trie.depth):
            first, token = trie.child_offsets[depth], trie.child_codes[depth]
            parent = torch.repeat_interleave(torch.arange(len(first) - 1, device=device), first.diff())
            items = trie.item_end[depth + 1] - trie.item_start[depth + 1]
            levels.append(TrieLevel(first, token, parent, items))
            place = torch.empty_like(trie.items)
            place[trie.items] = torch.repeat_interleave(torch.arange(len(token), device=device), items)
            places.append(place)
        return cls(tuple(levels), torch.stack(places), TrieConstraint.from_trie(trie))
