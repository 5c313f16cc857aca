"""Term sources of the hybrid recommender: similarity of words and of labels, with an inverted index for proposals.

In a large catalogue the proposals read a user's heaviest terms and the head of each posting list. Scores are always exact.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from mmsid.recommend.history_batch import HistoryBatch
from mmsid.recommend.sparse_rows import heaviest

EXACT_UP_TO = 20_000  # items: below, proposals read all terms and all postings
HEAVIEST = 64  # terms of a user that the proposals read in a larger catalogue
POSTINGS = 1024  # items per posting list in a larger catalogue, those with the largest weights


class TermSource:
    """Scores and proposals by the inner product of recency-weighted term vectors.

    Args:
        name: prefix of the names of scores and proposals, "words" or "labels".
        vectors: (N, V), rows of norm one or zero.
        decays: of the history weights, one score each.
        proposing: those of them that propose items.
    """

    def __init__(self, name: str, vectors: sparse.csr_matrix, decays: tuple[float, ...], proposing: tuple[float, ...]) -> None:
        self.name, self.vectors, self.decays, self.proposing = name, vectors, decays, proposing
        self.base = vectors.shape[0]
        self.exact = self.base <= EXACT_UP_TO
        self.segments = [self._postings(vectors)]

    def add(self, vectors: sparse.csr_matrix) -> None:
        """Append items (M, V). They have an inverted index of their own, so that the proposals among the others do not change."""
        self.vectors = sparse.vstack([self.vectors, vectors], format="csr")
        self.segments = [self.segments[0], self._postings(self.vectors[self.base :])]

    def propose(self, batch: HistoryBatch, count: int) -> dict[str, np.ndarray]:
        """Proposed items (B, count) by source name, best first, padded with -1."""
        found = {}
        for decay in self.proposing:
            profile = self._profile(batch, decay)
            profile = profile if self.exact else heaviest(profile, HEAVIEST)
            scores = sparse.hstack([profile @ postings for postings in self.segments], format="csr")
            found[f"{self.name} {decay}"] = batch.best(scores, count)
        return found

    def scores(self, batch: HistoryBatch, items: np.ndarray) -> dict[str, np.ndarray]:
        """Scores float32 (B, C) of items (B, C) by source name."""
        found = np.zeros((len(self.decays), *items.shape), dtype=np.float32)
        profiles = [self._profile(batch, decay) for decay in self.decays]
        dense = np.zeros((self.vectors.shape[1], len(self.decays)), dtype=np.float32)  # profiles of one user
        for user, row in enumerate(items):
            parts = [slice(profile.indptr[user], profile.indptr[user + 1]) for profile in profiles]
            for column, (profile, part) in enumerate(zip(profiles, parts, strict=True)):
                dense[profile.indices[part], column] = profile.data[part]
            found[:, user] = (self.vectors[row] @ dense).T
            for profile, part in zip(profiles, parts, strict=True):
                dense[profile.indices[part]] = 0
        return {f"{self.name} {decay}": found[place] for place, decay in enumerate(self.decays)}

    def _profile(self, batch: HistoryBatch, decay: float) -> sparse.csr_matrix:
        unlisted = None if batch.unlisted is None else getattr(batch.unlisted, self.name)
        return batch.memo((self.name, decay), lambda: batch.weighted_sum(decay, self.vectors, unlisted).tocsr())

    def _postings(self, vectors: sparse.csr_matrix) -> sparse.csr_matrix:
        """Inverted index (V, n) of the items of `vectors` (n, V)."""
        postings = vectors.T.tocsr()
        return postings if self.exact else heaviest(postings, POSTINGS)
