"""Ridge regression with the penalty chosen on a held-out fifth of the rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def ridge(x: Tensor, y: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ridge regression y ~ x W^T + b: x (n, H), y (n, D) -> W (D, H), b (D,).

    The penalty is a multiple of the mean variance of x, from 1e-4 to 100. It is chosen on a held-out fifth of the rows; the solution
    is then fitted on all rows.
    """
    x, y = x.double(), y.double()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    cut = max(1, len(x) // 5)
    held_out, fit = order[:cut], order[cut:] if len(x) > 5 else order
    solve = _ridge_path(x[fit], y[fit])
    mean_x, mean_y = x[fit].mean(0), y[fit].mean(0)
    penalties = [10.0**power for power in (-4, -3, -2, -1, 0, 1, 2)]
    errors = [((x[held_out] - mean_x) @ solve(penalty) + mean_y - y[held_out]).square().sum().item() for penalty in penalties]
    weight = _ridge_path(x, y)(penalties[int(np.argmin(errors))])
    return weight.T.float().contiguous(), (y.mean(0) - x.mean(0) @ weight).float()


def _ridge_path(x: Tensor, y: Tensor) -> Callable[[float], Tensor]:
    """Penalty -> ridge solution (H, D), from one eigendecomposition."""
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    moment = vectors.T @ (centred.T @ (y - y.mean(0)))
    scale = values.clamp_min(0).mean().clamp_min(1e-12)
    return lambda penalty: vectors @ (moment / (values.clamp_min(0) + penalty * scale)[:, None])
