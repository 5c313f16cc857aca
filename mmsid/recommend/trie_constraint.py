"""Trie constraint on decoding: one batched masking step per level, and a Hugging Face logits processor built on it.

Levels where most codes may follow most nodes (the first ones) also keep a dense table, so that a step is one row lookup
and one addition. Sparse levels gather only the children of a node (compressed sparse rows), so that a search scores
`width` candidates per beam instead of the whole codebook. The split follows STATIC (arXiv 2602.22647). The masking step
neither loops over rows nor synchronises with the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor

from mmsid.sids.trie import Trie

DENSE_CELLS = 1 << 22  # maximum nodes x codes of a level's dense table: 32 MiB for children and mask


@dataclass(frozen=True)
class LevelConstraint:
    """Codes that may follow the nodes of one depth.

    Attributes:
        size: K, codes of the level.
        width: C, maximum number of children of a node; 0 if the depth has no children.
        first: (nodes + 1,) int64; the children of node p are the nodes first[p] .. first[p + 1] - 1 of the next depth.
        code: (children,) int64, ascending within a parent.
        keys: (children,) int64, parent * K + code, ascending.
        child: (nodes, K) int32, the child reached by each code, -1 for none; None if the level is sparse.
        penalty: (nodes, K), 0 for existing children and -inf for others; None if the level is sparse.
    """

    size: int
    width: int
    first: torch.Tensor
    code: torch.Tensor
    keys: torch.Tensor
    child: torch.Tensor | None
    penalty: torch.Tensor | None

    @classmethod
    def build(cls, first: torch.Tensor, code: torch.Tensor, size: int) -> LevelConstraint:
        """Build from compressed sparse rows, on their device."""
        nodes, width = len(first) - 1, int(first.diff().max())
        parent = torch.repeat_interleave(torch.arange(nodes, device=first.device), first.diff())
        child = penalty = None
        if nodes * size <= DENSE_CELLS and 2 * width > size:
            child = torch.full((nodes, size), -1, dtype=torch.int32, device=first.device)
            child[parent, code] = torch.arange(len(code), dtype=torch.int32, device=first.device)
            penalty = torch.zeros(nodes, size, device=first.device).masked_fill_(child < 0, -torch.inf)
        return cls(size, width, first, code, parent * size + code, child, penalty)

    def mask(self, logits: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
        """Logits (..., K) at nodes (...) -> logits (..., C) of the candidates, -inf where a candidate does not exist.

        Candidate c is code c on a dense level (C = K) and the c-th child on a sparse level (C = width).
        """
        if self.penalty is not None:
            return logits + self.penalty[node]
        code, real = self.children(node)
        return logits.gather(-1, code).masked_fill_(~real, -torch.inf)

    def children(self, node: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (..., width) of the children of nodes (...) and the mask of real ones; the others hold arbitrary codes."""
        place = torch.arange(self.width, device=node.device)
        first = self.first[node]
        real = place < (self.first[node + 1] - first)[..., None]
        return self.code[(first[..., None] + place).clamp_max_(len(self.code) - 1)], real

    def follow(self, node: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
        """Child nodes (...) reached by candidates (...) of nodes (...); an arbitrary node where the candidate does not exist."""
        if self.child is not None:
            return self.child[node, candidate].long().clamp_min_(0)
        return (self.first[node] + candidate).clamp_max_(len(self.code) - 1)

    def candidate(self, parent: torch.Tensor, child: torch.Tensor) -> torch.Tensor:
        """Candidate (...) that leads from each parent (...) to its child (...), the inverse of `follow`."""
        return self.code[child] if self.child is not None else child - self.first[parent]

    def step(self, node: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """Child nodes (...) reached from nodes (...) by codes (...); -1 where a node is -1 or no item has that prefix."""
        valid = (node >= 0) & (code >= 0) & (code < self.size)
        node, code = node.clamp_min(0), code.clamp(0, self.size - 1)
        if self.child is not None:
            return torch.where(valid, self.child[node, code].long(), -1)
        if not len(self.keys):
            return torch.full_like(node, -1)
        key = node * self.size + code
        found = torch.searchsorted(self.keys, key).clamp_max_(len(self.keys) - 1)
        return torch.where(valid & (self.keys[found] == key), found, -1)


@dataclass(frozen=True)
class TrieConstraint:
    """Constraints of all levels of a trie, and the nodes where a SID ends.

    Attributes:
        levels: one per level of the trie.
        ends: per depth 0 .. D, (nodes,) bool, True where some item's SID ends: all nodes of the last depth, and items
            without a suffix at the depth before it.
    """

    levels: tuple[LevelConstraint, ...]
    ends: tuple[torch.Tensor, ...]

    @classmethod
    def from_trie(cls, trie: Trie) -> TrieConstraint:
        """Build from a trie, on its device."""
        levels, ends = [], []
        for depth in range(trie.depth):
            first = trie.child_offsets[depth]
            levels.append(LevelConstraint.build(first, trie.child_codes[depth], int(trie.sizes[depth])))
            items = trie.item_end[depth + 1] - trie.item_start[depth + 1]
            below = F.pad(items.cumsum(0), (1, 0))[first]
            ends.append(trie.item_end[depth] - trie.item_start[depth] > below.diff())
        ends.append(torch.ones(trie.num_nodes(trie.depth), dtype=torch.bool, device=trie.items.device))
        return cls(tuple(levels), tuple(ends))


class TrieLogitsProcessor(LogitsProcessor):
    """Restricts Hugging Face `generate` to complete, existing SIDs, in beam search, sampling and rollouts.

    The processor is stateless: each call reads the prefix of every row from `input_ids`. One object therefore works with
    any batch, with beam reordering and in several `generate` calls. A row may continue with the codes that follow its
    prefix. After a complete SID, and after a prefix that no item has (a beam of score -inf when there are fewer items
    than beams), it may continue with the end token only. For probabilities over legal codes, call `generate` with
    `renormalize_logits=True`. With beams, use `length_penalty=0`. A model's generation config may enable sampling.

    Args:
        trie: of the published SIDs, on the device of the model.
        token_ids: per level of the trie, the vocabulary id of each code (`mmsid.sids.exports.token_ids` for a text tokenizer).
        prompt_length: columns of `input_ids` (left-padded) before the SID. Give either this or `begin_token_id`.
        begin_token_id: the SID begins after the last occurrence of this token in a row; for prompts of different lengths.
        end_token_id: may be omitted only if all SIDs have the same length and generation stops there.

    Raises:
        ValueError: on construction, if the arguments do not fit together; on a call, if a row has no begin token, or if
            there is no end token and a row has no legal continuation.
    """

    def __init__(
        self,
        trie: Trie,
        token_ids: Sequence[Sequence[int]],
        *,
        prompt_length: int | None = None,
        begin_token_id: int | None = None,
        end_token_id: int | None = None,
    ) -> None:
        sizes, given = trie.sizes.tolist(), [len(ids) for ids in token_ids]
        if len(given) != len(sizes) or any(count < size for count, size in zip(given, sizes)):
            raise ValueError(f"token_ids has {given} tokens per level, the trie has {sizes} codes per level; give an id for every code")
        if (prompt_length is None) == (begin_token_id is None):
            raise ValueError("give either prompt_length or begin_token_id to mark where the SID begins")
        self.constraint = TrieConstraint.from_trie(trie)
        if end_token_id is None and any(bool(ends.any()) for ends in self.constraint.ends[:-1]):
            raise ValueError("some SIDs have a suffix and some do not; give end_token_id, otherwise a SID without suffix cannot end")
        self.prompt_length, self.begin_token_id, self.end_token_id = prompt_length, begin_token_id, end_token_id
        device = trie.items.device
        self.token_ids = [torch.as_tensor(list(ids), device=device) for ids in token_ids]
        vocabulary = 1 + max(int(ids.max()) for ids in self.token_ids)
        self.code_of = torch.full((len(sizes), vocabulary + 1), -1, device=device)  # last column: tokens that belong to no level
        for level, ids in enumerate(self.token_ids):
            self.code_of[level, ids] = torch.arange(len(ids), device=device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Mask scores (R, V): -inf at every token that does not continue a SID in its row of input_ids (R, T)."""
        start, longest = self._starts(input_ids)
        length = input_ids.shape[1] - start  # (R,) tokens of the SID so far
        node = torch.zeros_like(length)
        for level in range(min(longest, len(self.code_of))):
            # shorter rows read a token of their prompt here; torch.where below discards it
            token = input_ids.gather(1, (start + level).clamp_max(input_ids.shape[1] - 1)[:, None])[:, 0]
            code = self.code_of[level, token.clamp_max(self.code_of.shape[1] - 1)]
            node = torch.where(length > level, self.constraint.levels[level].step(node, code), node)
        node = torch.where(length > len(self.code_of), -1, node)
        return self._masked(scores, node, length, longest)

    def _starts(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Column (R,) at which each row's SID begins, and the maximum number of SID tokens of a row."""
        rows, width = input_ids.shape
        if self.prompt_length is not None:
            if width < self.prompt_length:
                raise ValueError(
                    f"input_ids has {width} columns, fewer than prompt_length {self.prompt_length}; pass the length of the padded prompts"
                )
            return torch.full((rows,), self.prompt_length, device=input_ids.device), width - self.prompt_length
        at = torch.arange(1, width + 1, device=input_ids.device)
        start = ((input_ids == self.begin_token_id) * at).amax(1)
        if not bool((start > 0).all()):
            row = int((start == 0).nonzero()[0, 0])
            raise ValueError(f"row {row} of input_ids has no begin token {self.begin_token_id}; end each prompt with it")
        return start, width - int(start.min())

    def _masked(self, scores: torch.Tensor, node: torch.Tensor, length: torch.Tensor, longest: int) -> torch.Tensor:
        """Scores (R, V) with -inf at illegal tokens, from each row's node (R,) and prefix length (R,)."""
        masked = torch.full_like(scores, -torch.inf)
        may_end, may_continue = node < 0, torch.zeros_like(node, dtype=torch.bool)
        depths = [longest] if self.prompt_length is not None else range(longest + 1)
        for depth in depths:
            if depth > len(self.constraint.levels) or not len(self.constraint.ends[depth]):
                continue  # rows longer than any SID, or with a prefix that no SID has: their node is -1
            here = (length == depth) & (node >= 0)
            place = torch.where(here, node, 0)
            may_end |= here & self.constraint.ends[depth][place]
            if depth < len(self.constraint.levels):
                code, real = self.constraint.levels[depth].children(place)
                token = self.token_ids[depth][code]
                real &= here[:, None]
                may_continue |= real.any(1)
                masked.scatter_reduce_(1, token, scores.gather(1, token).masked_fill_(~real, -torch.inf), "amax")
        if self.end_token_id is not None:
            end = scores[:, self.end_token_id]
            # a row whose only legal token is the end token must end, even if its score is -inf
            end = torch.where(torch.isneginf(end) & ~may_continue, 0.0, end)
            masked[:, self.end_token_id] = torch.where(may_end, end, -torch.inf)
        elif bool(may_end.any()):
            row = int(may_end.nonzero()[0, 0])
            reason = "no SID has its prefix" if bool(node[row] < 0) else "its SID is complete"
            raise ValueError(f"row {row} of input_ids has no legal continuation ({reason}); give end_token_id, or stop generating there")
        return masked
