"""Scalar features of an item and a candidate code sequence for the reward model `sid_reward`, relative to the codes of all other items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmsid.catalog.coengagement import co_engagement
from mmsid.quantize.nearest_items import nearest_items
from mmsid.refine.evidence import Codes, CodeTable, EvidenceConfig, Floats
from mmsid.refine.policy import Reference

ALIKE = 20  # nearest items by content whose codes are read
SHARPNESS = 10.0  # weight of a nearest item is exp(SHARPNESS * cosine)

# groups of features by prefix of their names; the report has the accuracy that each group contributes
FEATURE_GROUPS = {
    "distances": ("distance",),
    "neighbours": ("agreement", "chance"),
    "crowding": ("crowd", "collision"),
    "coherence": ("coherence", "alike"),
}


@dataclass(frozen=True)
class Material:
    """Inputs of the features besides histories.

    Attributes:
        reference: frozen reference policy.
        item_vectors: (N, H) unit item embeddings.
        codes: (N, L) current codes.
        content: (N,) equal numbers for exact duplicates.
    """

    reference: Reference
    item_vectors: NDArray
    codes: Codes
    content: NDArray

    @cached_property
    def alike(self) -> tuple[NDArray[np.int64], Floats]:
        """`most_alike` of the item vectors, computed once because they are frozen."""
        return most_alike(self.item_vectors)

    def table(self, histories: Sequence[NDArray], config: EvidenceConfig, weights: Sequence[NDArray] | None = None) -> CodeTable:
        """Index of the current codes with the co-engagement of the given histories and their event weights."""
        neighbours = co_engagement(list(histories), len(self.codes), config.window, weights)
        return CodeTable(self.codes, self.reference.head.codebook_size, neighbours, self.content, config.prior)


def feature_names(num_levels: int) -> list[str]:
    """Names of the features in order. The distance expert reads those that start with `distance`, the behaviour expert the others."""
    levels = range(1, num_levels + 1)
    return [
        *[f"distance_log_prob_{level}" for level in levels],
        "distance_error_growth",
        *[f"agreement_{level}" for level in levels],
        *[f"chance_{level}" for level in levels],
        *[f"crowd_{level}" for level in levels],
        "collision",
        *[f"coherence_{level}" for level in range(1, num_levels)],
        *[f"alike_{level}" for level in levels],
        "log_degree",
    ]


def read_features(material: Material, table: CodeTable, rows: NDArray, candidates: Codes) -> Tensor:
    """Features (R, C, F) of candidates (R, C, L) of `rows` (R,) relative to the other items in `table`.

    `coherence` is the cosine of the item's vector and the mean vector under each prefix. `alike` is the weighted share of the nearest items
    by content under each prefix.
    """
    reference, vectors = material.reference, material.item_vectors
    excess, chance = table.agreement(rows, candidates)
    others = table.others(rows, candidates)
    coherence = []
    for level in range(candidates.shape[-1] - 1):
        mean, _ = table.mean_under(vectors, rows, candidates, level)
        length = np.maximum(np.linalg.norm(mean, axis=-1), 1e-9)
        coherence.append(np.einsum("rh,rch->rc", vectors[rows], mean) / length)
    growth = reference.error_growth(rows, candidates)
    degree = np.broadcast_to(np.log1p(table.degree[rows])[:, None], growth.shape)
    near, weight = material.alike
    columns = [
        *np.moveaxis(reference.level_log_prob(rows, candidates), -1, 0),
        growth,
        *np.moveaxis(excess, -1, 0),
        *np.moveaxis(chance, -1, 0),
        *np.moveaxis(np.log1p(others), -1, 0),
        np.minimum(others[..., -1], 1.0),
        *coherence,
        *np.moveaxis(table.share_under(near[rows], weight[rows], candidates), -1, 0),
        degree,
    ]
    return torch.from_numpy(np.stack(columns, axis=-1).astype(np.float32))


def most_alike(vectors: NDArray, count: int = ALIKE, sharpness: float = SHARPNESS) -> tuple[NDArray[np.int64], Floats]:
    """The `count` nearest other items of each by the cosine of the centred vectors (N, H), and their weights.

    Weights are proportional to exp(sharpness * cosine) and sum to 1. Both (N, count), or (N, N - 1) in a smaller catalogue.
    """
    near, cosine = nearest_items(vectors - vectors.mean(axis=0, keepdims=True), count)
    weight = np.exp(sharpness * (cosine - 1.0))
    return near, weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-12)


def exchanged(features: Tensor, names: Sequence[str], group: str, seed: int) -> Tensor:
    """Features (R, C, F) with those of a group permuted between the candidates of each item (permutation importance)."""
    columns = torch.tensor([name.startswith(FEATURE_GROUPS[group]) for name in names])
    order = torch.rand(features.shape[:2], generator=torch.Generator().manual_seed(seed)).argsort(1)
    mixed = features.clone()
    mixed[..., columns] = features.gather(1, order[..., None].expand_as(features))[..., columns]
    return mixed
