"""Ranker of the hybrid recommender: a small model over the features of a candidate, trained with random negatives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmsid.progress import track

RANKERS = 3  # averaged over seeds: a single ranker varies by about 1 % in NDCG@10
EPOCHS = 20
BATCH_SIZE = 256  # examples per step
WIDTH = 16


class Ranker(nn.Module):
    """Linear model plus one hidden layer over the standardised features of an item and the log length of the history.

    Args:
        mean, deviation: (F,), of the features.
    """

    def __init__(self, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.linear = nn.Linear(len(mean), 1, bias=False)
        self.hidden, self.out = nn.Linear(len(mean) + 1, WIDTH), nn.Linear(WIDTH, 1, bias=False)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.out.weight)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Features (B, C, F) and history lengths (B,) -> scores (B, C)."""
        x = (features - self.mean) / self.deviation
        length = lengths.float().log()[:, None, None].expand(*x.shape[:2], 1)
        return (self.linear(x) + self.out(F.gelu(self.hidden(torch.cat([x, length], -1)))))[..., 0]


@torch.no_grad()
def mean_score(rankers: Sequence[Ranker], features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean score (B, C) of several rankers."""
    return torch.stack([ranker(features, lengths) for ranker in rankers]).mean(0)


def fit_rankers(features: torch.Tensor, lengths: torch.Tensor, invalid: torch.Tensor, weights: torch.Tensor, seed: int) -> list[Ranker]:
    """Train the rankers with a softmax over the true item and its negatives.

    Args:
        features: (P, 1 + negatives, F) of P examples, the true item first.
        lengths: (P,) of the histories.
        invalid: (P, 1 + negatives) bool, items that are no negatives (seen ones, and repetitions of the true item).
        weights: (P,) of the examples in the loss.
    """
    return [
        _fit_ranker(features, lengths, invalid, weights, seed=RANKERS * seed + number)
        for number in track(range(RANKERS), what="rankers", unit="rankers")
    ]


def _fit_ranker(features: torch.Tensor, lengths: torch.Tensor, invalid: torch.Tensor, weights: torch.Tensor, seed: int) -> Ranker:
    sample = features[:: max(1, len(features) // 500)].float().flatten(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ranker = Ranker(sample.mean(0), sample.std(0) + 1e-4)
        steps = EPOCHS * math.ceil(len(features) / BATCH_SIZE)
        optimizer = torch.optim.AdamW(ranker.parameters(), lr=0.02, weight_decay=0.3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(features)).split(BATCH_SIZE):
                scores = ranker(features[rows].float(), lengths[rows]).masked_fill(invalid[rows], -torch.inf)
                losses = F.cross_entropy(scores, torch.zeros(len(rows), dtype=torch.long), reduction="none")
                loss = (weights[rows] * losses).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
    return ranker.eval()
