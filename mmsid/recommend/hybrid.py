"""Hybrid recommender: generative decoding, retrieval and co-engagement evidence, ranked together by a small model.

The ranker is trained on the last item of every train prefix, held out from the decoder and from all statistics it reads. A share
of the items is hidden from them as well: these stand for new items, so the ranker learns what a score is worth without
interactions. Semantic IDs that were read with behaviour know the held-out interactions, so the decoder of the ranker reads other
codes: known items by their behaviour without those interactions, hidden ones by content, as new items are (`mmsid.sids.readings`).
Decoder and statistics are then fitted on all train prefixes. Valid and test items give no gradients or statistics.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mmsid.accelerator import OneProcess
from mmsid.artifacts import sha256
from mmsid.catalog.item import Item
from mmsid.catalog.splits import Split
from mmsid.errors import MmsidError
from mmsid.progress import track
from mmsid.recommend.classical import item_counts
from mmsid.recommend.coengagement_source import CoEngagementSource
from mmsid.recommend.embedding_source import EmbeddingSource, fit_centroids, unit_rows
from mmsid.recommend.evaluate import Evaluation, Part, evaluate_candidates
from mmsid.recommend.history_batch import HistoryBatch
from mmsid.recommend.path_source import PathSource
from mmsid.recommend.paths import ItemPaths
from mmsid.recommend.ranker import Ranker, fit_rankers, mean_score
from mmsid.recommend.sid_transformer import SidTransformerShape
from mmsid.recommend.sources import PER_SOURCE, Candidates, Sources, term_sources
from mmsid.recommend.training import Fitted, Schedule, fit
from mmsid.recommend.words import Vectorizers, fit_vectorizers
from mmsid.sids.readings import Readings

HIDDEN_SHARE = 0.1  # of the items, as new items for the ranker
MAX_EXAMPLES = 8000  # held-out items that the ranker is trained on
NEW_WEIGHT = 2.5  # of an example whose next item is hidden; with 1, new items rank below plain cosine (docs/experiments/new_items.md)
NEGATIVES = 500  # random items drawn per held-out item
BATCH_SIZE = 64  # histories scored at once


@dataclass(frozen=True)
class FittedHybrid:
    """A trained hybrid recommender, with epochs and best valid NDCG@10 of its decoder and the training time in seconds.

    Attributes:
        vectorizers: of words and labels, which later items are transformed with.
    """

    sources: Sources
    rankers: Sequence[Ranker]
    vectorizers: Vectorizers
    epochs: int
    best: float
    seconds: float

    def ranked(self, histories: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Unseen candidates int64 (B, C), padded with -1, and their scores (B, C), -inf for padding."""
        candidates, scores = rank(self.sources, self.rankers, HistoryBatch(histories, self.sources.num_items))
        return torch.from_numpy(candidates.items), scores

    def evaluate(self, split: Split, part: Part) -> Evaluation:
        """Item-level ranks on one part of the split."""
        return evaluate_candidates(self.ranked, split, part, self.sources.num_items)


def rank(sources: Sources, rankers: Sequence[Ranker], batch: HistoryBatch, per_source: int = PER_SOURCE) -> tuple[Candidates, torch.Tensor]:
    """Candidates of non-empty histories, at most `per_source` of each source, and their scores (B, C), -inf for padding."""
    candidates = sources.propose(batch, per_source)
    features = torch.from_numpy(sources.features(batch, candidates.items))
    lengths = torch.tensor([len(history) for history in batch.histories])
    scores = mean_score(rankers, features, lengths)
    return candidates, scores.masked_fill(torch.from_numpy(candidates.items) < 0, -torch.inf)


