"""The instrument with eyes: it reads the items' dense text embeddings beside their SIDs, and answers in both.

After LIGER (Yang et al. 2024), which joins generative and dense retrieval in one transformer: an item enters as the sum of its
code embeddings and a projection of its dense embedding; a state is trained to spell the next item's SID (the instrument's own
loss) and to point at its vector among all items (softmax over dot products), half and half.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmsid.recommend.decode import ItemScorer
from mmsid.recommend.history import pad_histories
from mmsid.recommend.instrument import Instrument, InstrumentShape
from mmsid.recommend.paths import ItemPaths, PathTrie

NEGATIVES = 4096  # sampled per step where the catalogue has more items


@dataclass(frozen=True)
class DenseShape(InstrumentShape):
    """Sizes; the same as the instrument's."""

    lr: ClassVar[float] = 4e-3


class DenseInstrument(Instrument):
    """Args beside the instrument's: `embeddings` (N, D), one row per item, of unit length."""

    def __init__(self, paths: ItemPaths, embeddings: np.ndarray, shape: DenseShape) -> None:
        super().__init__(torch.from_numpy(paths.tokens), paths.sizes, torch.from_numpy(paths.decided), shape)
        # unit rows have entries of about 0.05; four times that starts the projection at the scale of the code embeddings
        self.register_buffer("embeddings", 4 * torch.from_numpy(np.asarray(embeddings, dtype=np.float32)), persistent=False)
        self.project = nn.Linear(embeddings.shape[1], shape.d_model)
        self.point = nn.Linear(shape.d_model, shape.d_model)
        self.item_bias = nn.Parameter(torch.zeros(len(embeddings)))
        self.log_scale = nn.Parameter(torch.tensor(math.log(0.3)))

    def item_vectors(self, rows: torch.Tensor) -> torch.Tensor:
        """Sum of code embeddings and projected dense embedding, (..., d)."""
        return super().item_vectors(rows) + self.project(self.embeddings[rows])

    def pointers(self, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits (P, R) of the items `rows` (R,) from states (P, d)."""
        return self.log_scale.exp() * self.point(states) @ self.item_vectors(rows).T + self.item_bias[rows]

    def forward(self, histories: torch.Tensor) -> torch.Tensor:
        """Half the instrument's loss and half the pointer's, summed over the items of `histories` (B, T)."""
        real = histories >= 0
        targets = histories[real]
        states = self.dropout(self.read(self.item_vectors(histories[:, :-1].clamp_min(0)), real))
        spell = -self.path_log_prob(states, self.paths[targets], self.decided[targets]).sum()
        return 0.5 * spell + 0.5 * self._point_loss(states, targets)

    def _point_loss(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Softmax cross-entropy over all items, the partition estimated from a uniform sample where they are many."""
        num_items = len(self.item_bias)
        if num_items <= NEGATIVES:
            return F.cross_entropy(self.pointers(states, torch.arange(num_items, device=states.device)), targets, reduction="sum")
        sample = torch.randint(num_items, (NEGATIVES,), device=states.device)
        others = self.pointers(states, sample) + math.log((num_items - 1) / NEGATIVES)
        others = others.masked_fill(sample[None] == targets[:, None], -torch.inf)
        own = self.log_scale.exp() * (self.point(states) * self.item_vectors(targets)).sum(-1) + self.item_bias[targets]
        return F.cross_entropy(torch.cat([own[:, None], others], 1), torch.zeros_like(targets), reduction="sum")


class DenseScores:
    """The two answers of a trained model for every item, weights frozen at construction."""

    @torch.no_grad()
    def __init__(self, model: DenseInstrument, trie: PathTrie) -> None:
        self.model, self.spell = model.eval(), ItemScorer(model, trie)
        self.rows = torch.arange(len(model.item_bias), device=model.item_bias.device)

    @torch.no_grad()
    def __call__(self, histories: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """histories -> log p (B, N) of each item's SID path under the trie, and log p (B, N) of pointing at it."""
        padded = pad_histories(histories, self.model.shape.max_history).to(self.rows.device)
        states = self.model.last_states(padded)
        return self.spell(states), torch.log_softmax(self.model.pointers(states, self.rows), 1)


def mean_log_prob(model: DenseInstrument, trie: PathTrie) -> Callable[[list[np.ndarray]], torch.Tensor]:
    """The mean of both answers, (B, N): what early stopping looks at."""
    scores = DenseScores(model, trie)
    return lambda histories: torch.stack(scores(histories)).mean(0)
