"""Sizes shared by the recommenders over Semantic IDs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RecommenderShape:
    """Sizes of a recommender. Each architecture derives its own class and adds its default learning rate `lr`.

    Attributes:
        d_model: width of embeddings and hidden states; a multiple of `heads`.
        layers: transformer layers, in each stack of an encoder-decoder.
        hidden: width inside the feed-forward layers (`SidTransformer`: inside the depth decoder).
        max_history: number of items of a history that are read, the most recent ones.
    """

    d_model: int = 128
    layers: int = 2
    heads: int = 4
    hidden: int = 256
    dropout: float = 0.15
    max_history: int = 20
