"""The quantizer policy seen as a bandit over an enumerated tree of paths, and the frozen reference it is compared with.

The tree of every item is fixed once under the reference: its m best codes per level, given each kept prefix (m^L paths, 512 for m = 8 and
L = 3). Both the policy and the reference are renormalised over exactly these paths, in sampling and in scoring, so that KL, entropy and
the expected gradient are exact. What the policy does outside the tree is not seen here; the loop logs how many greedy codes leave it.

Symbols: N items, P paths, L levels, K codes, H hidden size, D code space.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mmsid.refine import ppo
from mmsid.refine.evidence import Codes, Floats
from mmsid.tokenizer.heads import CodeHead, ResidualHead

Propose = Callable[[NDArray, Codes], Codes]
BATCH = 512  # items per piece where the whole catalogue is walked: bounds memory, changes no figure


@dataclass(frozen=True)
class PathTree:
    """`codes` (N, P, L) int64, depth first, the reference's best path first; `log_prob` (N, P) of the reference; P = prod(branching)."""

    codes: Tensor
    log_prob: Tensor
    branching: tuple[int, ...]


def _pieces(items: int) -> list[NDArray]:
    return np.split(np.arange(items), range(BATCH, items, BATCH))


def path_log_prob(head: CodeHead, h: Tensor, paths: Tensor, branching: tuple[int, ...], temperature: float = 1.0) -> Tensor:
    """Joint log-probability of each path, renormalised over the tree: h (B, L, H), paths (B, P, L) -> (B, P).

    Each distinct prefix is scored once (m^l of them at level l, not P). For residual heads the scores come from inner products between
    code vectors, so no (B, m^l, D) residual is ever built; equal to `head.log_prob(s, paths).sum(-1).log_softmax(-1)`.
    `temperature` flattens (> 1) the joint distribution; whoever compares two policies passes the same one.
    """
    s = head.project(h)
    batch, left = paths.shape[0], paths.shape[1]
    joint = torch.zeros(batch, 1, dtype=s.dtype, device=s.device)
    for level, children in enumerate(branching):
        prefixes = paths[:, ::left, :level]
        left //= children
        chosen = paths[:, ::left, level].reshape(batch, -1, children)
        logits = _level_logits(head, s, prefixes)
        scores = logits.gather(-1, chosen) - logits.logsumexp(-1, keepdim=True)
        joint = (joint[..., None] + scores).flatten(1)
    return (joint / temperature).log_softmax(-1)


def _level_logits(head: CodeHead, s: Tensor, prefixes: Tensor) -> Tensor:
    """(B, M, K) logits up to a constant per row: softmax does not see |r|^2, so -|r - e|^2 / t becomes (2 r.e - |e|^2) / t."""
    if not isinstance(head, ResidualHead):
        return head.level_logits(s, prefixes)
    level = prefixes.shape[-1]
    table = head.vectors[level]
    inner = (s[:, level] @ table.T)[:, None]
    for before in range(level):
        inner = inner - F.embedding(prefixes[..., before], head.vectors[before] @ table.T)  # not indexing, as in heads.py
    return (2 * inner - table.square().sum(-1)) / head.log_temperature[level].exp()


def exploring_temperature(log_prob: Tensor, entropy: float) -> float:
    """Least temperature >= 1 at which the mean entropy over the trees, (N, P) log-probabilities, is `entropy` nats (if P allows).

    A well-trained tokenizer is nearly deterministic: nothing but its argmax would ever be drawn, all rewards of a group would be
    equal, and refinement would stand still. Argmax codes do not depend on the temperature.
    """
    goal = min(entropy, 0.9 * math.log(log_prob.shape[1]))

    def mean_entropy(temperature: float) -> float:
        return float(torch.cat([ppo.entropy((piece / temperature).log_softmax(-1)) for piece in log_prob.split(BATCH)]).mean())

    low, high = 0.0, 1.0  # of the logarithm
    if mean_entropy(1.0) >= goal:
        return 1.0
    while mean_entropy(math.exp(high)) < goal and high < 30:
        low, high = high, 2 * high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_entropy(math.exp(middle)) < goal else (low, middle)
    return math.exp(high)


