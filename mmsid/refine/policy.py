"""The quantizer policy as a one-step bandit over an enumerated tree of paths, and its frozen reference.

The tree of an item holds its m most likely codes per level given each kept prefix, fixed under the reference (m^L paths: 512 for m = 8,
L = 3). Policy and reference are both normalised over these paths, so that KL, entropy and expected reward are exact.
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
BATCH = 512  # items per piece in loops over the whole catalogue; bounds memory use, changes no result


@dataclass(frozen=True)
class PathTree:
    """Enumerated paths of all items.

    Attributes:
        codes: (N, P, L) int64, depth first, the reference's greedy path first.
        log_prob: (N, P) log-probabilities of the reference, normalised over P.
        branching: children per level; P is their product.
    """

    codes: Tensor
    log_prob: Tensor
    branching: tuple[int, ...]


def _pieces(items: int) -> list[NDArray]:
    return np.split(np.arange(items), range(BATCH, items, BATCH))


def path_log_prob(head: CodeHead, h: Tensor, paths: Tensor, branching: tuple[int, ...], temperature: float = 1.0) -> Tensor:
    """Joint log-probability of each path, renormalised over the tree: h (B, L, H), paths (B, P, L) -> (B, P).

    Equals `head.log_prob(s, paths).sum(-1).log_softmax(-1)`, but scores each distinct prefix once (m^l at level l instead of P), and
    computes residual heads from inner products of code vectors without building (B, m^l, D) residuals. `temperature` flattens (> 1) the
    joint distribution; two policies are comparable at the same temperature only.
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
        inner = inner - F.embedding(prefixes[..., before], head.vectors[before] @ table.T)  # deterministic backward, see heads.py
    return (2 * inner - table.square().sum(-1)) / head.log_temperature[level].exp()


def exploring_temperature(log_prob: Tensor, entropy: float) -> float:
    """Smallest temperature >= 1 at which log-probabilities (N, P) have a mean entropy of `entropy` nats (at most 0.9 log P).

    A well-trained tokenizer is nearly deterministic. Without a temperature, all sampled paths of an item would be its argmax and no
    advantage would differ from 0. The argmax does not depend on the temperature.
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
    """Growth of the reconstruction error of candidate codes over the error of each item's best path.

    Args:
        head: frozen head whose code vectors reconstruct the items.
        scores: item rows (B,) -> projected states to reconstruct (B, L, D).
        best: (N, L) best paths for these states.
    """

    def __init__(self, head: CodeHead, scores: Callable[[Tensor], Tensor], best: Codes) -> None:
        self.head, self.scores = head, scores
        self.device = next(head.parameters()).device
        self.best = self._errors(np.arange(len(best)), best[:, None])[:, 0]
        self.unit = float(self.best.mean()) if isinstance(head, ResidualHead) else math.log(head.codebook_size)

    def growth(self, rows: NDArray, candidates: Codes) -> Floats:
        """Rows (R,), candidates (R, C, L) -> (R, C), in units of the mean error of the best paths.

        A parallel head has no code vectors; its growth is the loss of log-probability in units of log K.
        """
        return (self._errors(rows, candidates) - self.best[rows][:, None]) / max(self.unit, 1e-12)

    @torch.no_grad()
    def _errors(self, rows: NDArray, candidates: Codes) -> Floats:
        pieces = []
        for start in range(0, len(rows), BATCH):
            s = self.scores(torch.as_tensor(rows[start : start + BATCH], device=self.device))
            codes = torch.as_tensor(candidates[start : start + BATCH], device=self.device)
            if isinstance(self.head, ResidualHead):
                value = (s[:, None, -1] - self.head.reconstruction(codes)).square().sum(-1)
            else:
                value = -self.head.log_prob(s, codes).sum(-1)
            pieces.append(value.double().cpu().numpy())
        return np.concatenate(pieces) if pieces else np.zeros(candidates.shape[:2])


class Reference:
    """The frozen reference policy: a copy of the tokenizer's head, the items' states, their path trees and reconstruction errors.

    Args:
        head: the tokenizer's head; copied and frozen.
        states: (N, L, H) SID states of all items, fp32.
        top_m: codes kept per level.
        freeze_first_level: keep only the paths under the item's best first code.
        temperature: see `path_log_prob`; None takes `exploring_temperature` for a mean of `entropy` nats.
        propose: from the greedy codes of all items (N, L), a function that proposes further codes for an item's tree at every level:
            item rows (R,) and their kept prefixes (R, M, l) -> (R, M, n), -1 for none. They replace the least likely of the m codes.
            The right code of an item with a wrong start is seldom among the m most likely.
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
        def proposals(kept: Tensor) -> Tensor:
            level = kept.shape[-1]
            if propose is None or (freeze_first_level and level == 0):
                return kept.new_zeros(*kept.shape[:2], 0)
            return torch.as_tensor(propose(rows, kept.cpu().numpy()), device=kept.device)

        codes, log_prob = self.head.top_paths(self.head.project(self.states[rows]), top_m, proposals)
        if freeze_first_level:
            kept = codes.shape[1] // min(top_m, self.head.codebook_size)
            codes, log_prob = codes[:, :kept], log_prob[:, :kept]
        return codes, log_prob.log_softmax(-1)

    def error_growth(self, rows: NDArray, candidates: Codes) -> Floats:
        """`Distances.growth` of candidates (R, C, L) of `rows` (R,) -> (R, C), with the frozen states and vectors.

        The policy cannot lower it by moving its own states or vectors.
        """
        return self._distances.growth(rows, candidates)

    def level_log_prob(self, rows: NDArray, candidates: Codes) -> NDArray[np.float32]:
        """Rows (R,), candidates (R, C, L) -> (R, C, L) log pi_ref(c_l | c_<l), softmax over all K codes."""
        pieces = []
        with torch.no_grad():
            for start in range(0, len(rows), BATCH):
                s = self.head.project(self.states[torch.as_tensor(rows[start : start + BATCH], device=self.states.device)])
                codes = torch.as_tensor(candidates[start : start + BATCH], device=self.states.device)
                pieces.append(self.head.log_prob(s, codes).float().cpu().numpy())
        return np.concatenate(pieces) if pieces else np.zeros(candidates.shape, dtype=np.float32)


class HeadPolicy:
    """Policy made of the tokenizer's own weights, which all items share (amortised), so that new items profit too.

    Args:
        head: trained in place.
        states: item rows (B,) -> SID states (B, L, H): cached, or computed by the backbone with gradient.
        parameters: weights that the optimiser moves.
        reference: its trees and temperature are used for scoring.
    """

    def __init__(
        self,
        head: CodeHead,
        states: Callable[[Tensor], Tensor],
        parameters: Sequence[Tensor],
        reference: Reference,
    ) -> None:
        self.head, self.states, self.parameters, self.reference = head, states, list(parameters), reference

    def log_prob(self, rows: Tensor) -> Tensor:
        """(B,) item rows -> (B, P) log-probabilities over each item's tree, with gradient."""
        tree = self.reference.tree
        return path_log_prob(self.head, self.states(rows), tree.codes[rows], tree.branching, self.reference.temperature)

    @torch.no_grad()
    def greedy(self) -> Codes:
        """Argmax codes of all items, (N, L); they may be outside the tree."""
        rows = torch.arange(len(self.reference.greedy), device=self.reference.states.device)
        pieces = [self.head.greedy(self.head.project(self.states(piece))).codes for piece in rows.split(BATCH)]
        return torch.cat(pieces).cpu().numpy()
