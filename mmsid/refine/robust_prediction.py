"""Robust leave-one-out regression of SID-head states on content and behaviour features. It predicts every item's state from all others.

A tokenizer may have learnt wrong targets for single items, which damages every figure computed from their own states. The regression is a
ridge in closed form that leaves an item's own row out, with iterative reweighting of badly explained rows (Huber & Ronchetti, Robust
Statistics, 2009, chapter 7). The reward component `robust_prediction` is the growth of a candidate's error against this prediction.
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

STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # ridge penalties, relative to the mean variance of the features
ROUNDS = 4  # rounds of reweighting


class Expected(NamedTuple):
    """Result of `expected`: predictions `scores` (N, ...), and the weight of each row in the fit, `trust` (N,) in 0 to 1."""

    scores: Tensor
    trust: Tensor


class RobustPrediction:
    """Rewards and proposes candidate codes by their distance to the state predicted from all other items.

    Args:
        head: the start's head; copied and frozen.
        states: (N, L, H) SID states.
        evidence: (N, M) content and train behaviour features of the items.
    """

    def __init__(self, head: CodeHead, states: Tensor, evidence: NDArray) -> None:
        self.head = copy.deepcopy(head).eval().requires_grad_(False)
        with torch.no_grad():
            own = torch.cat([self.head.project(piece) for piece in states.split(BATCH)])
            self.scores = expected(own, evidence).scores
            greedy = torch.cat([self.head.greedy(piece).codes for piece in self.scores.split(BATCH)]).cpu().numpy()
        self._distances = Distances(self.head, lambda rows: self.scores[rows], greedy)

    def growth(self, rows: NDArray, candidates: Codes) -> Floats:
        """Growth of the error of candidates (R, C, L) against the prediction over its best path, in units of the mean error. -> (R, C)."""
        return self._distances.growth(rows, candidates)

    @torch.no_grad()
    def after(self, rows: NDArray, prefixes: Codes) -> Codes:
        """Most likely next code of the prediction after kept prefixes (R, M, l) of `rows` (R,). -> (R, M, 1)."""
        device = self.scores.device
        logits = self.head.level_logits(self.scores[torch.as_tensor(rows, device=device)], torch.as_tensor(prefixes, device=device))
        return logits.argmax(-1, keepdim=True).cpu().numpy()


@torch.no_grad()
def expected(scores: Tensor, evidence: NDArray, rounds: int = ROUNDS) -> Expected:
    """Robust leave-one-out prediction of scores (N, ...) from evidence (N, M).

    The penalty with the lowest weighted leave-one-out error is used. A row with squared error e has the weight 1 / (1 + (e / median e)^2).
    """
    y, x = scores.flatten(1), torch.as_tensor(np.ascontiguousarray(evidence), dtype=torch.float32, device=scores.device)
    trust = torch.ones(len(y), dtype=torch.float64, device=scores.device)
    prediction = y
    for number in range(rounds + 1):
        prediction = _leave_one_out(x, y, trust)
        if number < rounds:
            error = (prediction - y).square().sum(1).double()
            trust = 1 / (1 + (error / error.median().clamp_min(1e-12)).square())
    return Expected(prediction.view_as(scores), trust)


def _leave_one_out(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Leave-one-out predictions of a weighted ridge regression with unpenalised mean: x (N, M), y (N, D), weight (N,) -> (N, D).

    As scikit-learn's RidgeCV, which needs memory for rows x outputs x penalties to return the predictions.
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
