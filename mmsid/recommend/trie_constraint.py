"""The trie as a constraint on decoding: one batched masking step per level, and a Hugging Face logits processor on top.

A level is stored twice where that pays. Where most codes may follow most nodes (the first levels), a dense table of
children and a dense row of 0 / -inf per node make the step one row lookup and one addition. Further down a node has a
few children among many codes: there only the children are gathered (compressed sparse rows), so that a search looks at
`width` candidates per beam and not at the whole codebook. The division is that of STATIC (arXiv 2602.22647).

The masking step neither loops over rows nor waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor

from mmsid.sids.trie import Trie

DENSE_CELLS = 1 << 22  # nodes x codes of one level's dense table at most: 32 MiB for the children and the mask


@dataclass(frozen=True)
class LevelConstraint:
    """What may follow the nodes of one depth.

    Attributes:
        size: K, codes of the level.
        width: C, the most children that a node has; 0 where the depth has no children at all.
        first: (nodes + 1,) int64; children of node p are the nodes first[p] .. first[p + 1] - 1 of the next depth.
        code: (children,) int64, ascending within a parent.
        keys: (children,) int64, parent * K + code, ascending.
        child, penalty: (nodes, K) int32 with -1 where there is no child, and 0 / -inf; None where the level is sparse.
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
        """From compressed sparse rows, on their device."""
        nodes, width = len(first) - 1, int(first.diff().max())
        parent = torch.repeat_interleave(torch.arange(nodes, device=first.device), first.diff())
        child = penalty = None
        if nodes * size <= DENSE_CELLS and 2 * width > size:
            child = torch.full((nodes, size), -1, dtype=torch.int32, device=first.device)
            child[parent, code] = torch.arange(len(code), dtype=torch.int32, device=first.device)
            penalty = torch.zeros(nodes, size, device=first.device).masked_fill_(child < 0, -torch.inf)
        return cls(size, width, first, code, parent * size + code, child, penalty)

    def mask(self, logits: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
        """Logits (..., K) of nodes (...) -> logits (..., C) of their candidates, -inf where a candidate does not exist.

        Candidate c is code c on a dense level (C = K), the c-th child on a sparse one (C = width).
        """
        if self.penalty is not None:
            return logits + self.penalty[node]
        code, real = self.children(node)
        return logits.gather(-1, code).masked_fill_(~real, -torch.inf)

    def children(self, node: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (..., width) of the children of nodes (...), and which of them are real; the others repeat the last code."""
        place = torch.arange(self.width, device=node.device)
        first = self.first[node]
        real = place < (self.first[node + 1] - first)[..., None]
        return self.code[(first[..., None] + place).clamp_max_(len(self.code) - 1)], real

    def follow(self, node: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
        """Child nodes (...) that candidates (...) of nodes (...) lead to; some node where the candidate does not exist."""
        if self.child is not None:
            return self.child[node, candidate].long().clamp_min_(0)
        return (self.first[node] + candidate).clamp_max_(len(self.code) - 1)

    def candidate(self, parent: torch.Tensor, child: torch.Tensor) -> torch.Tensor:
        """The candidate (...) that leads from each parent (...) to its child (...): `follow` the other way round."""
        return self.code[child] if self.child is not None else child - self.first[parent]

    def step(self, node: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """Child nodes (...) reached from nodes (...) by codes (...), -1 where a node is -1 or no item goes that way."""
        known = (node >= 0) & (code >= 0) & (code < self.size)
        node, code = node.clamp_min(0), code.clamp(0, self.size - 1)
        if self.child is not None:
            return torch.where(known, self.child[node, code].long(), -1)
        if not len(self.keys):
            return torch.full_like(node, -1)
        wanted = node * self.size + code
        found = torch.searchsorted(self.keys, wanted).clamp_max_(len(self.keys) - 1)
        return torch.where(known & (self.keys[found] == wanted), found, -1)


@dataclass(frozen=True)
class TrieConstraint:
    """All levels of a trie, and which nodes are whole SIDs.

    Attributes:
        levels: one per level of the trie.
        ends: per depth 0 .. D, (nodes,) bool: some item's SID ends at the node (the last depth: all; the one before it:
            items without a suffix).
    """

    levels: tuple[LevelConstraint, ...]
    ends: tuple[torch.Tensor, ...]

    @classmethod
    def from_trie(cls, trie: Trie) -> TrieConstraint:
        """On the device of the trie."""
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
    """Lets `generate` write whole, existing SIDs only: with beams, with sampling, in rollouts.

    Stateless: at each call the prefix of every row is read from `input_ids`, so one object serves any batch, beam
    reordering and several `generate` calls. A row allows the codes that continue its prefix; after a whole SID, and for
    a prefix that no item has (a beam of score -inf when there are fewer items than beams), the end token alone. No row
    is ever left unmasked. For probabilities over legal codes alone, generate with `renormalize_logits=True`; use
    `length_penalty=0` with beams, and mind that a model's own generation config may switch sampling on.

    Args:
        trie: of the published SIDs, on the device of the model.
        token_ids: per level of the trie, the vocabulary id of each code (sids/exports.py: `token_ids` for a text tokenizer).
        prompt_length: columns of `input_ids` (left-padded) before the SID; or
        begin_token_id: the token after whose last occurrence in a row the SID begins, for prompts of changing lengths.
        end_token_id: may be left out only if all SIDs have one length and generation stops there.

    Raises:
        ValueError: on construction, arguments that do not fit together; on a call, a row without the begin token, or,
            without an end token, a row that has nothing to continue with.
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
            raise ValueError(f"token_ids names {given} tokens per level, the trie has {sizes} codes per level; give an id for every code")
        if (prompt_length is None) == (begin_token_id is None):
            raise ValueError("give either prompt_length or begin_token_id, so that the processor knows where the SID begins")
        self.constraint = TrieConstraint.from_trie(trie)
        if end_token_id is None and any(bool(ends.any()) for ends in self.constraint.ends[:-1]):
            raise ValueError("some SIDs carry a suffix and some do not: give end_token_id, or a short SID cannot end")
        self.prompt_length, self.begin_token_id, self.end_token_id = prompt_length, begin_token_id, end_token_id
        device = trie.items.device
        self.token_ids = [torch.as_tensor(list(ids), device=device) for ids in token_ids]
        known = 1 + max(int(ids.max()) for ids in self.token_ids)
        self.code_of = torch.full((len(sizes), known + 1), -1, device=device)  # the last column: a token of no level
        for level, ids in enumerate(self.token_ids):
            self.code_of[level, ids] = torch.arange(len(ids), device=device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids (R, T), scores (R, V) -> scores, -inf at every token that continues no SID."""
        start, longest = self._starts(input_ids)
        length = input_ids.shape[1] - start  # (R,) tokens of the SID so far
        node = torch.zeros_like(length)
        for level in range(min(longest, len(self.code_of))):
            # rows that are shorter read a token of their prompt here, which the next line throws away
            token = input_ids.gather(1, (start + level).clamp_max(input_ids.shape[1] - 1)[:, None])[:, 0]
            code = self.code_of[level, token.clamp_max(self.code_of.shape[1] - 1)]
            node = torch.where(length > level, self.constraint.levels[level].step(node, code), node)
        node = torch.where(length > len(self.code_of), -1, node)
        return self._masked(scores, node, length, longest)

    def _starts(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Column (R,) at which each row's SID begins, and the most tokens that any row may hold of it."""
        rows, width = input_ids.shape
        if self.prompt_length is not None:
            if width < self.prompt_length:
                raise ValueError(f"the rows hold {width} tokens, fewer than prompt_length {self.prompt_length}")
            return torch.full((rows,), self.prompt_length, device=input_ids.device), width - self.prompt_length
        at = torch.arange(1, width + 1, device=input_ids.device)
        start = ((input_ids == self.begin_token_id) * at).amax(1)
        if not bool((start > 0).all()):
            row = int((start == 0).nonzero()[0, 0])
            raise ValueError(f"row {row} of input_ids has no begin token {self.begin_token_id}; end each prompt with it")
        return start, width - int(start.min())

    def _masked(self, scores: torch.Tensor, node: torch.Tensor, length: torch.Tensor, longest: int) -> torch.Tensor:
        masked = torch.full_like(scores, -torch.inf)
        may_end, goes_on = node < 0, torch.zeros_like(node, dtype=torch.bool)
        depths = [longest] if self.prompt_length is not None else range(longest + 1)
        for depth in depths:
            if depth > len(self.constraint.levels) or not len(self.constraint.ends[depth]):
                continue  # rows that went on after a whole SID, or where no SID goes: their node is -1
            here = (length == depth) & (node >= 0)
            place = torch.where(here, node, 0)
            may_end |= here & self.constraint.ends[depth][place]
            if depth < len(self.constraint.levels):
                code, real = self.constraint.levels[depth].children(place)
                token = self.token_ids[depth][code]
                real &= here[:, None]
                goes_on |= real.any(1)
                masked.scatter_reduce_(1, token, scores.gather(1, token).masked_fill_(~real, -torch.inf), "amax")
        if self.end_token_id is not None:
            end = scores[:, self.end_token_id]
            # a row that can only end must end, whatever the model thinks of it
            end = torch.where(torch.isneginf(end) & ~goes_on, 0.0, end)
            masked[:, self.end_token_id] = torch.where(may_end, end, -torch.inf)
        elif bool(may_end.any()):
            row = int(may_end.nonzero()[0, 0])
            what = "no item's SID begins like its prefix" if bool(node[row] < 0) else "its SID is whole"
            raise ValueError(f"row {row} of input_ids has no token left to allow ({what}); give end_token_id, or stop generating there")
        return masked
