"""Code vectors of published Semantic IDs: what each code adds to an item's embedding, measured on the items that have the code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

_BLOCK = 65_536  # rows held as float64 at once


class CodeVectors(NamedTuple):
    """Vectors of the codes of one level.

    Attributes:
        vectors: (K, D) float64; rows of unused codes are 0.
        used: (K,) bool, whether an item has the code.
    """

    vectors: np.ndarray
    used: np.ndarray


def code_vectors(codes: np.ndarray, codebook_sizes: Sequence[int], embeddings: np.ndarray) -> list[CodeVectors]:
    """Mean residual of the items of each code, level after level.

    The first level holds the mean embedding of a code's items. A later level holds the mean of what the levels before it leave. They
    describe the *published* codes, also where collision handling moved items, and exist for every method that has embeddings.

    Args:
        codes: (N, L). embeddings: (N, D), rows in the same order.

    Raises:
        ValueError: codes and embeddings have different numbers of rows.
    """
    codes = np.asarray(codes)
    if len(codes) != len(embeddings):
        raise ValueError(f"codes has {len(codes)} rows, embeddings {len(embeddings)}; give one embedding per item")
    found: list[CodeVectors] = []
    for level, size in enumerate(codebook_sizes):
        sums, counts = np.zeros((size, embeddings.shape[1])), np.bincount(codes[:, level], minlength=size)
        for start in range(0, len(codes), _BLOCK):
            block = codes[start : start + _BLOCK]
            residual = np.asarray(embeddings[start : start + _BLOCK], dtype=np.float64)
            for before, earlier in enumerate(found):
                residual = residual - earlier.vectors[block[:, before]]
            rows = np.arange(len(block))
            sums += sp.csr_matrix((np.ones(len(block)), (block[:, level], rows)), (size, len(block))) @ residual
        found.append(CodeVectors(sums / np.maximum(counts, 1)[:, None], counts > 0))
    return found
