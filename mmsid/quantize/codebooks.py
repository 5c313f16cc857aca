"""Residual codebooks: L levels of K code vectors. An item is approximated by the sum of one vector per level."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mmsid.artifacts import read_tensors, write_tensors
from mmsid.errors import ArtifactError, MmsidError
from mmsid.quantize.greedy import greedy_codes

_BLOCK_ROWS = 8192


def as_matrix(x: np.ndarray | torch.Tensor, what: str = "embeddings") -> torch.Tensor:
    """Convert `x` to a contiguous (N, D) float32 tensor on the CPU.

    Raises:
        MmsidError: not two-dimensional, no rows or no columns, or a NaN or infinite value (names the first such row).
    """
    matrix = torch.as_tensor(x).detach().to("cpu", torch.float32).contiguous()
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise MmsidError(f"{what}: expected a non-empty matrix (items, dimensions), got shape {tuple(matrix.shape)}")
    finite = torch.cat([torch.isfinite(matrix[rows]).all(dim=1) for rows in row_blocks(len(matrix))])
    if not finite.all():
        bad = (~finite).nonzero().flatten()
        raise MmsidError(f"{what}: {len(bad)} of {len(matrix)} rows have NaN or infinite values, first row {int(bad[0])}; embed them again")
    return matrix


def row_blocks(num_rows: int, size: int = _BLOCK_ROWS) -> Iterator[slice]:
    """Slices that split `num_rows` rows into blocks."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


@dataclass
class ResidualCodebooks:
    """Codebooks of a residual quantizer, with `num_levels` levels of `codebook_size` code vectors.

    Attributes:
        vectors: (L, K, D) float32.
        used: (L, K) bool; False marks a surplus code (fewer distinct items than codes). Its vector is a copy of a used one, so that
            relocation and training may use it; `encode` never chooses it.
    """

    vectors: torch.Tensor
    used: torch.Tensor = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.vectors.ndim != 3 or 0 in self.vectors.shape:
            raise ValueError(f"vectors must be (levels, codes, dimensions), got shape {tuple(self.vectors.shape)}")
        if self.used is None:
            self.used = torch.ones(self.vectors.shape[:2], dtype=torch.bool)
        if self.used.shape != self.vectors.shape[:2] or not self.used.any(dim=1).all():
            raise ValueError(
                f"used must be {tuple(self.vectors.shape[:2])} with at least one used code per level, got {tuple(self.used.shape)}"
            )

    @property
    def num_levels(self) -> int:
        return self.vectors.shape[0]

    @property
    def codebook_size(self) -> int:
        return self.vectors.shape[1]

    @property
    def dim(self) -> int:
        return self.vectors.shape[2]

    def encode(self, x: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Assign the nearest code per level, greedily on the residual; ties go to the lowest index.

        The codes of a row do not depend on batch size and row order (see `mmsid.quantize.greedy`).

        Args:
            x: (N, D).
        Returns:
            codes (N, L) int64.
        Raises:
            MmsidError: an error of `as_matrix`, or D differs from the dimension of the codebooks.
        """
        return torch.from_numpy(greedy_codes(self.check(x).numpy(), self.vectors.float().numpy(), self.used.numpy()))

    def decode(self, codes: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Sum the code vectors: (N, l) codes of the first l <= L levels -> (N, D) float32."""
        codes = torch.as_tensor(codes).long()
        if codes.ndim != 2 or codes.shape[1] > self.num_levels:
            raise ValueError(f"codes must be (N, at most {self.num_levels}), got {tuple(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(f"codes must be in [0, {self.codebook_size}), got {int(codes.min())}..{int(codes.max())}")
        total = torch.zeros((len(codes), self.dim))
        for level in range(codes.shape[1]):
            total += self.vectors[level][codes[:, level]]
        return total

    def save(self, path: Path) -> None:
        """Write `vectors` and `used` as safetensors."""
        write_tensors(path, {"vectors": self.vectors, "used": self.used})

    @classmethod
    def load(cls, path: Path) -> ResidualCodebooks:
        """Read a file written by `save`.

        Raises:
            ArtifactError: the file contains no codebooks.
        """
        tensors = read_tensors(path)
        if "vectors" not in tensors:
            raise ArtifactError(f"{path}: tensor 'vectors' missing (found {sorted(tensors)}); expected residual codebooks")
        return cls(tensors["vectors"], tensors.get("used"))  # type: ignore[arg-type]

    def check(self, x: np.ndarray | torch.Tensor) -> torch.Tensor:
        """`as_matrix`, and an MmsidError if D differs from the dimension of the codebooks."""
        matrix = as_matrix(x)
        if matrix.shape[1] != self.dim:
            raise MmsidError(f"embeddings have {matrix.shape[1]} dimensions, the codebooks {self.dim}; use the encoder they were fitted on")
        return matrix
