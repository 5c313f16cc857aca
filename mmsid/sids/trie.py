"""Trie of published SIDs as flat tensors: the basis of constrained decoding; a leaf lists the items of a SID.

Depth d means d chosen codes; depth 0 is the root. The nodes of a depth are numbered in the order of their prefixes, so that the
children of a node are consecutive at the next depth and its items are a range of `items` (compressed sparse rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmsid.artifacts import read_tensors, write_tensors
from mmsid.errors import ArtifactError
from mmsid.sids.grouping import lexicographic_order
from mmsid.sids.table import SidTable

MAX_CODES = 2**24  # upper limit of codes per level in a file: a mask over all codes must fit in memory


@dataclass
class Trie:
    """Flat trie over (N, depth) codes. The last depth may be ragged: it is the suffix level, and items without suffix end before it.

    Attributes:
        sizes: (depth,) int64, codes per level.
        child_offsets: for d < depth: (nodes at d + 1,) int64; node i's children are nodes offsets[i] : offsets[i+1] of depth d+1.
        child_codes: for d < depth: (nodes at depth d+1,) int64, the code that leads to each; ascending within a parent.
        item_start, item_end: for d <= depth: (nodes,) int64; node i holds items[start[i] : end[i]].
        items: (N,) int64 item rows.
    """

    sizes: torch.Tensor
    child_offsets: list[torch.Tensor]
    child_codes: list[torch.Tensor]
    item_start: list[torch.Tensor]
    item_end: list[torch.Tensor]
    items: torch.Tensor

    def __post_init__(self) -> None:
        # parent * K + code of every node, ascending, so that one binary search finds a child
        self._keys = []
        for level, (offsets, codes) in enumerate(zip(self.child_offsets, self.child_codes, strict=True)):
            parents = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())
            self._keys.append(parents * int(self.sizes[level]) + codes)

    @classmethod
    def from_codes(cls, codes: np.ndarray | torch.Tensor, sizes: tuple[int, ...]) -> Trie:
        """Build a trie from (N, depth) codes; -1 in the last column marks an item without suffix.

        Raises:
            ValueError: no items, a code out of range, or another number of `sizes` than levels.
        """
        codes = np.asarray(codes, dtype=np.int64)
        if codes.ndim != 2 or 0 in codes.shape or codes.shape[1] != len(sizes):
            raise ValueError(f"codes must be (N, {len(sizes)}) with at least one item, got shape {codes.shape}")
        least = np.zeros(codes.shape[1], dtype=np.int64)
        least[-1] = -1 if codes.shape[1] > 1 else 0
        if (codes < least).any() or (codes >= np.array(sizes)).any():
            raise ValueError(f"codes must be in [0, size) per level (sizes {sizes}; -1 only at the last level)")
        order = lexicographic_order(codes + 1, [int(size) + 1 for size in sizes])
        ordered = codes[order]
        starts, ends = [np.zeros(1, dtype=np.int64)], [np.array([len(codes)], dtype=np.int64)]
        offsets, children = [], []
        changed = np.zeros(len(codes), dtype=bool)
        changed[0] = True
        for level in range(codes.shape[1]):
            changed[1:] |= ordered[1:, level] != ordered[:-1, level]
            start = np.flatnonzero(changed)
            end = np.append(start[1:], len(codes))
            real = ordered[start, level] >= 0
            start, end = start[real], end[real]
            parent = np.searchsorted(starts[-1], start, side="right") - 1
            offsets.append(np.concatenate([[0], np.cumsum(np.bincount(parent, minlength=len(starts[-1])))]))
            children.append(ordered[start, level])
            starts.append(start)
            ends.append(end)
        flat = [
            [torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)) for array in group]
            for group in (offsets, children, starts, ends)
        ]
        return cls(torch.tensor(sizes, dtype=torch.int64), *flat, items=torch.from_numpy(order.astype(np.int64)))

    @classmethod
    def from_table(cls, table: SidTable) -> Trie:
        """Build the trie of a table's published codes; a suffix column becomes one more, ragged level."""
        sizes = table.codebook_sizes
        if table.suffix is not None:
            sizes = (*sizes, max(int(table.suffix.max(initial=-1)) + 1, 1))
        return cls.from_codes(table.full_codes(), sizes)

    @property
    def depth(self) -> int:
        return len(self.child_codes)

    def num_nodes(self, depth: int) -> int:
        """Number of distinct prefixes of `depth` codes."""
        return len(self.item_start[depth])

    def to(self, device: torch.device | str) -> Trie:
        """Return the trie with every tensor on `device`."""
        moved = [
            [tensor.to(device) for tensor in group] for group in (self.child_offsets, self.child_codes, self.item_start, self.item_end)
        ]
        return Trie(self.sizes.to(device), *moved, items=self.items.to(device))

    def children(self, depth: int, node: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes that may follow a node, ascending, and their child nodes at depth + 1."""
        begin, end = (int(offset) for offset in self.child_offsets[depth][node : node + 2])
        return self.child_codes[depth][begin:end], torch.arange(begin, end, device=self.items.device)

    def step(self, depth: int, nodes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Follow `codes` (any shape) from `nodes` (same shape) of `depth`. Returns child nodes at depth + 1, -1 where there is none."""
        size = int(self.sizes[depth])
        keys = self._keys[depth]
        query = nodes.clamp_min(0) * size + codes.clamp(0, size - 1)
        if not len(keys):
            return torch.full_like(query, -1)
        found = torch.searchsorted(keys, query.contiguous()).clamp_max(len(keys) - 1)
        exists = (keys[found] == query) & (nodes >= 0) & (codes >= 0) & (codes < size)
        return torch.where(exists, found, -1)

    def walk(self, prefixes: torch.Tensor) -> torch.Tensor:
        """Find the nodes of prefixes: (B, l) codes -> (B,) nodes of depth l, -1 where no item has that prefix."""
        nodes = torch.zeros(len(prefixes), dtype=torch.int64, device=self.items.device)
        for level in range(prefixes.shape[1]):
            nodes = self.step(level, nodes, prefixes[:, level])
        return nodes

    def allowed(self, prefixes: torch.Tensor) -> torch.Tensor:
        """Mask of the codes that may follow: (B, l) prefix codes, l < depth -> (B, K) bool; all False for an unknown or complete SID."""
        depth, nodes = prefixes.shape[1], self.walk(prefixes)
        offsets, codes = self.child_offsets[depth], self.child_codes[depth]
        known = nodes.clamp_min(0)
        begin = offsets[known]
        count = torch.where(nodes >= 0, offsets[known + 1] - begin, 0)
        rows = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), count)
        within = torch.arange(len(rows), device=nodes.device) - (count.cumsum(0) - count)[rows]
        mask = torch.zeros((len(nodes), int(self.sizes[depth])), dtype=torch.bool, device=nodes.device)
        mask[rows, codes[begin[rows] + within]] = True
        return mask

    def items_under(self, depth: int, node: int) -> torch.Tensor:
        """Rows of all items below a node; at a leaf, the items that share the SID."""
        return self.items[int(self.item_start[depth][node]) : int(self.item_end[depth][node])]

    def save(self, path: Path) -> None:
        """Write the trie as safetensors."""
        tensors = {"sizes": self.sizes, "items": self.items}
        for name in ("child_offsets", "child_codes", "item_start", "item_end"):
            tensors |= {f"{name}.{depth}": tensor for depth, tensor in enumerate(getattr(self, name))}
        write_tensors(path, tensors)

    @classmethod
    def load(cls, path: Path) -> Trie:
        """Read and validate a file written by `save`.

        Raises:
            ArtifactError: another kind of file, or inconsistent tensors (names the first one).
        """
        tensors = read_tensors(path)
        try:
            depth = len(tensors["sizes"])
            groups = [
                [tensors[f"{name}.{level}"] for level in range(depth + extra)]
                for name, extra in (("child_offsets", 0), ("child_codes", 0), ("item_start", 1), ("item_end", 1))
            ]
        except KeyError as error:
            raise ArtifactError(f"{path}: tensor {error} is missing; expected a SID trie, export it again") from error
        invalid = _invalid_tensor(tensors["sizes"], *groups, items=tensors["items"])
        if invalid is not None:
            raise ArtifactError(f"{path}: tensor {invalid} is inconsistent with the others, so the file is corrupt; export it again")
        return cls(tensors["sizes"], *groups, items=tensors["items"])


