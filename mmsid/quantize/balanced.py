"""Sinkhorn-balanced residual k-means: every code of a level holds about the same number of items.

Each level: a k-means start, then rounds of {scores = -squared distance / mean squared norm; Sinkhorn plan; hard
assignment = the plan's argmax; centroids = means}; the residual goes to the next level.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from mmsid.quantize.codebooks import ResidualCodebooks, as_matrix, row_blocks
from mmsid.quantize.sinkhorn import column_log_weights

_START_ROWS_PER_CODE = 64  # k-means++ looks at this many rows per code: its cost is rows x codes
_NOTHING_LEFT = 1e-10  # residual energy, relative to the input's, under which a level has only float noise to quantise


class FitResult(NamedTuple):
    """codebooks, and the balanced assignment `codes` (N, L) int64 that fitted them (`codebooks.encode` is the greedy one)."""

    codebooks: ResidualCodebooks
    codes: torch.Tensor


def balanced_residual_kmeans(
    x: np.ndarray | torch.Tensor,
    num_levels: int = 3,
    codebook_size: int = 256,
    seed: int = 0,
    *,
    rounds: int = 15,
    start_iterations: int = 8,
    epsilon: float = 0.03,
    sinkhorn_iterations: int = 8,
    cache_bytes: int = 512 * 2**20,
) -> FitResult:
    """Fit `num_levels` balanced codebooks on the rows of `x`.

    Exact duplicates count once (they share codes, and must not drag a code to themselves), and the fit walks the
    distinct rows in an order of their own values: the result does not depend on the order of the rows. Fewer distinct
    rows than codes is allowed: the surplus codes stay unused. A zero row is a row like any other.

    Args:
        x: (N, D).
        cache_bytes: a level's (N, K) float32 kernel is kept when it is smaller, else made anew, block by block, in each pass.
    Raises:
        MmsidError: not a matrix, or NaN or infinite values.
        ValueError: num_levels, codebook_size or a number of rounds not positive.
    """
    if min(num_levels, codebook_size, rounds, start_iterations, sinkhorn_iterations) < 1 or epsilon <= 0:
        raise ValueError("num_levels, codebook_size, rounds, start_iterations, sinkhorn_iterations and epsilon must be positive")
    matrix = as_matrix(x)
    distinct, inverse = distinct_rows(matrix)
    rng = np.random.default_rng(seed)
    residual = distinct.clone()
    energy = float(residual.double().square().sum(1).mean())
    vectors = torch.zeros((num_levels, codebook_size, matrix.shape[1]))
    used = torch.zeros((num_levels, codebook_size), dtype=torch.bool)
    codes = torch.zeros((len(distinct), num_levels), dtype=torch.int64)
    for level in range(num_levels):
        mean_square = float(residual.double().square().sum(1).mean())
        if mean_square <= _NOTHING_LEFT * energy:
            used[level, 0] = True  # nothing left to say: one zero vector
            continue
        centroids = kmeans_start(residual, codebook_size, start_iterations, rng)
        for _ in range(rounds):
            assigned = _balanced_assignment(residual, centroids, mean_square * epsilon, sinkhorn_iterations, cache_bytes)
            centroids = group_means(residual, assigned, centroids)
        codes[:, level] = assigned
        vectors[level], used[level] = fill_unused(centroids, assigned, codebook_size)
        residual -= centroids[assigned]
    return FitResult(ResidualCodebooks(vectors, used), codes[inverse])


def distinct_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct rows in the order of their bytes, and the (N,) index of each row among them."""
    rows = np.ascontiguousarray(matrix.numpy() + np.float32(0))  # -0.0 + 0 = 0.0: equal numbers, equal bytes
    keys = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return torch.from_numpy(rows[first]), torch.from_numpy(inverse.astype(np.int64))


