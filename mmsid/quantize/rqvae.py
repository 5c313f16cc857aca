"""RQ-VAE: an autoencoder whose latent is a sum of code vectors, one per level (Lee et al. 2022; TIGER, Rajput et al. 2023).

The residual quantizer is that of vector-quantize-pytorch: k-means start on the whole corpus, EMA codebooks, restart of dead codes.
Two measures against collapse: the reconstruction loss is a sum over dimensions (a mean would be 1/D of the commitment loss), and the
checkpoint with the fewest collisions and the smallest reconstruction error is kept.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmsid.quantize.balanced import distinct_rows
from mmsid.quantize.codebooks import ResidualCodebooks, as_matrix

_COMMITMENT = 0.25  # weight of |latent - quantised|^2, summed over dimensions like the reconstruction loss
_DECAY = 0.99
_DEAD_BELOW = 0.5  # a code with an EMA count below this share of an even one restarts at a random residual
_LEARNING_RATE = 1e-3


class LatentEncoder(nn.Module):
    """Encoder of a fitted RQ-VAE: centres and scales vectors, and maps them to the latent space.

    Args:
        mean: (D,) of the rows of the fit. scale: () their root mean square about it.
    """

    def __init__(self, mean: Tensor, scale: Tensor, network: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.network = network

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(n, D) float32 -> latents (n, d)."""
        return self.network((x - self.mean) / self.scale)


class RqVaeFit(NamedTuple):
    """Codebooks of the latent space and the latents (N, d) float32. `codebooks.encode(latent)` gives the codes.

    `encoder` maps other vectors to latents.
    """

    codebooks: ResidualCodebooks
    latent: Tensor
    encoder: LatentEncoder


def rq_vae(
    x: np.ndarray | Tensor,
    num_levels: int = 3,
    codebook_size: int = 256,
    seed: int = 0,
    *,
    latent_dim: int = 32,
    hidden: int = 256,
    steps: int = 400,
    batch_rows: int = 1024,
    check_every: int = 100,
) -> RqVaeFit:
    """Fit an RQ-VAE on the distinct rows of `x` (N, D). The result does not depend on the order of the rows.

    Args:
        hidden: width of the two hidden layers of encoder and decoder.
        check_every: steps between two checkpoints that are compared.
    Raises:
        MmsidError: `x` is not a matrix, or has NaN or infinite values.
    """
    from vector_quantize_pytorch import ResidualVQ  # imported here because the import takes seconds

    rows, inverse = distinct_rows(as_matrix(x))
    mean = rows.mean(0)
    rows = rows - mean
    scale = rows.square().mean().sqrt().clamp_min(1e-12)
    rows = rows / scale
    batch_rows = min(batch_rows, len(rows))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, decoder = _mlp(rows.shape[1], hidden, latent_dim), _mlp(latent_dim, hidden, rows.shape[1])
        quantizer = ResidualVQ(
            dim=latent_dim,
            num_quantizers=num_levels,
            codebook_size=codebook_size,
            kmeans_init=True,
            kmeans_iters=10,
            decay=_DECAY,
            threshold_ema_dead_code=_DEAD_BELOW * batch_rows / codebook_size,
            commitment_weight=_COMMITMENT * latent_dim,
            rotation_trick=False,
        )
        model = nn.ModuleList([encoder, quantizer, decoder])
        optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.1)
        with torch.no_grad():
            quantizer(encoder(rows)[None])  # k-means start on the whole corpus
        best, best_state = np.inf, copy.deepcopy(model.state_dict())
        order, start = torch.randperm(len(rows)), 0
        for step in range(1, steps + 1):
            if start + batch_rows > len(rows):
                order, start = torch.randperm(len(rows)), 0
            batch = rows[order[start : start + batch_rows]]
            start += batch_rows
            quantised, _, commitment_loss = quantizer(encoder(batch)[None])
            loss = (decoder(quantised[0]) - batch).square().sum(1).mean() + commitment_loss.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % check_every == 0 or step == steps:
                value = _selection_error(model, rows)
                if value < best:
                    best, best_state = value, copy.deepcopy(model.state_dict())
        model.load_state_dict(best_state)
    model.eval()
    with torch.no_grad():
        codebooks = ResidualCodebooks(quantizer.codebooks.detach().clone())
        return RqVaeFit(codebooks, encoder(rows)[inverse], LatentEncoder(mean, scale, encoder).eval())


def _mlp(in_dim: int, hidden: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out_dim))


@torch.no_grad()
def _selection_error(model: nn.ModuleList, rows: Tensor) -> float:
    """Criterion of checkpoint selection: share of distinct items lost to collisions + unexplained share of the variance."""
    encoder, quantizer, decoder = model.eval()
    quantised, codes, _ = quantizer(encoder(rows)[None])
    lost = 1 - len(torch.unique(codes[0], dim=0)) / len(rows)
    unexplained = (decoder(quantised[0]) - rows).square().sum() / rows.square().sum().clamp_min(1e-12)
    model.train()
    return lost + float(unexplained)