def _invalid_tensor(
    sizes: torch.Tensor,
    child_offsets: list[torch.Tensor],
    child_codes: list[torch.Tensor],
    item_start: list[torch.Tensor],
    item_end: list[torch.Tensor],
    *,
    items: torch.Tensor,
) -> str | None:
    """Name of the first tensor that contradicts the attributes documented in `Trie`, or None."""

    def vector(tensor: torch.Tensor, length: int | None = None) -> bool:
        return tensor.dtype == torch.int64 and tensor.ndim == 1 and (length is None or len(tensor) == length)

    if not vector(sizes) or not len(sizes) or sizes.min() < 1 or sizes.max() > MAX_CODES:
        return "sizes"
    if not vector(items) or not len(items) or not torch.equal(items.sort().values, torch.arange(len(items))):
        return "items"
    for depth in range(len(sizes) + 1):
        nodes = 1 if depth == 0 else len(child_codes[depth - 1])
        if depth:
            codes = child_codes[depth - 1]
            if not vector(codes) or (codes < 0).any() or (codes >= sizes[depth - 1]).any():
                return f"child_codes.{depth - 1}"
        for name, bounds in (("item_start", item_start[depth]), ("item_end", item_end[depth])):
            if not vector(bounds, nodes) or (bounds < 0).any() or (bounds > len(items)).any():
                return f"{name}.{depth}"
        if (item_start[depth] >= item_end[depth]).any():
            return f"item_end.{depth}"
        if depth < len(sizes):
            offsets = child_offsets[depth]
            if not vector(offsets, nodes + 1) or offsets[0] != 0 or (offsets.diff() < 0).any() or offsets[-1] != len(child_codes[depth]):
                return f"child_offsets.{depth}"
    return None
