"""Sinkhorn balancing: the assignment plan whose rows are items and whose columns all carry the same mass.

Source: Cuturi 2013 (entropic transport); used on cluster scores as in SwAV (Caron et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

_TINY = 1e-30


def sinkhorn(scores: torch.Tensor, epsilon: float = 0.03, iterations: int = 8) -> torch.Tensor:
    """The balanced plan of `scores` (higher = better fit).

    The plan starts as softmax(scores / epsilon); each iteration scales the columns to N / K, then the rows to 1. So the
    rows sum to 1 exactly, and the columns to N / K as closely as the iterations bring them. A constant added to a row
    of `scores` changes nothing.

    Args:
        scores: (N, K) finite, any float type.
        epsilon: entropic temperature, in the unit of the scores.
    Returns:
        (N, K) plan of the scores' type (differentiable: call it under `no_grad` for targets).
    Raises:
        ValueError: not a matrix, empty, not finite, epsilon or iterations not positive.
    """
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores must be a non-empty (N, K) matrix, got shape {tuple(scores.shape)}")
    if epsilon <= 0 or iterations < 1:
        raise ValueError(f"epsilon must be > 0 and iterations >= 1, got {epsilon} and {iterations}")
    if not torch.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinite values")
    num_rows, num_columns = scores.shape
    kernel = torch.log_softmax(scores / epsilon, dim=1)  # in the log domain: a far code underflows float32 otherwise
    target = torch.log(torch.tensor(num_rows / num_columns, dtype=kernel.dtype, device=kernel.device))
    for _ in range(iterations):
        kernel = kernel + (target - torch.logsumexp(kernel, dim=0, keepdim=True))
        kernel = kernel - torch.logsumexp(kernel, dim=1, keepdim=True)
    return kernel.exp()


def column_log_weights(
    kernel_blocks: Callable[[], Iterable[torch.Tensor]], num_rows: int, num_columns: int, iterations: int
) -> torch.Tensor:
    """The same balancing over row blocks, returning only what an argmax needs: g with plan_ik proportional to kernel_ik exp(g_k).

    Args:
        kernel_blocks: called once per pass; yields (n, K) blocks of exp((scores - row maximum) / epsilon), always in one order.
    Returns:
        (K,) float64 log column weights; the greatest is 0. Memory: one block at a time, if the caller makes them lazily.
    """
    weights = torch.ones(num_columns, dtype=torch.float64)
    for _ in range(iterations):
        sums = torch.zeros(num_columns, dtype=torch.float64)
        for block in kernel_blocks():
            rows = (block @ weights.to(block.dtype)).clamp_min(_TINY)
            sums += (block.T @ rows.reciprocal()).double()
        # One update per pass: the row factors are those of the current weights, hence rows first, then columns.
        weights = (num_rows / num_columns) / sums.clamp_min(_TINY)
        weights = (weights / weights.max()).clamp_min(_TINY)
    return weights.log()
