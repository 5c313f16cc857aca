"""SASRec on item ids, the baseline without Semantic IDs (Kang and McAuley 2018).

A causal transformer over item embeddings with tied output and a full softmax over the catalogue instead of one sampled
negative, which makes SASRec a strong baseline (Petrov and Macdonald 2023, Klenitskiy and Vasilev 2023).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmsid.accelerator import make_accelerator
from mmsid.catalog.splits import Split
from mmsid.recommend.evaluate import Evaluation, Part, Score, evaluate
from mmsid.recommend.history_encoder import HistoryEncoder, pad_histories
from mmsid.recommend.training import Schedule, train


@dataclass(frozen=True)
class SasrecShape:
    """Sizes of SASRec, tuned on the valid part of amazon_scientific."""

    lr: ClassVar[float] = 4e-3

    d_model: int = 128
    layers: int = 2
    heads: int = 4
    dropout: float = 0.2
    max_history: int = 20


class Sasrec(nn.Module):
    """Item embeddings E (N, d), a causal transformer with states h, and the scores h E^T of all items.

    Attributes:
        window: items of a train history that are read at once. The last one is only a target, so that every position is trained.
    """

    def __init__(self, num_items: int, shape: SasrecShape) -> None:
        super().__init__()
        self.shape = shape
        self.window = shape.max_history + 1
        self.items = nn.Embedding(num_items, shape.d_model)
        self.encoder = HistoryEncoder(shape.d_model, shape.layers, shape.heads, shape.dropout, shape.max_history)
        self.dropout = nn.Dropout(shape.dropout)
        nn.init.normal_(self.items.weight, std=0.05)

    def forward(self, histories: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of the negative log-likelihoods of every item of `histories` (B, T) given the items before it, times `weights` (B, T)."""
        real = histories >= 0
        states = self.dropout(self.encoder(self.items(histories[:, :-1].clamp_min(0)), real))
        logits = states @ self.items.weight.T
        if weights is None:
            return F.cross_entropy(logits, histories[real], reduction="sum")
        return F.cross_entropy(logits, histories[real], reduction="none") @ weights[real]

    @torch.no_grad()
    def score(self, histories: list[np.ndarray]) -> torch.Tensor:
        """Logits (B, N) of the next item after each history."""
        padded = pad_histories(histories, self.shape.max_history).to(self.items.weight.device)
        return self.encoder.last(self.items(padded.clamp_min(0)), padded) @ self.items.weight.T


@dataclass(frozen=True)
class FittedSasrec:
    """A trained SASRec, the epochs run, the best valid NDCG@10 and the training time in seconds."""

    model: Sasrec
    epochs: int
    best: float
    seconds: float

    @property
    def score(self) -> Score:
        """Scoring function: histories -> (B, N)."""
        return self.model.eval().score

    def evaluate(self, split: Split, part: Part) -> Evaluation:
        """Item-level ranks on one part of the split."""
        return evaluate(self.score, split, part, self.model.items.num_embeddings)


def fit_sasrec(
    num_items: int, split: Split, *, shape: SasrecShape | None = None, schedule: Schedule | None = None, seed: int = 0, what: str = "sasrec"
) -> FittedSasrec:
    """Train a SASRec with the training loop of all recommenders (`training.train`).

    Raises:
        MmsidError: no user has a train history, or the loss became NaN.
    """
    shape, schedule = shape or SasrecShape(), schedule or Schedule()
    accelerator = make_accelerator()
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        torch.manual_seed(seed)
        wrapped = accelerator.prepare(Sasrec(num_items, shape))
        model = accelerator.unwrap_model(wrapped)
        epochs, best = train(
            wrapped, lambda: model.eval().score, split, schedule, num_items=num_items, seed=seed, accelerator=accelerator, what=what
        )
    return FittedSasrec(model.eval(), epochs, best, time.perf_counter() - started)
