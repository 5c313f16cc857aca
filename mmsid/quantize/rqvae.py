"""RQ-VAE: an autoencoder whose latent is a sum of code vectors, one per level (Lee et al. 2022; TIGER, Rajput et al. 2023).

The residual quantizer is vector-quantize-pytorch's: k-means start on the whole corpus, codebooks by moving averages, restart of
dead codes. What keeps it from collapsing, after others' reports: the reconstruction loss is summed over dimensions, not averaged
(a mean makes it 1/D of the commitment term), and the checkpoint kept is the best by collisions and reconstruction together.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmsid.quantize.balanced import distinct_rows
from mmsid.quantize.codebooks import ResidualCodebooks, as_matrix


class RqVaeFit(NamedTuple):
    """codebooks (in the latent space), and `latent` (N, d) float32, what they quantise: codes are `codebooks.encode(latent)`."""

    codebooks: ResidualCodebooks
    latent: Tensor


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
    learning_rate: float = 1e-3,
    commitment: float = 0.25,
    decay: float = 0.99,
    dead_below: float = 0.5,
    check_every: int = 100,
) -> RqVaeFit:
    """Fit on the distinct rows of `x` (N, D). The result depends on the seed, not on the order of the rows.

    Args:
        commitment: weight of |latent - quantised|^2, summed over dimensions like the reconstruction.
        dead_below: a code whose moving count per batch, as a share of an even one, falls below this restarts at a random residual.
    Raises:
        MmsidError: not a matrix, or NaN or infinite values.
    """
    from vector_quantize_pytorch import ResidualVQ  # takes seconds to import: only whoever trains one pays

    rows, inverse = distinct_rows(as_matrix(x))
    rows = rows - rows.mean(0)
    rows = rows / rows.square().mean().sqrt().clamp_min(1e-12)
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
            decay=decay,
            threshold_ema_dead_code=dead_below * batch_rows / codebook_size,
            commitment_weight=commitment * latent_dim,
            rotation_trick=False,
        )
        model = nn.ModuleList([encoder, quantizer, decoder])
        optimiser = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.1)
        with torch.no_grad():
            quantizer(encoder(rows)[None])  # k-means start on the whole corpus
        best, kept = np.inf, copy.deepcopy(model.state_dict())
        order, place = torch.randperm(len(rows)), 0
        for step in range(1, steps + 1):
            if place + batch_rows > len(rows):
                order, place = torch.randperm(len(rows)), 0
            batch = rows[order[place : place + batch_rows]]
            place += batch_rows
            quantised, _, committed = quantizer(encoder(batch)[None])
            loss = (decoder(quantised[0]) - batch).square().sum(1).mean() + committed.sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if step % check_every == 0 or step == steps:
                value = _shortfall(model, rows)
                if value < best:
                    best, kept = value, copy.deepcopy(model.state_dict())
        model.load_state_dict(kept)
    model.eval()
    with torch.no_grad():
        return RqVaeFit(ResidualCodebooks(quantizer.codebooks.detach().clone()), encoder(rows)[inverse])


def _mlp(inside: int, hidden: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outside))


@torch.no_grad()
def _shortfall(model: nn.ModuleList, rows: Tensor) -> float:
    """Share of distinct items lost to collisions + share of the variance not rebuilt: what a checkpoint is chosen by."""
    encoder, quantizer, decoder = model.eval()
    quantised, codes, _ = quantizer(encoder(rows)[None])
    lost = 1 - len(torch.unique(codes[0], dim=0)) / len(rows)
    missing = (decoder(quantised[0]) - rows).square().sum() / rows.square().sum().clamp_min(1e-12)
    model.train()
    return lost + float(missing)
