"""RQ-KMeans: plain k-means per level on the residual (faiss), the usual baseline for Semantic IDs."""

from __future__ import annotations

import faiss
import numpy as np
import torch

from mmsid.quantize.balanced import distinct_rows, fill_unused
from mmsid.quantize.codebooks import ResidualCodebooks, as_matrix


def rq_kmeans(
    x: np.ndarray | torch.Tensor, num_levels: int = 3, codebook_size: int = 256, seed: int = 0, *, iterations: int = 25
) -> ResidualCodebooks:
    """Fit greedy residual k-means codebooks on the distinct rows of `x` (N, D). `result.encode(x)` gives the codes.

    If there are fewer distinct rows than codes, the surplus codes stay unused. The result does not depend on the row order.

    Raises:
        MmsidError: `x` is not a matrix, or has NaN or infinite values.
        ValueError: num_levels, codebook_size or iterations is not positive.
    """
    if min(num_levels, codebook_size, iterations) < 1:
        raise ValueError(f"num_levels, codebook_size and iterations must be positive, got {num_levels}, {codebook_size} and {iterations}")
    residual, _ = distinct_rows(as_matrix(x))
    vectors = torch.zeros((num_levels, codebook_size, residual.shape[1]))
    used = torch.zeros((num_levels, codebook_size), dtype=torch.bool)
    for level in range(num_levels):
        different, _ = distinct_rows(residual)
        kmeans = faiss.Kmeans(
            residual.shape[1],
            min(codebook_size, len(different)),
            niter=iterations,
            seed=seed + level,
            min_points_per_centroid=1,
            max_points_per_centroid=1024,
        )
        kmeans.train(different.numpy())
        centroids = torch.from_numpy(kmeans.centroids.copy())
        level_codes = ResidualCodebooks(centroids[None]).encode(residual)[:, 0]
        vectors[level], used[level] = fill_unused(centroids, level_codes, codebook_size)
        residual = residual - centroids[level_codes]
    return ResidualCodebooks(vectors, used)
