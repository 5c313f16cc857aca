"""Heads of the item tokenizer: the quantizer policy pi(c_1..c_L | item).

Two heads share the same doors. Symbols: B items, M paths per item, L levels, K codes per level, H hidden size of the
backbone, D size of what `project` returns (the code space for the residual head, K for the parallel head).

`ResidualHead` (ours): every SID state is projected into one code space, s_l = W h_l + b_l; level l scores its codes against the
residual r_l = s_l - (sum of the code vectors chosen before it), pi(c_l | x, c_<l) = softmax(-|r_l - e_l|^2 / t_l).
`ParallelHead` (UniSID, arXiv 2602.10445 section 2.2): one linear layer per SID token gives K logits; levels are
independent of each other given the item.

Ties always go to the lowest index. Nothing here samples; whoever samples does it from these log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsid.tokenizer.behaviour_regression import BehaviourRegression


class Greedy(NamedTuple):
    """Argmax codes, level by level: `codes` (B, L) int64; `margin` (B,) the smallest gap over the levels between the best and
    the second-best logit (nats; inf when K = 1); `relative` (B,) the smallest such gap divided by the size of the numbers that
    were subtracted to get it: what rounding error has to be compared with."""

    codes: Tensor
    margin: Tensor
    relative: Tensor


class Paths(NamedTuple):
    """An enumerated tree of code paths: `codes` (B, M, L) int64; `log_prob` (B, M), normalised over the M paths, so that
    `log_prob.exp().sum(1) == 1`. Path order: the item's best code first at every level, last level fastest."""

    codes: Tensor
    log_prob: Tensor


class CodeHead(nn.Module):
    """What both heads share; `project` and `level_logits` are theirs."""

    num_levels: int
    codebook_size: int

    def project(self, h: Tensor) -> Tensor:
        """SID states (B, L, H) -> what the levels are scored with (B, L, D)."""
        raise TypeError(f"{type(self).__name__} does not say how it projects")

    def level_logits(self, s: Tensor, prefix: Tensor) -> Tensor:
        """Logits of the level after `prefix`: s (B, L, D), prefix (B, l) -> (B, K); prefix (B, M, l) -> (B, M, K)."""
        raise TypeError(f"{type(self).__name__} does not say how it scores")

    def scale(self, s: Tensor, prefix: Tensor, logits: Tensor) -> Tensor:
        """Magnitude (B,) of the terms that were subtracted to form `logits`; the yardstick of rounding error."""
        return logits.abs().amax(-1)

    def rename(self, permutations: Sequence[np.ndarray]) -> None:
        """Give the codes of every level other numbers, in place: what was code c of level l becomes `permutations[l][c]`."""
        raise TypeError(f"{type(self).__name__} does not say where its codes are")

    def log_prob(self, s: Tensor, codes: Tensor) -> Tensor:
        """log pi(c_l | x, c_<l) for every level: codes (B, L) -> (B, L), or codes (B, M, L) -> (B, M, L). Full softmax over K."""
        levels = [
            self.level_logits(s, codes[..., :level]).log_softmax(-1).gather(-1, codes[..., level : level + 1])
            for level in range(codes.shape[-1])
        ]
        return torch.cat(levels, -1)

    def teacher_logits(self, s: Tensor, codes: Tensor) -> Tensor:
        """Logits of every level when the prefix is given by `codes` (B, L): (B, L, K)."""
        return torch.stack([self.level_logits(s, codes[:, :level]) for level in range(self.num_levels)], 1)

    def greedy(self, s: Tensor) -> Greedy:
        """Level-by-level argmax of pi: the raw codes."""
        batch = s.shape[0]
        codes = torch.zeros(batch, 0, dtype=torch.int64, device=s.device)
        margin = torch.full((batch,), math.inf, dtype=s.dtype, device=s.device)
        relative = margin.clone()
        for _ in range(self.num_levels):
            logits = self.level_logits(s, codes)
            chosen = logits.argmax(-1)  # documented to return the first maximum; max is not
            if self.codebook_size > 1:
                rest = logits.scatter(-1, chosen[:, None], -math.inf).amax(-1)
                gap = logits.amax(-1) - rest
                margin = torch.minimum(margin, gap)
                relative = torch.minimum(relative, gap / self.scale(s, codes, logits).clamp_min(1e-12))
            codes = torch.cat([codes, chosen[:, None]], 1)
        return Greedy(codes, margin, relative)

    def top_paths(self, s: Tensor, m: int, propose: Callable[[Tensor], Tensor] | None = None) -> Paths:
        """The tree of the m best codes of every level, given each kept prefix: m**L paths (m is capped at K).

        `propose`: kept prefixes (B, M, l) -> codes (B, M, n), n < m, that are kept after them whatever their score (-1: none), in the
        place of the least likely.

        Returns `Paths` with log-probabilities renormalised over the tree. To score the same paths under another policy:
        `other.log_prob(s_other, paths.codes).sum(-1).log_softmax(-1)`.
        """
        m = min(m, self.codebook_size)
        batch = s.shape[0]
        codes = torch.zeros(batch, 1, 0, dtype=torch.int64, device=s.device)
        joint = torch.zeros(batch, 1, dtype=s.dtype, device=s.device)
        for _ in range(self.num_levels):
            scores = self.level_logits(s, codes).log_softmax(-1)
            # a stable sort keeps the lowest index first among equals; topk promises no order
            order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :m]
            if propose is not None:
                order = _with_wanted(scores.flatten(0, 1), order.flatten(0, 1), propose(codes).flatten(0, 1)).view_as(order)
            joint = (joint[..., None] + scores.gather(-1, order)).flatten(1)
            codes = torch.cat([codes[:, :, None].expand(-1, -1, m, -1), order[..., None]], -1).flatten(1, 2)
        return Paths(codes, joint.log_softmax(-1))


