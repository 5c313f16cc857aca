"""Sources of the hybrid recommender together: which items they propose for a history, and the features of any item.

Proposals are at most a hundred items per source. Features are exact for any pair of user and item, so that the ranker can be
trained on random items. Nothing has the shape (users, items).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from scipy import sparse

from mmsid.recommend.coengagement_source import CoEngagementSource
from mmsid.recommend.embedding_source import EmbeddingSource
from mmsid.recommend.history_batch import HistoryBatch
from mmsid.recommend.path_source import PathSource
from mmsid.recommend.term_source import TermSource

PER_SOURCE = 100
COUNT_SCORES = ("near", "next", "far", "basket")  # sparse and heavy-tailed


class Source(Protocol):
    """One source of candidates and scores."""

    def propose(self, batch: HistoryBatch, count: int) -> dict[str, np.ndarray]:
        """Proposed items (B, count) by source name, best first, padded with -1."""

    def scores(self, batch: HistoryBatch, items: np.ndarray) -> dict[str, np.ndarray]:
        """Scores (B, C) of items (B, C) by score name."""


class Candidates(NamedTuple):
    """Candidates of B users, distinct and in ascending order of rows.

    Attributes:
        items: int64 (B, C), padded with -1.
        ranks: int16 (B, C, S), rank of the item in each source's proposals, from 0; -1 where the source does not propose it.
        names: of the S sources.
    """

    items: np.ndarray
    ranks: np.ndarray
    names: tuple[str, ...]


@dataclass
class Sources:
    """All sources over one catalogue of N rows.

    Attributes:
        embedding: None without embeddings.
        counts: (N,) interactions of each item in the train histories.
    """

    path: PathSource
    coengagement: CoEngagementSource
    words: TermSource
    labels: TermSource
    embedding: EmbeddingSource | None
    counts: np.ndarray

    @property
    def num_items(self) -> int:
        """Number of rows N."""
        return len(self.counts)

    @property
    def parts(self) -> list[Source]:
        """The sources that propose."""
        return [part for part in (self.path, self.coengagement, self.words, self.labels, self.embedding) if part is not None]

    def propose(self, batch: HistoryBatch, count: int = PER_SOURCE) -> Candidates:
        """The union of the proposals of all sources."""
        proposed = {name: items for part in self.parts for name, items in part.propose(batch, count).items()}
        return _union(proposed)

    def features(self, batch: HistoryBatch, items: np.ndarray) -> np.ndarray:
        """Features float32 (B, C, F) of items int64 (B, C); padding (-1) gets those of row 0."""
        rows = np.maximum(items, 0)
        scores = {name: values for part in self.parts for name, values in part.scores(batch, rows).items()}
        counts = self.counts[rows]
        return to_features(scores | {"popularity": np.log1p(counts), "new": counts == 0})

    def add(self, tokens: np.ndarray, words: sparse.csr_matrix, labels: sparse.csr_matrix, embeddings: np.ndarray | None) -> None:
        """Append M items: their paths (M, D), term vectors (M, V) and embeddings (M, E). They have no interactions."""
        self.path.add(tokens)
        self.words.add(words)
        self.labels.add(labels)
        if self.embedding is not None:
            self.embedding.add(embeddings)
        self.counts = np.concatenate([self.counts, np.zeros(len(tokens), dtype=self.counts.dtype)])

    def feature_names(self) -> list[str]:
        """Names of the F features, in their order."""
        batch = HistoryBatch([np.zeros(1, np.int64)], self.num_items)
        names = [name for part in self.parts for name in part.scores(batch, np.zeros((1, 1), np.int64))]
        names = [name for score in names for name in ((f"log {score}", f"root {score}") if score.startswith(COUNT_SCORES) else (score,))]
        return [*names, "popularity", "new"]


def term_sources(words: sparse.csr_matrix, labels: sparse.csr_matrix) -> dict[str, TermSource]:
    """The two term sources from the vectors (N, V) of words and labels."""
    return {
        "words": TermSource("words", words, (0.0, 0.3, 0.6, 0.85), (0.6, 0.85)),
        "labels": TermSource("labels", labels, (0.0, 0.6), (0.6,)),
    }


def to_features(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Features float32 (..., F) of the ranker. Scores made of counts enter by logarithm and by root, all others unchanged."""
    features = []
    for name, values in scores.items():
        if name.startswith(COUNT_SCORES):
            features += [np.log1p(1000 * np.maximum(values, 0)) / 3, np.sqrt(100 * np.maximum(values, 0))]
        else:
            features.append(values)
    return np.stack(features, -1).astype(np.float32)


def _union(proposed: Mapping[str, np.ndarray]) -> Candidates:
    rows: Sequence[np.ndarray] = np.stack(list(proposed.values()), 1)  # (B, S, count)
    found = []
    for sources in rows:
        source, rank = np.nonzero(sources >= 0)
        items, place = np.unique(sources[source, rank], return_inverse=True)
        ranks = np.full((len(items), len(proposed)), -1, dtype=np.int16)
        ranks[place, source] = rank
        found.append((items, ranks))
    width = max(1, max((len(items) for items, _ in found), default=0))
    items = np.full((len(found), width), -1, dtype=np.int64)
    ranks = np.full((len(found), width, len(proposed)), -1, dtype=np.int16)
    for user, (own, own_ranks) in enumerate(found):
        items[user, : len(own)], ranks[user, : len(own)] = own, own_ranks
    return Candidates(items, ranks, tuple(proposed))
