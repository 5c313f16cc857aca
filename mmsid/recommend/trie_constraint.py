"""Trie constraint on decoding: one batched masking step per level, and a Hugging Face logits processor built on it.

Levels where most codes may follow most nodes (the first ones) also keep a dense table, so that a step is one row lookup
and one addition. Sparse levels gather only the children of a node (compressed sparse rows), so that a search scores
`width` candidates per beam instead of the whole codebook. The split follows STATIC (arXiv 2602.22647). The masking step
neither loops over rows nor synchronises with the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor

from mmsid.sids.exports import token_ids
from mmsid.sids.table import SidTable
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
        prompt_length: columns of `input_ids` before the SID. Prompts of different lengths are padded on the left.
        end_token_id: may be omitted only if all SIDs have the same length and generation stops there.

    Raises:
        ValueError: on construction, if the arguments do not fit together; on a call, if `input_ids` is shorter than the
            prompt, or if there is no end token and a row has no legal continuation.
    """

    def __init__(self, trie: Trie, token_ids: Sequence[Sequence[int]], *, prompt_length: int, end_token_id: int | None = None) -> None:
        sizes, counts = trie.sizes.tolist(), [len(ids) for ids in token_ids]
        if len(counts) != len(sizes) or any(count < size for count, size in zip(counts, sizes)):
            raise ValueError(f"token_ids has {counts} tokens per level, the trie has {sizes} codes per level; give an id for every code")
        self.constraint = TrieConstraint.from_trie(trie)
        if end_token_id is None and any(bool(ends.any()) for ends in self.constraint.ends[:-1]):
            raise ValueError("some SIDs have a suffix and some do not; give end_token_id, otherwise a SID without suffix cannot end")
        self.prompt_length, self.end_token_id = prompt_length, end_token_id
        device = trie.items.device
        self.token_ids = [torch.as_tensor(list(ids), device=device) for ids in token_ids]
        vocabulary = 1 + max(int(ids.max()) for ids in self.token_ids)
        self.code_of = torch.full((len(sizes), vocabulary + 1), -1, device=device)  # last column: tokens that belong to no level
        for level, ids in enumerate(self.token_ids):
            self.code_of[level, ids] = torch.arange(len(ids), device=device)

    @classmethod
    def from_table(
        cls, table: SidTable, text_tokenizer: Any, *, prompt_length: int, device: torch.device | str = "cpu"
    ) -> TrieLogitsProcessor:
        """Build the processor for a SID table and a Hugging Face text tokenizer to which the SID tokens were added.

        The end token is the `eos_token_id` of the text tokenizer.

        Raises:
            ArtifactError: a SID token is missing from the tokenizer's vocabulary.
        """
        trie = Trie.from_table(table).to(device)
        return cls(trie, token_ids(text_tokenizer, table), prompt_length=prompt_length, end_token_id=text_tokenizer.eos_token_id)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Mask scores (R, V): -inf at every token that does not continue a SID in its row of input_ids (R, T)."""
        depth, levels = input_ids.shape[1] - self.prompt_length, self.constraint.levels
        if depth < 0:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} columns, fewer than prompt_length {self.prompt_length}; "
                "pass the length of the padded prompts"
            )
        node = torch.full_like(input_ids[:, 0], 0 if depth <= len(levels) else -1)
        for level, tokens in zip(range(min(depth, len(levels))), input_ids[:, self.prompt_length :].T):
            node = levels[level].step(node, self.code_of[level, tokens.clamp_max(self.code_of.shape[1] - 1)])
        masked = torch.full_like(scores, -torch.inf)
        may_end, may_continue = node < 0, torch.zeros_like(node, dtype=torch.bool)
        if depth <= len(levels) and len(self.constraint.ends[depth]):
            may_end |= self.constraint.ends[depth][node.clamp_min(0)]
            if depth < len(levels):
                code, real = levels[depth].children(node.clamp_min(0))
                token = self.token_ids[depth][code]
                real &= (node >= 0)[:, None]
                may_continue = real.any(1)
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
