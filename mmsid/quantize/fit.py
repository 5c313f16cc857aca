"""A quantizer fitted on vectors by one of three methods, which gives codes to other vectors as well."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mmsid.artifacts import write_tensors
from mmsid.quantize.balanced import balanced_residual_kmeans
from mmsid.quantize.codebooks import ResidualCodebooks
from mmsid.quantize.rqkmeans import rq_kmeans
from mmsid.quantize.rqvae import LatentEncoder, rq_vae

QuantizerName = Literal["balanced_rq", "rq_kmeans", "rq_vae"]
CODEBOOKS, ENCODER = "codebooks.safetensors", "encoder.safetensors"


@dataclass
class Quantizer:
    """Codebooks and what is needed to give codes to vectors.

    Attributes:
        codes: (n, L) int64, codes of the vectors of the fit. Those of `balanced_rq` are balanced, and not always the nearest ones.
        quantised: (n, D') the vectors that the codebooks approximate: those of the fit, or their latents (`rq_vae`).
        encoder: of `rq_vae`, else None.
    """

    codebooks: ResidualCodebooks
    codes: torch.Tensor
    quantised: np.ndarray | torch.Tensor
    encoder: LatentEncoder | None = None

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors (n, D) -> the vectors (n, D') that the codebooks approximate."""
        return x if self.encoder is None else self.encoder(x)

    def encode(self, quantised: torch.Tensor) -> torch.Tensor:
        """Codes (n, L) int64 of projected vectors (n, D'), the nearest code per level."""
        return self.codebooks.encode(quantised)

    def save(self, folder: Path) -> None:
        """Write `codebooks.safetensors` and, for `rq_vae`, `encoder.safetensors`."""
        self.codebooks.save(Path(folder) / CODEBOOKS)
        if self.encoder is not None:
            write_tensors(Path(folder) / ENCODER, self.encoder.state_dict())


def fit_quantizer(method: QuantizerName, x: np.ndarray | torch.Tensor, num_levels: int, codebook_size: int, seed: int) -> Quantizer:
    """Fit codebooks on the rows of `x` (n, D).

    Raises:
        MmsidError: `x` is not a matrix, or has NaN or infinite values.
    """
    if method == "rq_kmeans":
        codebooks = rq_kmeans(x, num_levels, codebook_size, seed)
        return Quantizer(codebooks, codebooks.encode(x), x)
    if method == "balanced_rq":
        codebooks, codes = balanced_residual_kmeans(x, num_levels, codebook_size, seed)
        return Quantizer(codebooks, codes, x)
    fit = rq_vae(x, num_levels, codebook_size, seed)
    return Quantizer(fit.codebooks, fit.codebooks.encode(fit.latent), fit.latent, fit.encoder)
