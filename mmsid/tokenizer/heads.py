"""SID heads: quantizer policies pi(c_1..c_L | item) on the SID states of the backbone.

`ResidualHead` is a differentiable residual quantizer; `ParallelHead` is the head of UniSID (arXiv 2602.10445, section 2.2).
Symbols: B items, M paths per item, L levels, K codes per level, H hidden size of the backbone, D size of the projected states (the
code space for the residual head; K, plus the behaviour coordinates if any, for the parallel head). Ties go to the lowest index.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsid.tokenizer.behaviour import BehaviourInput, BehaviourSettings


class Greedy(NamedTuple):
    """Level-by-level argmax of the policy.

    Attributes:
        codes: (B, L) int64.
        margin: (B,) smallest gap over the levels between the best and the second-best logit, in nats; inf when K = 1.
        relative_margin: (B,) smallest gap divided by the magnitude of the terms it was computed from (`CodeHead.scale`), to be
            compared with rounding error.
    """

    codes: Tensor
    margin: Tensor
    relative_margin: Tensor


class Paths(NamedTuple):
    """An enumerated tree of code paths.

    Attributes:
        codes: (B, M, L) int64. The best code comes first at every level; the last level varies fastest.
        log_prob: (B, M), normalised over the M paths: `log_prob.exp().sum(1) == 1`.
    """

    codes: Tensor
    log_prob: Tensor


class CodeHead(nn.Module, ABC):
    """Base class of SID heads. Subclasses implement `project`, `level_logits` and `rename`."""

    num_levels: int
    codebook_size: int

    @abstractmethod
    def project(self, h: Tensor) -> Tensor:
        """SID states (B, L, H) -> projected states (B, L, D), the input of `level_logits`."""

    @abstractmethod
    def level_logits(self, s: Tensor, prefix: Tensor) -> Tensor:
        """Logits of the level after `prefix`: s (B, L, D), prefix (B, l) -> (B, K); prefix (B, M, l) -> (B, M, K)."""

    def tree_logits(self, s: Tensor, prefixes: Tensor, branching: Sequence[int]) -> Tensor:
        """`level_logits` of all prefixes (B, M, l) of a tree up to a constant per row, (B, M, K), computed faster where the head can.

        Args:
            branching: children per level; M is their product, and the prefixes are listed depth first.
        """
        return self.level_logits(s, prefixes)

    def scale(self, s: Tensor, prefix: Tensor, logits: Tensor) -> Tensor:
        """Magnitude (B,) of the terms that were subtracted to form `logits`, which bounds their rounding error."""
        return logits.abs().amax(-1)

    @abstractmethod
    def rename(self, permutations: Sequence[np.ndarray]) -> None:
        """Permute the codes of every level in place: code c of level l becomes `permutations[l][c]`."""

    def log_prob(self, s: Tensor, codes: Tensor) -> Tensor:
        """log pi(c_l | x, c_<l) for every level: codes (B, L) -> (B, L), or codes (B, M, L) -> (B, M, L). Full softmax over K."""
        levels = [
            self.level_logits(s, codes[..., :level]).log_softmax(-1).gather(-1, codes[..., level : level + 1])
            for level in range(codes.shape[-1])
        ]
        return torch.cat(levels, -1)

    def teacher_logits(self, s: Tensor, codes: Tensor) -> Tensor:
        """Logits of every level under the prefixes of `codes` (B, L): (B, L, K)."""
        return torch.stack([self.level_logits(s, codes[:, :level]) for level in range(self.num_levels)], 1)

    def greedy(self, s: Tensor) -> Greedy:
        """Raw codes: the level-by-level argmax of pi."""
        batch = s.shape[0]
        codes = torch.zeros(batch, 0, dtype=torch.int64, device=s.device)
        margin = torch.full((batch,), math.inf, dtype=s.dtype, device=s.device)
        relative_margin = margin.clone()
        for _ in range(self.num_levels):
            logits = self.level_logits(s, codes)
            chosen = logits.argmax(-1)  # argmax is documented to return the first maximum, max is not
            if self.codebook_size > 1:
                second = logits.scatter(-1, chosen[:, None], -math.inf).amax(-1)
                gap = logits.amax(-1) - second
                margin = torch.minimum(margin, gap)
                relative_margin = torch.minimum(relative_margin, gap / self.scale(s, codes, logits).clamp_min(1e-12))
            codes = torch.cat([codes, chosen[:, None]], 1)
        return Greedy(codes, margin, relative_margin)

    def top_paths(self, s: Tensor, m: int, propose: Callable[[Tensor], Tensor] | None = None) -> Paths:
        """Tree of the m most likely codes after every kept prefix: m**L paths.

        To score the same paths under another policy: `other.log_prob(s_other, paths.codes).sum(-1).log_softmax(-1)`.

        Args:
            s: (B, L, D) projected states.
            m: codes kept per prefix, capped at K.
            propose: maps kept prefixes (B, M, l) to codes (B, M, n), n < m, -1 for none. Proposed codes are kept regardless of their
                score, in place of the least likely ones.

        Returns:
            Paths with log-probabilities renormalised over the tree.
        """
        m = min(m, self.codebook_size)
        batch = s.shape[0]
        codes = torch.zeros(batch, 1, 0, dtype=torch.int64, device=s.device)
        joint = torch.zeros(batch, 1, dtype=s.dtype, device=s.device)
        for _ in range(self.num_levels):
            scores = self.tree_logits(s, codes, (m,) * codes.shape[-1]).log_softmax(-1)
            order = _best(scores, m)
            if propose is not None:
                order = _keep_proposed(scores.flatten(0, 1), order.flatten(0, 1), propose(codes).flatten(0, 1)).view_as(order)
            joint = (joint[..., None] + scores.gather(-1, order)).flatten(1)
            codes = torch.cat([codes[:, :, None].expand(-1, -1, m, -1), order[..., None]], -1).flatten(1, 2)
        return Paths(codes, joint.log_softmax(-1))


def _best(scores: Tensor, m: int) -> Tensor:
    """Indices (..., m) of the m largest scores (..., K), best first; the lowest index first among ties, which topk does not guarantee."""
    values, found = scores.topk(m, dim=-1)
    found, by_index = found.sort(dim=-1)
    order = found.gather(-1, values.gather(-1, by_index).sort(dim=-1, descending=True, stable=True).indices)
    tied = (scores >= values[..., -1:]).sum(-1) > m  # topk chose among equal scores
    if bool(tied.any()):
        order[tied] = scores[tied].sort(dim=-1, descending=True, stable=True).indices[..., :m]
    return order


def _keep_proposed(scores: Tensor, kept: Tensor, proposed: Tensor) -> Tensor:
    """Replace the worst of `kept` by the proposed codes.

    Args:
        scores: (B, K). kept: (B, m) codes, best first. proposed: (B, n) codes, -1 for none.

    Returns:
        (B, m) codes, best first: the proposed ones and the best of the others.
    """
    rank = torch.full_like(scores, -math.inf).scatter(1, kept, scores.gather(1, kept))
    is_proposed = scores.new_zeros(len(scores), scores.shape[1] + 1)  # the last column receives the -1
    rank = rank.masked_fill(is_proposed.scatter(1, proposed % is_proposed.shape[1], 1.0)[:, :-1] > 0, math.inf)
    chosen = rank.topk(kept.shape[1], dim=1).indices
    return chosen.gather(1, scores.gather(1, chosen).sort(dim=1, descending=True, stable=True).indices)


class ResidualHead(CodeHead):
    """Residual quantizer policy in a code space of size `code_dim`.

    States are projected to s_l = W h_l + b_l. Level l scores its code vectors e against the residual r_l = s_l - (sum of the code
    vectors chosen before): pi(c_l | x, c_<l) = softmax(-|r_l - e|^2 / t_l). W is shared by all levels, b_l and t_l are per level.

    The first H coordinates of the code space hold content, the next M behaviour, if the head has a behaviour input. Its states then
    are (B, L, H + M + 1): every level's state, followed by the item's behaviour vector and its number of interactions.
    """

    def __init__(
        self,
        hidden_size: int,
        num_levels: int = 3,
        codebook_size: int = 256,
        code_dim: int = 448,
        behaviour: BehaviourSettings | None = None,
    ) -> None:
        super().__init__()
        if behaviour is not None and code_dim < hidden_size + behaviour.dim:
            raise ValueError(f"code_dim is {code_dim}, but content and behaviour need {hidden_size} + {behaviour.dim} coordinates")
        self.hidden_size = hidden_size
        self.num_levels, self.codebook_size, self.code_dim = num_levels, codebook_size, code_dim
        self.projection = nn.Linear(hidden_size, code_dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_levels, code_dim))  # per level, because every SID token adds its own constant to the state
        self.vectors = nn.Parameter(torch.randn(num_levels, codebook_size, code_dim) / math.sqrt(code_dim))
        self.log_temperature = nn.Parameter(torch.zeros(num_levels))
        self.behaviour = None if behaviour is None else BehaviourInput(behaviour, hidden_size)

    def project(self, h: Tensor) -> Tensor:
        """Behaviour reading: `content` with the item's behaviour, if the head has such an input. (B, L, H + M + 1) -> (B, L, code_dim)."""
        s = self.content(h)
        return s if self.behaviour is None else self.behaviour(s, h[:, 0, self.hidden_size :])

    def content(self, h: Tensor) -> Tensor:
        """Content reading s_l = W h_l + b_l of the first H coordinates of states h: (B, L, ...) -> (B, L, code_dim)."""
        return self.projection(h[..., : self.hidden_size]) + self.bias

    @torch.no_grad()
    def rename(self, permutations: Sequence[np.ndarray]) -> None:
        """Permute the code vectors of every level in place."""
        for level, permutation in enumerate(permutations):
            self.vectors[level] = self.vectors[level][np.argsort(permutation)].clone()

    def prefix_vectors(self, codes: Tensor) -> Tensor:
        """Cumulative sums of code vectors: codes (..., l) -> (..., l, code_dim); entry j is the reconstruction from j+1 levels."""
        # F.embedding instead of indexing, whose multi-threaded backward adds gradients in random order: runs would not be repeatable
        chosen = [F.embedding(codes[..., level], self.vectors[level]) for level in range(codes.shape[-1])]
        return torch.stack(chosen, -2).cumsum(-2)

    def reconstruction(self, codes: Tensor) -> Tensor:
        """Sum of the code vectors of whole paths: codes (..., L) -> (..., code_dim), the last entry of `prefix_vectors`."""
        total = F.embedding(codes[..., 0], self.vectors[0])
        for level in range(1, codes.shape[-1]):
            total = total + F.embedding(codes[..., level], self.vectors[level])
        return total

    def residual(self, s: Tensor, prefix: Tensor) -> Tensor:
        """r_l = s_l - sum of the vectors of `prefix` (B, l) or (B, M, l): (B, code_dim) or (B, M, code_dim)."""
        level = prefix.shape[-1]
        r = s[:, level] if prefix.dim() == 2 else s[:, level, None].expand(-1, prefix.shape[1], -1)
        for before in range(level):
            r = r - F.embedding(prefix[..., before], self.vectors[before])
        return r

    def level_logits(self, s: Tensor, prefix: Tensor) -> Tensor:
        """-|r_l - e|^2 / t_l for every code e of the level after `prefix`."""
        r, vectors = self.residual(s, prefix), self.vectors[prefix.shape[-1]]
        squared = r.square().sum(-1, keepdim=True) + vectors.square().sum(-1) - 2 * r @ vectors.T
        return -squared / self.log_temperature[prefix.shape[-1]].exp()

    def tree_logits(self, s: Tensor, prefixes: Tensor, branching: Sequence[int]) -> Tensor:
        """(2 r.e - |e|^2) / t, that is `level_logits` without -|r|^2 / t, from inner products of code vectors.

        The residuals (B, M, code_dim) are not built, and a prefix is read once for all that continue it.
        """
        level = prefixes.shape[-1]
        table, below, scale = self.vectors[level], prefixes.shape[1], 2 / self.log_temperature[level].exp()
        logits = ((s[:, level] @ table.T - table.square().sum(-1) / 2) * scale)[:, None]
        for before, children in enumerate(branching):
            below //= children
            of_code = F.embedding(prefixes[:, ::below, before], self.vectors[before] @ table.T * scale)
            logits = (logits[:, :, None] - of_code.unflatten(1, (-1, children))).flatten(1, 2)
        return logits

    def scale(self, s: Tensor, prefix: Tensor, logits: Tensor) -> Tensor:
        """(|r|^2 + max |e|^2) / t of the level after `prefix`; the logits are small differences of terms of this size."""
        level = prefix.shape[-1]
        size = self.residual(s, prefix).square().sum(-1) + self.vectors[level].square().sum(-1).amax()
        return size / self.log_temperature[level].exp()

    def soft_prefix_vectors(self, s: Tensor, codes: Tensor) -> Tensor:
        """As `prefix_vectors`, but the last vector of every prefix is its expectation under pi: (B, L, code_dim).

        p_l = sum_{j<l} e_{c_j} + E_{c ~ pi(.|x, c_<l)} e_c. The expectation carries gradient from a loss on the quantised prefix
        to the policy; the codes before it are fixed.
        """
        hard = self.prefix_vectors(codes)
        out = []
        for level in range(self.num_levels):
            expected = self.level_logits(s, codes[:, :level]).softmax(-1) @ self.vectors[level]
            out.append(expected if level == 0 else hard[:, level - 1] + expected)
        return torch.stack(out, 1)


