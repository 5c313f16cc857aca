"""Balanced residual k-means: residual quantization in which every code of a level has about the same number of items.

Each level starts from k-means and repeats {scores = -squared distance / mean squared norm; Sinkhorn plan; hard assignment = argmax of
the plan; centroids = means}. The residual goes to the next level. Balanced assignment by Sinkhorn follows SwAV (Caron et al. 2020).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from mmsid.quantize.codebooks import ResidualCodebooks, as_matrix, row_blocks
from mmsid.quantize.sinkhorn import column_log_weights

_START_ITERATIONS = 8
_START_ROWS_PER_CODE = 64  # sample size of k-means++, whose cost is rows x codes
_EPSILON = 0.03
_SINKHORN_ITERATIONS = 8
_CACHE_BYTES = 512 * 2**20  # a smaller (N, K) float32 kernel is kept; a larger one is recomputed block by block in each pass
_MIN_ENERGY = 1e-10  # relative residual energy below which a level is only rounding noise


class FitResult(NamedTuple):
    """Codebooks and the balanced `codes` (N, L) int64 that they were fitted with. `codebooks.encode` gives the greedy codes instead."""

    codebooks: ResidualCodebooks
    codes: torch.Tensor


def balanced_residual_kmeans(
    x: np.ndarray | torch.Tensor,
    num_levels: int = 3,
    codebook_size: int = 256,
    seed: int = 0,
    *,
    rounds: int = 15,
) -> FitResult:
    """Fit `num_levels` balanced codebooks on the rows of `x`.

    Exact duplicates share codes and count once. The distinct rows are sorted by their values, so the result does not depend on the
    order of the rows. If there are fewer distinct rows than codes, the surplus codes stay unused. Zero rows are allowed.

    Args:
        x: (N, D).
        rounds: assignments per level.
    Raises:
        MmsidError: `x` is not a matrix, or has NaN or infinite values.
        ValueError: num_levels, codebook_size or rounds is not positive.
    """
    if min(num_levels, codebook_size, rounds) < 1:
        raise ValueError(f"num_levels, codebook_size and rounds must be positive, got {num_levels}, {codebook_size} and {rounds}")
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
        if mean_square <= _MIN_ENERGY * energy:
            used[level, 0] = True  # no residual is left: the level uses one zero vector
            continue
        centroids = _kmeans(residual, codebook_size, rng)
        for _ in range(rounds):
            assigned = _balanced_assignment(residual, centroids, mean_square * _EPSILON)
            centroids = _group_means(residual, assigned, centroids)
        codes[:, level] = assigned
        vectors[level], used[level] = fill_unused(centroids, assigned, codebook_size)
        residual -= centroids[assigned]
    return FitResult(ResidualCodebooks(vectors, used), codes[inverse])


def distinct_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distinct rows in the order of their bytes, and the (N,) index of each row among them."""
    rows = np.ascontiguousarray(matrix.numpy() + np.float32(0))  # turns -0.0 into 0.0, so that equal numbers have equal bytes
    keys = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return torch.from_numpy(rows[first]), torch.from_numpy(inverse.astype(np.int64))


def _kmeans(x: torch.Tensor, num_codes: int, rng: np.random.Generator) -> torch.Tensor:
    """k-means++ on a sample of rows, then Lloyd iterations on all rows: (K', D) centroids, K' < K if there are fewer distinct rows."""
    sample = x
    if len(x) > num_codes * _START_ROWS_PER_CODE:
        sample = x[torch.from_numpy(np.sort(rng.choice(len(x), num_codes * _START_ROWS_PER_CODE, replace=False)))]
    centroids = _plus_plus(sample, num_codes, rng)
    for _ in range(_START_ITERATIONS):
        assigned, distance = _nearest(x, centroids)
        centroids = _group_means(x, assigned, centroids)
        empty = (torch.bincount(assigned, minlength=len(centroids)) == 0).nonzero().flatten()
        if len(empty):  # an empty cluster restarts at the row with the largest distance
            order = torch.from_numpy(np.argsort(-distance.numpy(), kind="stable")[: len(empty)].copy())
            centroids[empty[: len(order)]] = x[order]
    return centroids


def _group_means(x: torch.Tensor, assigned: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Mean of the rows of each code; a code without rows keeps its previous vector."""
    sums = torch.zeros(previous.shape, dtype=torch.float64)
    for rows in row_blocks(len(x)):
        sums.index_add_(0, assigned[rows], x[rows].double())
    counts = torch.bincount(assigned, minlength=len(previous))
    return torch.where(counts[:, None] > 0, (sums / counts.clamp_min(1)[:, None]).float(), previous)


def fill_unused(centroids: torch.Tensor, assigned: torch.Tensor, codebook_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad K' <= K centroids to (K, D) vectors with copies of the most used codes; also returns the (K,) mask of used codes."""
    found = len(centroids)
    by_use = torch.from_numpy(np.argsort(-torch.bincount(assigned, minlength=found).numpy(), kind="stable").copy())
    copies = by_use[torch.arange(codebook_size - found) % found]
    return torch.cat([centroids, centroids[copies]]), torch.arange(codebook_size) < found


def _plus_plus(x: torch.Tensor, num_codes: int, rng: np.random.Generator) -> torch.Tensor:
    norms = x.square().sum(1)
    chosen = [int(rng.integers(len(x)))]
    distance = None
    smallest = 1e-10 * float(norms.max())
    while len(chosen) < num_codes:
        latest = chosen[-1]
        fresh = (norms - 2 * (x @ x[latest]) + norms[latest]).clamp_min(0)
        fresh[latest] = 0
        distance = fresh if distance is None else torch.minimum(distance, fresh)
        weights = torch.where(distance > smallest, distance, 0.0).double().numpy()
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


def _balanced_assignment(x: torch.Tensor, centroids: torch.Tensor, scale: float) -> torch.Tensor:
    """Argmax of the Sinkhorn plan of -squared distance / scale. The norm of a row is constant in its scores and is left out."""
    norms = centroids.square().sum(1)

    def log_kernel(rows: slice) -> torch.Tensor:
        scores = (2 * x[rows] @ centroids.T - norms) / scale
        return scores - scores.max(dim=1, keepdim=True).values

    blocks = list(row_blocks(len(x)))
    cached = [log_kernel(rows).exp() for rows in blocks] if 4 * len(x) * len(centroids) <= _CACHE_BYTES else None

    def kernels() -> Iterator[torch.Tensor]:
        return iter(cached) if cached is not None else (log_kernel(rows).exp() for rows in blocks)

    log_weights = column_log_weights(kernels, len(x), len(centroids), _SINKHORN_ITERATIONS).float()
    assigned = torch.empty(len(x), dtype=torch.int64)
    for rows in blocks:
        assigned[rows] = torch.from_numpy((log_kernel(rows) + log_weights).numpy().argmax(axis=1))
    return assigned
