"""Sinkhorn balancing of an assignment of rows (items) to columns (codes), so that all columns get the same mass.

Entropic optimal transport (Cuturi 2013), applied to cluster scores as in SwAV (Caron et al. 2020), in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

_TINY = 1e-30


def column_log_weights(
    kernel_blocks: Callable[[], Iterable[torch.Tensor]], num_rows: int, num_columns: int, iterations: int
) -> torch.Tensor:
    """Log column weights g of the balanced plan, plan_ik proportional to kernel_ik exp(g_k). Rows of the plan sum to 1, columns to N / K.

    Args:
        kernel_blocks: called once per iteration; yields (n, K) blocks of exp((scores - row maximum) / epsilon), always in the same order.
    Returns:
        (K,) float64; the maximum is 0. With lazy blocks, only one block is held at a time.
    """
    weights = torch.ones(num_columns, dtype=torch.float64)
    for _ in range(iterations):
        sums = torch.zeros(num_columns, dtype=torch.float64)
        for block in kernel_blocks():
            rows = (block @ weights.to(block.dtype)).clamp_min(_TINY)
            sums += (block.T @ rows.reciprocal()).double()
        # one update per pass: row factors of the current weights first, then the columns
        weights = (num_rows / num_columns) / sums.clamp_min(_TINY)
        weights = (weights / weights.max()).clamp_min(_TINY)
    return weights.log()
