"""The quantizer policy as a one-step bandit over an enumerated tree of paths, and its frozen reference.

The tree of an item holds its m most likely codes per level given each kept prefix (m^L paths: 512 for m = 8, L = 3). A round of refinement
enumerates the trees of its items under the current policy and drops them at its end, so that nothing of size N x m^L is held and paths that
became likely can be sampled. Policy and reference are both normalised over these paths, so that KL, entropy and expected reward are exact.
Symbols: N items, R items of a round, P paths, L levels, K codes, H hidden size, D code space.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmsid.refine import ppo
from mmsid.refine.evidence import Codes, Floats
from mmsid.refine.item_states import ItemStates
from mmsid.tokenizer.heads import CodeHead, ResidualHead

Propose = Callable[[NDArray, Codes], Codes]
BATCH = 512  # items per piece in loops over the whole catalogue; bounds memory use, changes no result
TEMPERATURE_ITEMS = 4096  # items whose trees choose the exploring temperature
ROUNDING = 2e-2  # nats; float32 states on a GPU differ by thousandths, dropout or a wrong mask by far more
ROUNDING_16_BIT = 0.5  # nats, for a backbone in bf16 or fp16


@dataclass(frozen=True)
class PathTree:
    """Enumerated paths of R items.

    Attributes:
        codes: (R, P, L), depth first, the greedy path of the enumerating policy first. Stored in 16 bits where K allows it.
        log_prob: (R, P) log-probabilities of the reference, normalised over P.
        branching: children per level; P is their product.
    """

    codes: Tensor
    log_prob: Tensor
    branching: tuple[int, ...]

    def take(self, places: Tensor) -> PathTree:
        """The tree of some of the items, (B,) places among the R; its codes are int64."""
        return PathTree(self.codes[places].long(), self.log_prob[places], self.branching)

    def paths(self, picks: Tensor) -> Codes:
        """Codes of the chosen paths: indices (R, G) -> (R, G, L), on the CPU."""
        return self.codes.cpu().gather(1, picks[..., None].expand(-1, -1, self.codes.shape[-1])).numpy().astype(np.int64)


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
        logits = head.tree_logits(s, prefixes, branching[:level])
        scores = logits.gather(-1, chosen) - logits.logsumexp(-1, keepdim=True)
        joint = (joint[..., None] + scores).flatten(1)
    return (joint / temperature).log_softmax(-1)


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
    """The frozen reference policy: a copy of the tokenizer's head, the items' states, and their reconstruction errors.

    Args:
        head: the tokenizer's head; copied and frozen.
        states: SID states of all items, fp32, as a tensor (N, L, H) or as `ItemStates`.
        top_m: codes kept per level.
        temperature: see `path_log_prob`; None takes `exploring_temperature` for a mean of `entropy` nats.
        propose: from the codes of all items (N, L), a function that proposes further codes for an item's tree at every level: item rows
            (R,) and their kept prefixes (R, M, l) -> (R, M, n), -1 for none. They replace the least likely of the m codes. The right code
            of an item with a wrong start is seldom among the m most likely.
    """

    def __init__(
        self,
        head: CodeHead,
        states: Tensor | ItemStates,
        top_m: int,
        temperature: float | None = 1.0,
        entropy: float = 2.0,
        propose: Callable[[Codes], Propose] | None = None,
    ) -> None:
        self.head = copy.deepcopy(head).eval().requires_grad_(False)
        self.states, self.top_m, self.propose = states, top_m, propose
        with torch.no_grad():
            self.greedy = torch.cat([self.head.greedy(self.head.project(piece)).codes for piece in states.split(BATCH)]).cpu().numpy()
        self.temperature = 1.0
        if temperature is None:  # on items evenly spread over a coordinate of the states, so that the order of the rows does not decide
            ranks = torch.linspace(0, len(states) - 1, min(len(states), TEMPERATURE_ITEMS), device=states.device).round().long()
            sample = torch.cat([piece[:, 0, 0] for piece in states.split(BATCH)]).argsort()[ranks]
            temperature = exploring_temperature(self.tree(sample, self.proposals(self.greedy)).log_prob, entropy)
        self.temperature = temperature
        self._distances = Distances(self.head, lambda rows: self.head.project(states[rows]), self.greedy)

    def proposals(self, table: Codes) -> Propose | None:
        """Function that proposes codes for the trees, given the current codes of all items (N, L); None for no proposals."""
        return None if self.propose is None else self.propose(table)

    @torch.no_grad()
    def tree(
        self, rows: Tensor, propose: Propose | None, head: CodeHead | None = None, states: Callable[[Tensor], Tensor] | None = None
    ) -> PathTree:
        """Trees of `rows` (R,), enumerated under a policy and scored by the reference.

        Args:
            propose: from `proposals`.
            head, states: of the enumerating policy; by default those of the reference.
        """
        own, head = head is None, head or self.head
        kind = torch.int16 if head.codebook_size <= 2**15 else torch.int64
        branching = (min(self.top_m, head.codebook_size),) * head.num_levels
        found, scores = [], []
        for piece in rows.split(BATCH):
            proposals = None if propose is None else partial(_proposed, propose, piece.cpu().numpy())
            codes = head.top_paths(head.project(self.states[piece] if own else states(piece)), self.top_m, proposals).codes
            found.append(codes.to(kind))
            scores.append(path_log_prob(self.head, self.states[piece], codes, branching, self.temperature))
        return PathTree(torch.cat(found), torch.cat(scores), branching)

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


def _proposed(propose: Propose, rows: NDArray, kept: Tensor) -> Tensor:
    return torch.as_tensor(propose(rows, kept.cpu().numpy()), device=kept.device)


class HeadPolicy:
    """Policy made of the tokenizer's own weights, which all items share (amortised), so that new items profit too.

    Args:
        head: trained in place.
        states: item rows (B,) -> SID states (B, L, ...): cached, or computed by the backbone with gradient.
        parameters: weights that the optimiser moves.
        reference: its temperature is used for scoring.
        rounding: nats by which log-probabilities may differ between two passes over the same items in other batches.
    """

    def __init__(
        self,
        head: CodeHead,
        states: Callable[[Tensor], Tensor],
        parameters: Sequence[Tensor],
        reference: Reference,
        rounding: float = ROUNDING,
    ) -> None:
        self.rounding = rounding
        self.head, self.states, self.parameters, self.reference = head, states, list(parameters), reference

    def tree(self, rows: Tensor, table: Codes) -> PathTree:
        """Trees of item rows (R,) under the current weights; `table` (N, L) are the current codes of all items."""
        return self.reference.tree(rows, self.reference.proposals(table), self.head, self.states)

    def log_prob(self, rows: Tensor, tree: PathTree) -> Tensor:
        """(B,) item rows and their trees -> (B, P) log-probabilities, with gradient."""
        return path_log_prob(self.head, self.states(rows), tree.codes, tree.branching, self.reference.temperature)

    @torch.no_grad()
    def greedy(self) -> Codes:
        """Argmax codes of all items, (N, L)."""
        rows = torch.arange(len(self.reference.greedy), device=self.reference.states.device)
        pieces = [self.head.greedy(self.head.project(self.states(piece))).codes for piece in rows.split(BATCH)]
        return torch.cat(pieces).cpu().numpy()
