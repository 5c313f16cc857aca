"""What everybody else says that an item should be: its projected state, told by its content and behaviour through a robust fit.

A start can be wrong about single items (it learnt somebody else's target), and then so is every figure that its own state enters:
distances, trees, `rebuild`. But most items are right, and what content and behaviour mean can be learned from them: the ridge
regression of the projected states on both, an item's own row left out of its prediction (closed form), rows that the others cannot
explain weighing less and less (iteratively reweighted, as in Huber & Ronchetti, Robust Statistics, 2009, chapter 7). `consensus` of a
candidate is how far its code vectors lie from that prediction, in the units of `rebuild`.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmsid.refine.evidence import Codes, Floats
from mmsid.refine.policy import BATCH, Distances
from mmsid.tokenizer.heads import CodeHead

STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # of the penalty, relative to the mean variance of the evidence
ROUNDS = 4  # of reweighting


class Expected(NamedTuple):
    """`scores` (N, ...) predictions; `trust` (N,) in 0 to 1, the weight of each row in the fit."""

    scores: Tensor
    trust: Tensor


class RobustPrediction:
    """Scores and proposals of candidates against the prediction of the others.

    Args:
        head: the start's; copied and frozen.
        states: (N, L, H) SID states.
        evidence: (N, M) what content and train behaviour say of each item.
    """

    def __init__(self, head: CodeHead, states: Tensor, evidence: NDArray) -> None:
        self.head = copy.deepcopy(head).eval().requires_grad_(False)
        with torch.no_grad():
            own = torch.cat([self.head.project(piece) for piece in states.split(BATCH)])
            self.scores = expected(own, evidence).scores
            greedy = torch.cat([self.head.greedy(piece).codes for piece in self.scores.split(BATCH)]).cpu().numpy()
        self._distances = Distances(self.head, lambda rows: self.scores[rows], greedy)

    def growth(self, rows: NDArray, candidates: Codes) -> Floats:
        """(R,), (R, C, L) -> (R, C): growth of the error against the prediction, over the best path for it, in units of the mean error."""
        return self._distances.growth(rows, candidates)

    @torch.no_grad()
    def after(self, rows: NDArray, prefixes: Codes) -> Codes:
        """(R,), kept prefixes (R, M, l) -> (R, M, 1): the code that the prediction asks for after each."""
        device = self.scores.device
        logits = self.head.level_logits(self.scores[torch.as_tensor(rows, device=device)], torch.as_tensor(prefixes, device=device))
        return logits.argmax(-1, keepdim=True).cpu().numpy()


@torch.no_grad()
def expected(scores: Tensor, evidence: NDArray, rounds: int = ROUNDS) -> Expected:
    """Predict every row from the others: scores (N, ...), evidence (N, M) -> `Expected`.

    The penalty is the one of the least weighted leave-one-out error. A row's weight is 1 / (1 + (e / median e)^2), e its squared error.
    """
    y, x = scores.flatten(1), torch.as_tensor(np.ascontiguousarray(evidence), dtype=torch.float32, device=scores.device)
    trust = torch.ones(len(y), dtype=torch.float64, device=scores.device)
    prediction = y
    for number in range(rounds + 1):
        prediction = _leave_one_out(x, y, trust)
        if number < rounds:
            missed = (prediction - y).square().sum(1).double()
            trust = 1 / (1 + (missed / missed.median().clamp_min(1e-12)).square())
    return Expected(prediction.view_as(scores), trust)


def _leave_one_out(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Weighted ridge regression with a free mean, each row predicted by the fit without it: x (N, M), y (N, D), weight (N,) -> (N, D).

    scikit-learn's RidgeCV does the same, but holds rows x outputs x penalties at once to give the predictions away.
    """
    pieces = [slice(start, start + BATCH) for start in range(0, len(x), BATCH)]
    total = weight.sum()
    mean_x, mean_y = (sum(weight[piece] @ one[piece].double() for piece in pieces) / total for one in (x, y))
    centred = lambda piece: x[piece].double() - mean_x  # noqa: E731
    gram = sum(centred(piece).T @ (weight[piece, None] * centred(piece)) for piece in pieces)
    moment = sum(centred(piece).T @ (weight[piece, None] * (y[piece].double() - mean_y)) for piece in pieces)
    values, vectors = torch.linalg.eigh(gram)
    values, moment = values.clamp_min(0), vectors.T @ moment
    unit = values.mean().clamp_min(1e-12)

    def predict(piece: slice, strength: float) -> Tensor:
        z, shrunk = centred(piece) @ vectors, values + strength * unit
        leverage = (weight[piece] * (1 / total + (z.square() / shrunk).sum(1))).clamp(max=1 - 1e-6)[:, None]
        fitted = mean_y + z @ (moment / shrunk[:, None])
        return (fitted - leverage * y[piece].double()) / (1 - leverage)

    def error(strength: float) -> float:
        return sum(float((weight[piece, None] * (predict(piece, strength) - y[piece]).square()).sum()) for piece in pieces)

    best = min(STRENGTHS, key=error)
    return torch.cat([predict(piece, best).to(y.dtype) for piece in pieces])