def _with_wanted(scores: Tensor, kept: Tensor, wanted: Tensor) -> Tensor:
    """(B, K) scores, (B, m) kept codes, best first, (B, n) wanted ones -> (B, m): the wanted ones and the best others, best first."""
    rank = torch.full_like(scores, -math.inf).scatter(1, kept, scores.gather(1, kept))
    spare = torch.cat([torch.zeros_like(scores), torch.zeros_like(scores[:, :1])], 1)  # its last column takes the -1
    rank = rank.masked_fill(spare.scatter(1, wanted % spare.shape[1], 1.0)[:, :-1] > 0, math.inf)
    chosen = rank.sort(dim=1, descending=True, stable=True).indices[:, : kept.shape[1]]
    return chosen.gather(1, scores.gather(1, chosen).sort(dim=1, descending=True, stable=True).indices)


class ResidualHead(CodeHead):
    """Residual codes in one space of size `code_dim`: a projection W shared by all levels, a bias and a temperature per level.

    `behaviour` (rows; 0: none) adds to every projected state what behaviour says beyond it (`mmsid.tokenizer.behaviour_regression`).
    """

    kind = "residual"

    def __init__(self, hidden_size: int, num_levels: int = 3, codebook_size: int = 256, code_dim: int = 448, behaviour: int = 0) -> None:
        super().__init__()
        self.num_levels, self.codebook_size, self.code_dim = num_levels, codebook_size, code_dim
        self.projection = nn.Linear(hidden_size, code_dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_levels, code_dim))  # per level: every SID token adds a constant of its own to its state
        self.vectors = nn.Parameter(torch.randn(num_levels, codebook_size, code_dim) / math.sqrt(code_dim))
        self.log_temperature = nn.Parameter(torch.zeros(num_levels))
        self.behaviour = BehaviourRegression(behaviour, code_dim) if behaviour else None

    def project(self, h: Tensor) -> Tensor:
        """s_l = W h_l + b_l, and what the behaviour adds: (B, L, H) -> (B, L, code_dim)."""
        s = self.projection(h) + self.bias
        return s if self.behaviour is None else s + self.behaviour(s)

    @torch.no_grad()
    def rename(self, permutations: Sequence[np.ndarray]) -> None:
        """Reorder the code vectors."""
        for level, names in enumerate(permutations):
            self.vectors[level] = self.vectors[level][np.argsort(names)].clone()

    def prefix_vectors(self, codes: Tensor) -> Tensor:
        """Cumulative sums of the chosen code vectors: codes (..., l) -> (..., l, code_dim); entry j is the rebuild from j+1 levels."""
        # embedding, not indexing: with several threads that adds gradients up in any order, and no run is like another
        chosen = [F.embedding(codes[..., level], self.vectors[level]) for level in range(codes.shape[-1])]
        return torch.stack(chosen, -2).cumsum(-2)

    def residual(self, s: Tensor, prefix: Tensor) -> Tensor:
        """r_l = s_l - sum of the vectors of `prefix` (B, l) or (B, M, l): (B, code_dim) or (B, M, code_dim)."""
        level = prefix.shape[-1]
        r = s[:, level] if prefix.dim() == 2 else s[:, level, None].expand(-1, prefix.shape[1], -1)
        for before in range(level):
            r = r - F.embedding(prefix[..., before], self.vectors[before])
        return r

    def level_logits(self, s: Tensor, prefix: Tensor) -> Tensor:
        """-|r_l - e|^2 / t_l for every code e of the level after `prefix`."""
        r, table = self.residual(s, prefix), self.vectors[prefix.shape[-1]]
        squared = r.square().sum(-1, keepdim=True) + table.square().sum(-1) - 2 * r @ table.T
        return -squared / self.log_temperature[prefix.shape[-1]].exp()

    def scale(self, s: Tensor, prefix: Tensor, logits: Tensor) -> Tensor:
        """(|r|^2 + the largest |e|^2) / t of the level: the logits are small differences of such numbers."""
        level = prefix.shape[-1]
        size = self.residual(s, prefix).square().sum(-1) + self.vectors[level].square().sum(-1).amax()
        return size / self.log_temperature[level].exp()

    def soft_prefix_vectors(self, s: Tensor, codes: Tensor) -> Tensor:
        """As `prefix_vectors`, but the last vector of every prefix is its expectation under pi: (B, L, code_dim).

        p_l = sum_{j<l} e_{c_j} + E_{c ~ pi(.|x, c_<l)} e_c. The expectation is what carries gradient from a loss on the
        quantised prefix to the policy; the chosen codes before it are held fixed.
        """
        hard = self.prefix_vectors(codes)
        out = []
        for level in range(self.num_levels):
            expected = self.level_logits(s, codes[:, :level]).softmax(-1) @ self.vectors[level]
            out.append(expected if level == 0 else hard[:, level - 1] + expected)
        return torch.stack(out, 1)


