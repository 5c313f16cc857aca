"""Path source of the hybrid recommender: trie-constrained beam search over a SID transformer, and exact scores of given items.

The score of an item is the log-probability of its path. At a node, the softmax runs over the children that existed when the
decoder was trained, and over the item's own child where that one is new. The score of an item therefore does not depend on
items that are added later, and equals `ItemScorer` when none are.
"""

from __future__ import annotations

import numpy as np
import torch

from mmsid.recommend.history_batch import HistoryBatch
from mmsid.recommend.history_encoder import pad_histories
from mmsid.recommend.paths import ItemPaths
from mmsid.recommend.sid_transformer import SidTransformer
from mmsid.sids.trie import Trie

CHUNK = 1 << 20  # floats per temporary tensor


class PathSource:
    """Scores and proposals by a SID transformer.

    Args:
        model: trained; its weights are copied, so that it may have been trained on some of the items only.
        paths: of all N items.
        known: (N,) bool, items whose paths the softmax runs over; None: all.
    """

    def __init__(self, model: SidTransformer, paths: ItemPaths, known: np.ndarray | None = None) -> None:
        self._index(model, paths, np.ones(len(paths.tokens), dtype=bool) if known is None else known)

    def add(self, tokens: np.ndarray) -> None:
        """Append items by their paths (M, D)."""
        joined = np.concatenate([self.paths.tokens, tokens])
        paths = ItemPaths(joined, self.paths.sizes)
        self._index(self.model, paths, np.concatenate([self.known, np.zeros(len(tokens), dtype=bool)]))

    def _index(self, model: SidTransformer, paths: ItemPaths, known: np.ndarray) -> None:
        self.model = SidTransformer(paths, model.shape)
        self.model.load_state_dict(model.state_dict())
        self.model.eval().requires_grad_(False)
        self.paths, self.tokens, self.known = paths, torch.from_numpy(paths.tokens), known
        trie = self.trie = Trie.from_codes(paths.tokens, paths.sizes)
        self.node_of = []  # per depth, the node of every item
        self.known_nodes = []  # per depth, bool: some known item lies below
        for start, end in zip(trie.item_start, trie.item_end, strict=True):
            node = torch.empty_like(trie.items)
            node[trie.items] = torch.repeat_interleave(torch.arange(len(start)), end - start)
            self.node_of.append(node)
            self.known_nodes.append(self._nodes_above(node, self.known))

    @torch.no_grad()
    def propose(self, batch: HistoryBatch, count: int) -> dict[str, np.ndarray]:
        """Proposed items (B, count) by source name, best first, padded with -1: a beam search with `count` beams."""
        trie, states = self.trie, self._states(batch)
        allowed = None if batch.allowed is None else [self._nodes_above(node, batch.allowed) for node in self.node_of]
        excluded = max((len(items) for items in batch.excluded), default=0)
        node = torch.zeros(len(batch), 1, dtype=torch.int64)
        log_prob, prefix = states.new_zeros(len(batch), 1), states.new_zeros(len(batch), 1, states.shape[1])
        for level in range(trie.depth):
            child, code, step = self._children(level, states[:, None], prefix, node)
            step = step + log_prob[..., None]
            if allowed is not None:
                step = step.masked_fill(~allowed[level + 1][child], -torch.inf)
            keep = count if level + 1 < trie.depth else count + excluded
            log_prob, best = step.flatten(1).topk(min(keep, step[0].numel()), dim=1)
            owner = best // step.shape[-1]
            node, code = child.flatten(1).gather(1, best), code.flatten(1).gather(1, best)
            prefix = prefix.gather(1, owner[..., None].expand(-1, -1, prefix.shape[-1])) + self.model.level_table(level)[code]
        leaves = node.masked_fill(torch.isneginf(log_prob), -1).numpy()
        return {"path": batch.first(self._items_of(leaves, count + excluded), count)}

    @torch.no_grad()
    def scores(self, batch: HistoryBatch, items: np.ndarray) -> dict[str, np.ndarray]:
        """Log-probabilities float32 (B, C) of items (B, C), by source name. Each prefix of a user is decoded once."""
        states, flat = self._states(batch), torch.from_numpy(items.reshape(-1))
        user = torch.arange(len(batch)).repeat_interleave(items.shape[1])
        total = states.new_zeros(len(flat))
        for level in range(self.trie.depth):
            pairs = (user * len(self.node_of[0]) + self.node_of[level][flat]).numpy()
            _, first, pair_of = np.unique(pairs, return_index=True, return_inverse=True)
            order = np.argsort(pair_of, kind="stable")
            bounds = np.searchsorted(pair_of[order], np.arange(len(first) + 1))
            size = max(1, CHUNK // max(int(self.trie.sizes[level]), self.model.shape.hidden))
            for start in range(0, len(first), size):
                end = min(start + size, len(first))
                members = order[bounds[start] : bounds[end]]
                pair, row = torch.from_numpy(first[start:end]), torch.from_numpy(pair_of[members] - start)
                members = torch.from_numpy(members)
                total[members] += self._steps(level, states[user[pair]], flat[pair], flat[members], row)
        return {"path": total.view(items.shape).numpy()}

    def _steps(self, level: int, states: torch.Tensor, parents: torch.Tensor, items: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Log-probability (m,) of the codes of items (m,) at one level; `row` is the index of each in the states (n, d).

        Args:
            parents: (n,), an item below the node at which each state is decoded.
        """
        prefix = torch.zeros_like(states)
        for before in range(level):
            prefix = prefix + self.model.level_table(before)[self.tokens[parents, before]]
        logits = self.model.level_logits(level, states, prefix)
        child, code, real = self._slots(level, self.node_of[level][parents])
        mass = logits.gather(1, code).masked_fill_(~(real & self.known_nodes[level + 1][child]), -torch.inf).logsumexp(1)
        own, mass = logits[row, self.tokens[items, level]], mass[row]
        return own - torch.where(self.known_nodes[level + 1][self.node_of[level + 1][items]], mass, torch.logaddexp(mass, own))

    def _children(
        self, level: int, states: torch.Tensor, prefix: torch.Tensor, node: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Children (B, W, C) of nodes (B, W), their codes, and their log-probabilities, -inf for padding."""
        child, code, real = self._slots(level, node)
        logits = self.model.level_logits(level, states, prefix).gather(-1, code)
        known = real & self.known_nodes[level + 1][child]
        mass = logits.masked_fill(~known, -torch.inf).logsumexp(-1, keepdim=True)
        step = logits - torch.where(known, mass, torch.logaddexp(mass, logits))
        return child, code, step.masked_fill(~real, -torch.inf)

    def _slots(self, level: int, node: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Children (..., C) of nodes (...), their codes, and which of them are real; padding repeats an arbitrary child."""
        offsets, codes = self.trie.child_offsets[level], self.trie.child_codes[level]
        first = offsets[node]
        degree = offsets[node + 1] - first
        place = torch.arange(int(degree.max()))
        child = (first[..., None] + place).clamp_max_(len(codes) - 1)
        return child, codes[child], place < degree[..., None]

    def _states(self, batch: HistoryBatch) -> torch.Tensor:
        """States (B, d) after the histories."""
        return batch.memo("states", lambda: self._last_states(batch))

    def _last_states(self, batch: HistoryBatch) -> torch.Tensor:
        histories = pad_histories(batch.histories, self.model.shape.max_history)
        if batch.unlisted is None:
            return self.model.last_states(histories)
        listed = histories.clamp(0, batch.num_items - 1)
        vectors = self.model.item_vectors(listed)
        codes = torch.from_numpy(batch.unlisted.tokens) + torch.tensor(self.model.offsets)
        place = histories >= batch.num_items
        vectors[place] = self.model.codes(codes[histories[place] - batch.num_items]).sum(-2)
        return self.model.encoder.last(vectors, histories)

    def _nodes_above(self, node_of: torch.Tensor, items: np.ndarray) -> torch.Tensor:
        """Bool (nodes,) of one depth: True where some item of the mask (N,) lies below."""
        above = torch.zeros(int(node_of.max()) + 1, dtype=torch.bool)
        above[node_of[torch.from_numpy(items)]] = True
        return above

    def _items_of(self, leaves: np.ndarray, count: int) -> np.ndarray:
        """Items (B, n) of leaves (B, W), in their order, at most `count` per leaf; padded with -1."""
        start, end = (bounds[-1].numpy() for bounds in (self.trie.item_start, self.trie.item_end))
        lengths = np.where(leaves >= 0, np.minimum(end[leaves] - start[leaves], count), 0)
        rows = []
        for leaf, length in zip(leaves, lengths, strict=True):
            before = np.repeat(np.cumsum(length) - length, length)
            rows.append(self.trie.items.numpy()[np.repeat(start[leaf], length) + np.arange(length.sum()) - before])
        found = np.full((len(leaves), max(map(len, rows), default=0)), -1, dtype=np.int64)
        for user, items in enumerate(rows):
            found[user, : len(items)] = items
        return found
