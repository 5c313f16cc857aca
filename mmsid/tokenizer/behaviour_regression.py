"""Gaussian-process regression of the behaviour part of an item's fused vector on its content state.

Content predicts a fifth of the variance of the behaviour vectors. The residuals of known items are modelled as a smooth function of the
projected content state plus noise of variance sigma^2 / n_i, n_i the train interactions of item i. The posterior mean (Rasmussen &
Williams 2006, eq. 2.25) corrects frequent items almost fully and rare items partly, and leaves items far from all keys unchanged.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

MAX_KEYS = 16_384  # the closed-form solution is cubic in time and quadratic in space
LIKELIHOOD_ROWS = 1_500  # sample on which length and noise are chosen
LENGTHS = (0.25, 0.5, 1.0, 2.0)  # multiples of the median distance of an item to its nearest neighbour
NOISES = (0.1, 0.3, 1.0, 3.0, 10.0)  # sigma^2, relative to the variance of the smooth part


class BehaviourRegression(nn.Module):
    """Posterior mean m(s) = k(s, keys) values, with k(s, s') = exp(-|s - s'|^2 / 2 length^2).

    The buffers are `keys` (M, D), `values` (M, D) = (K + diag(sigma^2 / n_i))^-1 residuals, and `length` (). Only refinement trains
    the values (`refine.loop.behaviour_rate`).
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("values", torch.zeros(size, dim))
        self.register_buffer("length", torch.ones(()))

    def forward(self, s: Tensor) -> Tensor:
        """Correction (B, 1, D) of projected states s (B, L, D), the same for all levels, evaluated at their mean."""
        return (kernel(s.mean(1), self.keys, self.length) @ self.values)[:, None]


def kernel(x: Tensor, keys: Tensor, length: Tensor | float) -> Tensor:
    """exp(-|x - key|^2 / 2 l^2): x (B, D), keys (M, D) -> (B, M)."""
    squared = x.square().sum(-1, keepdim=True) + keys.square().sum(-1) - 2 * x @ keys.T
    return torch.exp(-squared.clamp_min(0) / (2 * length**2))


@torch.no_grad()
def fit_behaviour_regression(keys: Tensor, residuals: Tensor, interactions: Tensor, seed: int) -> BehaviourRegression:
    """Fit the regression on items with train interactions, at most `MAX_KEYS` of the most frequent ones.

    Args:
        keys: (n, D) projected states, mean over levels.
        residuals: (n, D), fused vector minus projected state.
        interactions: (n,) train interactions.
    """
    known = (interactions > 0).nonzero().flatten()
    rng = np.random.default_rng([seed, 11])
    if len(known) > MAX_KEYS:  # ties are broken at random
        order = np.lexsort((rng.permutation(len(known)), -interactions[known].numpy()))
        known = known[np.sort(order[:MAX_KEYS])]
    keys, residuals, count = keys[known].double(), residuals[known].double(), interactions[known].double()
    sample = torch.from_numpy(np.sort(rng.permutation(len(known))[:LIKELIHOOD_ROWS]))
    length, noise = _choose_hyperparameters(keys[sample], residuals[sample], count[sample])
    regression = BehaviourRegression(len(known), keys.shape[1])
    if len(known):
        gram = kernel(keys, keys, length)
        gram.diagonal().add_(noise / count)
        regression.values.copy_(torch.cholesky_solve(residuals, torch.linalg.cholesky(gram)))
        regression.keys.copy_(keys)
        regression.length.fill_(length)
    return regression


def _choose_hyperparameters(keys: Tensor, residuals: Tensor, count: Tensor) -> tuple[float, float]:
    """Length and noise of maximum marginal likelihood (eq. 2.30) on the grid."""
    if len(keys) < 2:
        return 1.0, NOISES[0]
    nearest = torch.cdist(keys, keys).fill_diagonal_(math.inf).amin(1)
    unit = float(nearest[nearest > 0].median()) if bool((nearest > 0).any()) else 1.0
    grid = [(factor * unit, noise) for factor in LENGTHS for noise in NOISES]
    return max(grid, key=lambda point: _log_likelihood(keys, residuals, count, *point))


def _log_likelihood(keys: Tensor, residuals: Tensor, count: Tensor, length: float, noise: float) -> float:
    """log p(residuals) up to a constant, with independent columns and the maximum-likelihood amplitude."""
    gram = kernel(keys, keys, length)
    gram.diagonal().add_(noise / count)
    factor = torch.linalg.cholesky(gram)
    white = torch.linalg.solve_triangular(factor, residuals, upper=False)
    rows, columns = residuals.shape
    amplitude = float(white.square().mean().clamp_min(1e-12))
    return -0.5 * rows * columns * math.log(amplitude) - columns * float(factor.diagonal().log().sum())