def kmeans_start(x: torch.Tensor, num_codes: int, iterations: int, rng: np.random.Generator) -> torch.Tensor:
    """k-means++ on a sample of rows, then Lloyd iterations on all: (K', D) centroids, K' < K where the rows have fewer values."""
    sample = x
    if len(x) > num_codes * _START_ROWS_PER_CODE:
        sample = x[torch.from_numpy(np.sort(rng.choice(len(x), num_codes * _START_ROWS_PER_CODE, replace=False)))]
    centroids = _plus_plus(sample, num_codes, rng)
    for _ in range(iterations):
        assigned, distance = _nearest(x, centroids)
        centroids = group_means(x, assigned, centroids)
        empty = (torch.bincount(assigned, minlength=len(centroids)) == 0).nonzero().flatten()
        if len(empty):  # an empty cluster restarts at the row that is served worst
            order = torch.from_numpy(np.argsort(-distance.numpy(), kind="stable")[: len(empty)].copy())
            centroids[empty[: len(order)]] = x[order]
    return centroids


def group_means(x: torch.Tensor, assigned: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Mean of each code's rows; a code without rows keeps its previous vector."""
    sums = torch.zeros(previous.shape, dtype=torch.float64)
    for rows in row_blocks(len(x)):
        sums.index_add_(0, assigned[rows], x[rows].double())
    counts = torch.bincount(assigned, minlength=len(previous))
    return torch.where(counts[:, None] > 0, (sums / counts.clamp_min(1)[:, None]).float(), previous)


def fill_unused(centroids: torch.Tensor, assigned: torch.Tensor, codebook_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, D) vectors and (K,) used mask from K' <= K centroids: the surplus are copies of the most used codes, in turn."""
    found = len(centroids)
    by_use = torch.from_numpy(np.argsort(-torch.bincount(assigned, minlength=found).numpy(), kind="stable").copy())
    copies = by_use[torch.arange(codebook_size - found) % found]
    return torch.cat([centroids, centroids[copies]]), torch.arange(codebook_size) < found


def _plus_plus(x: torch.Tensor, num_codes: int, rng: np.random.Generator) -> torch.Tensor:
    norms = x.square().sum(1)
    chosen = [int(rng.integers(len(x)))]
    distance = None
    floor = 1e-10 * float(norms.max())
    while len(chosen) < num_codes:
        latest = chosen[-1]
        fresh = (norms - 2 * (x @ x[latest]) + norms[latest]).clamp_min(0)
        fresh[latest] = 0
        distance = fresh if distance is None else torch.minimum(distance, fresh)
        weights = torch.where(distance > floor, distance, 0.0).double().numpy()
        total = weights.cumsum()
        if total[-1] <= 0:
            break
        chosen.append(min(int(np.searchsorted(total, rng.random() * total[-1], side="right")), len(x) - 1))
    return x[torch.tensor(chosen)].clone()


def _nearest(x: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assigned, distance = torch.empty(len(x), dtype=torch.int64), torch.empty(len(x))
    norms = centroids.square().sum(1)
    for rows in row_blocks(len(x)):
        scores = (norms - 2 * x[rows] @ centroids.T).numpy()
        best = scores.argmin(axis=1)
        assigned[rows] = torch.from_numpy(best)
        distance[rows] = torch.from_numpy(scores[np.arange(len(best)), best]) + x[rows].square().sum(1)
    return assigned, distance


def _balanced_assignment(x: torch.Tensor, centroids: torch.Tensor, scale: float, iterations: int, cache_bytes: int) -> torch.Tensor:
    """Argmax of the Sinkhorn plan of -squared distance / scale. The row's own norm is constant per row, so it is left out."""
    norms = centroids.square().sum(1)

    def log_kernel(rows: slice) -> torch.Tensor:
        scores = (2 * x[rows] @ centroids.T - norms) / scale
        return scores - scores.max(dim=1, keepdim=True).values

    blocks = list(row_blocks(len(x)))
    cached = [log_kernel(rows).exp() for rows in blocks] if 4 * len(x) * len(centroids) <= cache_bytes else None

    def kernels() -> Iterator[torch.Tensor]:
        return iter(cached) if cached is not None else (log_kernel(rows).exp() for rows in blocks)

    log_weights = column_log_weights(kernels, len(x), len(centroids), iterations).float()
    assigned = torch.empty(len(x), dtype=torch.int64)
    for rows in blocks:
        assigned[rows] = torch.from_numpy((log_kernel(rows) + log_weights).numpy().argmax(axis=1))
    return assigned