class ParallelHead(CodeHead):
    """UniSID's head: K logits per SID token from its own linear layer, no residual, no code vectors; D = K."""

    kind = "parallel"

    def __init__(self, hidden_size: int, num_levels: int = 3, codebook_size: int = 256) -> None:
        super().__init__()
        self.num_levels, self.codebook_size = num_levels, codebook_size
        self.levels = nn.ModuleList(nn.Linear(hidden_size, codebook_size) for _ in range(num_levels))

    def project(self, h: Tensor) -> Tensor:
        """Logits of all levels: (B, L, H) -> (B, L, K)."""
        return torch.stack([linear(h[:, level]) for level, linear in enumerate(self.levels)], 1)

    @torch.no_grad()
    def rename(self, permutations: Sequence[np.ndarray]) -> None:
        """Reorder the outputs."""
        for linear, names in zip(self.levels, permutations, strict=True):
            for weight in (linear.weight, linear.bias):
                weight.copy_(weight[np.argsort(names)].clone())

    def level_logits(self, s: Tensor, prefix: Tensor) -> Tensor:
        """The level's logits; the codes in `prefix` only say which level it is."""
        logits = s[:, prefix.shape[-1]]
        return logits if prefix.dim() == 2 else logits[:, None].expand(-1, prefix.shape[1], -1)


def make_head(kind: str, hidden_size: int, num_levels: int, codebook_size: int, code_dim: int, behaviour: int) -> CodeHead:
    """The head named by a config: "residual" or "parallel" (`code_dim` and `behaviour` are only read by the former)."""
    if kind == "parallel":
        return ParallelHead(hidden_size, num_levels, codebook_size)
    return ResidualHead(hidden_size, num_levels, codebook_size, code_dim, behaviour)