def fit_hybrid(
    paths: ItemPaths,
    items: Sequence[Item],
    embeddings: np.ndarray | None,
    split: Split,
    *,
    shape: SidTransformerShape | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
    what: str = "hybrid",
    decoder: Fitted | None = None,
    readings: Readings | None = None,
    hidden_share: float = HIDDEN_SHARE,
) -> FittedHybrid:
    """Train the ranker on held-out items, then decoder and statistics on all train prefixes.

    Early stopping of the first decoder uses some of the held-out items; they give no gradients and no statistics. The
    decoder reads SIDs alone: one that also reads dense embeddings (as in LIGER) ranked no better.

    Args:
        embeddings: (N, D) embeddings in the order of the items, one source of evidence; None: none.
        decoder: a SID transformer trained on all train prefixes of the split; None: it is trained here.
        readings: further readings of the items, in their order; None: the codes of `paths` were made without behaviour.
        hidden_share: share of the items that are hidden while the ranker learns, drawn by content hash.

    Raises:
        MmsidError: no train prefix has two items, so none can be held out; or the loss became NaN.
    """
    started = time.perf_counter()
    settings = {"shape": shape, "schedule": schedule, "seed": seed, "accelerator": OneProcess()}
    vectorizers, words, labels = fit_vectorizers(items)
    content = term_sources(words, labels)
    if embeddings is not None:
        embeddings = unit_rows(embeddings)
    content["embedding"] = None if embeddings is None else EmbeddingSource(embeddings, fit_centroids(embeddings))

    def sources(model: torch.nn.Module, paths: ItemPaths, fitted_on: Split, known: np.ndarray) -> Sources:
        counts = item_counts(fitted_on.train, len(items))
        pairs = CoEngagementSource.fit(fitted_on.train, len(items), fitted_on.train_weights)
        return Sources(path=PathSource(model, paths, known), coengagement=pairs, counts=counts, **content)

    inner = _hold_out_last(split)
    users = np.random.default_rng(seed).permutation(inner.users("valid"))[:MAX_EXAMPLES]
    if not len(users):
        raise MmsidError("no user has two train items, so the ranker has no training examples; give sequences of 4 items or more")
    hidden = hidden_items(items, hidden_share, seed)
    visible = _without(inner, hidden)
    if not any(map(len, visible.train)):  # a tiny catalogue
        hidden, visible = np.zeros(len(items), dtype=bool), inner
    held_out_paths = paths if readings is None else _paths_of_readings(paths, readings, hidden)
    first = _fit_decoder(held_out_paths, visible, ~hidden, what=f"{what}, last train items held out", **settings)
    examples = [(inner.train[user], int(inner.valid[user])) for user in users]
    rankers = _fit_rankers(sources(first.model, held_out_paths, visible, ~hidden), examples, hidden, seed)
    if decoder is None:
        decoder = fit(paths, split, what=what, **settings)
    final = sources(decoder.model, paths, split, np.ones(len(items), dtype=bool))
    return FittedHybrid(final, rankers, vectorizers, decoder.epochs, decoder.best, time.perf_counter() - started)


def hybrid_name(variant: str) -> str:
    """Name of the hybrid recommender of a variant in tables and progress."""
    return f"hybrid ({variant})"


def hidden_items(items: Sequence[Item], share: float, seed: int) -> np.ndarray:
    """(N,) bool: a share of the items, drawn by content hash. Items of equal content are hidden together.

    The hash has a prefix of its own: an evaluation that hides items by (seed, content) would otherwise leave none to hide here.
    """
    draws = np.array([int(sha256(f"ranker:{seed}:{item.content_sha256}")[:12], 16) for item in items], dtype=np.float64)
    return draws / 16.0**12 < share


def _hold_out_last(split: Split) -> Split:
    """The split whose valid items are the last train items, for users with an earlier item and no repetition of the last one."""
    held_out = [rows[-1] if len(rows) > 1 and rows[-1] not in rows[:-1] else -1 for rows in split.train]
    return split.with_train([slice(-1)] * len(split.train), np.array(held_out, dtype=np.int64))


def _without(split: Split, hidden: np.ndarray) -> Split:
    """The split without the hidden items in train and valid."""
    valid = np.where((split.valid >= 0) & ~hidden[split.valid], split.valid, -1)
    return split.with_train([~hidden[rows] for rows in split.train], valid)


def _paths_of_readings(paths: ItemPaths, readings: Readings, hidden: np.ndarray) -> ItemPaths:
    """Paths of the codes that do not know the held-out interactions. A collision suffix, if there is one, stays."""
    tokens = paths.tokens.copy()
    tokens[:, : readings.content.shape[1]] = np.where(hidden[:, None], readings.content, readings.shortened)
    return ItemPaths(tokens, paths.sizes)


def _fit_decoder(paths: ItemPaths, split: Split, known: np.ndarray, **settings: object) -> Fitted:
    """Train a SID transformer on the paths of the known items only. `split` must contain no others in train and valid."""
    row_of = np.cumsum(known) - 1
    train = [row_of[rows] for rows in split.train]
    valid = np.where(split.valid >= 0, row_of[split.valid], -1)
    return fit(ItemPaths(paths.tokens[known], paths.sizes), replace(split, train=train, valid=valid), **settings)


def _fit_rankers(sources: Sources, examples: list[tuple[np.ndarray, int]], hidden: np.ndarray, seed: int) -> list[Ranker]:
    """Train the rankers on (history, next item), with a softmax over the next item and random unseen items.

    Random negatives keep the scores calibrated over all items, unlike negatives drawn from the candidates.
    """
    rng, features, invalid, lengths = np.random.default_rng(seed), [], [], []
    num_items = sources.num_items
    for start in track(range(0, len(examples), BATCH_SIZE), what="evidence", unit="batches"):
        batch = examples[start : start + BATCH_SIZE]
        drawn = np.stack([np.append(item, rng.integers(num_items, size=min(NEGATIVES, num_items))) for _, item in batch])
        histories = HistoryBatch([history for history, _ in batch], num_items)
        features.append(torch.from_numpy(sources.features(histories, drawn)).half())
        seen = np.stack([np.isin(row, np.append(history, item)) for row, (history, item) in zip(drawn, batch, strict=True)])
        seen[:, 0] = False
        invalid.append(torch.from_numpy(seen))
        lengths += map(len, histories.histories)
    weights = torch.tensor([NEW_WEIGHT if hidden[item] else 1.0 for _, item in examples])
    return fit_rankers(torch.cat(features), torch.tensor(lengths), torch.cat(invalid), weights, seed)