class ParallelHead(CodeHead):
    """Head of UniSID: one linear layer per SID token gives K logits. The levels are independent given the item.

    With a behaviour input, the projected states have K + M coordinates: the logits of the content, then behaviour, which is
    U h_l + b_l for content alone. Its weight in the logits is a matrix (K, M) per level, `vectors`.
    """

    def __init__(self, hidden_size: int, num_levels: int = 3, codebook_size: int = 256, behaviour: BehaviourSettings | None = None) -> None:
        super().__init__()
        self.hidden_size, self.num_levels, self.codebook_size = hidden_size, num_levels, codebook_size
        self.levels = nn.ModuleList(nn.Linear(hidden_size, codebook_size) for _ in range(num_levels))
        self.behaviour = None if behaviour is None else BehaviourInput(behaviour, codebook_size)
        if behaviour is not None:
            self.projection = nn.Linear(hidden_size, behaviour.dim, bias=False)
            self.bias = nn.Parameter(torch.zeros(num_levels, behaviour.dim))
            self.vectors = nn.Parameter(torch.zeros(num_levels, codebook_size, behaviour.dim))

    def project(self, h: Tensor) -> Tensor:
        """Behaviour reading, as in `ResidualHead`: (B, L, H) or (B, L, H + M + 1) -> (B, L, D)."""
        s = self.content(h)
        return s if self.behaviour is None else self.behaviour(s, h[:, 0, self.hidden_size :])

    def content(self, h: Tensor) -> Tensor:
        """Content reading: logits of the first H coordinates of states h (B, L, ...), and their behaviour coordinates. -> (B, L, D)."""
        h = h[..., : self.hidden_size]
        logits = torch.stack([linear(h[:, level]) for level, linear in enumerate(self.levels)], 1)
        return logits if self.behaviour is None else torch.cat([logits, self.projection(h) + self.bias], -1)

    @torch.no_grad()
    def rename(self, permutations: Sequence[np.ndarray]) -> None:
        """Permute the outputs of every level in place."""
        for level, (linear, permutation) in enumerate(zip(self.levels, permutations, strict=True)):
            order = np.argsort(permutation)
            for weight in (linear.weight, linear.bias):
                weight.copy_(weight[order].clone())
            if self.behaviour is not None:
                self.vectors[level] = self.vectors[level][order].clone()

    def level_logits(self, s: Tensor, prefix: Tensor) -> Tensor:
        """Logits of the level after `prefix`; they depend on the length of the prefix only."""
        level = prefix.shape[-1]
        logits = s[:, level, : self.codebook_size]
        if self.behaviour is not None:
            logits = logits + s[:, level, self.codebook_size :] @ self.vectors[level].T
        return logits if prefix.dim() == 2 else logits[:, None].expand(-1, prefix.shape[1], -1)


def make_head(
    kind: str, hidden_size: int, num_levels: int, codebook_size: int, code_dim: int, behaviour: BehaviourSettings | None
) -> CodeHead:
    """Build a head of kind "residual" or "parallel" (`code_dim` applies to "residual" only)."""
    if kind == "parallel":
        return ParallelHead(hidden_size, num_levels, codebook_size, behaviour)
    return ResidualHead(hidden_size, num_levels, codebook_size, code_dim, behaviour)