class Distances:
    """How much worse a candidate rebuilds an item than the item's own best path does.

    Args:
        head: whose code vectors rebuild; frozen.
        scores: item rows (B,) -> what they are rebuilt as (B, L, D).
        best: (N, L) best paths for these scores.
    """

    def __init__(self, head: CodeHead, scores: Callable[[Tensor], Tensor], best: Codes) -> None:
        self.head, self.scores = head, scores
        self.device = next(head.parameters()).device
        self.best = self._errors(np.arange(len(best)), best[:, None])[:, 0]
        self.unit = float(self.best.mean()) if isinstance(head, ResidualHead) else math.log(head.codebook_size)

    def growth(self, rows: NDArray, candidates: Codes) -> Floats:
        """(R,), (R, C, L) -> (R, C), in units of the mean error. A parallel head has no code vectors; there it is the loss of
        log-probability in units of log K."""
        return (self._errors(rows, candidates) - self.best[rows][:, None]) / max(self.unit, 1e-12)

    @torch.no_grad()
    def _errors(self, rows: NDArray, candidates: Codes) -> Floats:
        pieces = []
        for start in range(0, len(rows), BATCH):
            s = self.scores(torch.as_tensor(rows[start : start + BATCH], device=self.device))
            codes = torch.as_tensor(candidates[start : start + BATCH], device=self.device)
            if isinstance(self.head, ResidualHead):
                value = (s[:, None, -1] - self.head.prefix_vectors(codes)[..., -1, :]).square().sum(-1)
            else:
                value = -self.head.log_prob(s, codes).sum(-1)
            pieces.append(value.double().cpu().numpy())
        return np.concatenate(pieces) if pieces else np.zeros(candidates.shape[:2])


class Reference:
    """The frozen start: a copy of the head, the items' states under it, their path trees and their distances.

    Args:
        head: the tokenizer's head; copied and frozen.
        states: (N, L, H) SID states of all items, fp32.
        top_m: codes kept per level.
        freeze_first_level: keep only the paths under the item's best first code.
        temperature: see `path_log_prob`; None takes `exploring_temperature` for a mean of `entropy` nats.
        propose: given the greedy codes of all items (N, L), says which codes an item's tree holds besides, at every level:
            item rows (R,) and their kept prefixes (R, M, l) -> (R, M, n), -1 for none. Where the start is wrong about an item, its
            right code is seldom among the m likeliest.
    """

    def __init__(
        self,
        head: CodeHead,
        states: Tensor,
        top_m: int,
        freeze_first_level: bool = False,
        temperature: float | None = 1.0,
        entropy: float = 2.0,
        propose: Callable[[Codes], Propose] | None = None,
    ) -> None:
        self.head = copy.deepcopy(head).eval().requires_grad_(False)
        self.states = states
        with torch.no_grad():
            self.greedy = torch.cat([self.head.greedy(self.head.project(piece)).codes for piece in states.split(BATCH)]).cpu().numpy()
            proposed = None if propose is None else propose(self.greedy)
            parts = [self._enumerate(rows, top_m, freeze_first_level, proposed) for rows in _pieces(len(states))]
            m = min(top_m, head.codebook_size)
            branching = (1 if freeze_first_level else m, *[m] * (head.num_levels - 1))
            log_prob = torch.cat([log_prob for _, log_prob in parts])
            self.temperature = exploring_temperature(log_prob, entropy) if temperature is None else temperature
            codes = torch.cat([codes for codes, _ in parts])
            self.tree = PathTree(codes, (log_prob / self.temperature).log_softmax(-1), branching)
        self._distances = Distances(self.head, lambda rows: self.head.project(states[rows]), self.greedy)

    def _enumerate(self, rows: NDArray, top_m: int, freeze_first_level: bool, propose: Propose | None) -> tuple[Tensor, Tensor]:
        def wanted(kept: Tensor) -> Tensor:
            level = kept.shape[-1]
            if propose is None or (freeze_first_level and level == 0):
                return kept.new_zeros(*kept.shape[:2], 0)
            return torch.as_tensor(propose(rows, kept.cpu().numpy()), device=kept.device)

        codes, log_prob = self.head.top_paths(self.head.project(self.states[rows]), top_m, wanted)
        if freeze_first_level:
            kept = codes.shape[1] // min(top_m, self.head.codebook_size)
            codes, log_prob = codes[:, :kept], log_prob[:, :kept]
        return codes, log_prob.log_softmax(-1)

    def error_growth(self, rows: NDArray, candidates: Codes) -> Floats:
        """(R,), (R, C, L) -> (R, C): growth of the quantisation error over the item's own best path, in units of the mean error.

        Always measured with the frozen states and vectors: the policy cannot shrink it by moving them. A parallel head has no code
        vectors; there it is the loss of log-probability in units of log K.
        """
        return self._distances.growth(rows, candidates)

    def level_log_prob(self, rows: NDArray, candidates: Codes) -> NDArray[np.float32]:
        """(R,), (R, C, L) -> (R, C, L) log pi_ref(c_l | c_<l), full softmax."""
        pieces = []
        with torch.no_grad():
            for start in range(0, len(rows), BATCH):
                s = self.head.project(self.states[torch.as_tensor(rows[start : start + BATCH], device=self.states.device)])
                codes = torch.as_tensor(candidates[start : start + BATCH], device=self.states.device)
                pieces.append(self.head.log_prob(s, codes).float().cpu().numpy())
        return np.concatenate(pieces) if pieces else np.zeros(candidates.shape, dtype=np.float32)


class HeadPolicy:
    """The policy that is refined: the tokenizer's own weights, shared by all items (amortised), so that new items profit too.

    Args:
        head: trained in place.
        states: item rows (B,) -> their SID states (B, L, H): cached, or read by the live backbone, then with gradient.
        parameters: weights that the optimiser moves.
        reference: whose trees and temperature the policy is scored with.
        noisy: as `states`, of the items read with noise, once per turn; empty: nobody asks.
        rates: learning rate of each weight over that of the loop; empty: 1.
    """

    def __init__(
        self,
        head: CodeHead,
        states: Callable[[Tensor], Tensor],
        parameters: Sequence[Tensor],
        reference: Reference,
        noisy: Sequence[Callable[[Tensor], Tensor]] = (),
        rates: Sequence[float] = (),
    ) -> None:
        self.head, self.states, self.parameters, self.reference, self.noisy = head, states, list(parameters), reference, noisy
        self.rates = list(rates) or [1.0] * len(self.parameters)

    def log_prob(self, rows: Tensor) -> Tensor:
        """(B,) item rows -> (B, P) log-probabilities over each item's tree, with gradient."""
        return self._log_prob(self.states, rows)

    def noisy_log_prob(self, rows: Tensor, turn: int) -> Tensor:
        """`log_prob` of the items read with the noise of a turn, from the first again after the last. Raises ValueError where no noisy
        reading was handed in."""
        if not self.noisy:
            raise ValueError("the policy was given no noisy reading of the items; hand one in, or set refine.loop.noisy to 0")
        return self._log_prob(self.noisy[turn % len(self.noisy)], rows)

    def _log_prob(self, states: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        tree = self.reference.tree
        return path_log_prob(self.head, states(rows), tree.codes[rows], tree.branching, self.reference.temperature)

    @torch.no_grad()
    def greedy(self) -> Codes:
        """Argmax codes of all items, (N, L); they may leave the tree."""
        rows = torch.arange(len(self.reference.greedy), device=self.reference.states.device)
        pieces = [self.head.greedy(self.head.project(self.states(piece))).codes for piece in rows.split(BATCH)]
        return torch.cat(pieces).cpu().numpy()
