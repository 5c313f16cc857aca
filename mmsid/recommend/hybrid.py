"""Hybrid recommender: generative decoding, retrieval and co-engagement evidence, ranked together by a small model.

The ranker is trained on the last item of every train prefix. These items are held out from the decoder and from the
retrieval statistics that it reads, so it learns how much each source is worth on items they have not seen. Decoder and
statistics are then fitted again on the full train prefixes; the ranker is kept. Valid and test items give no gradients,
statistics or labels; valid only stops the decoder early.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmsid.catalog.items import Item
from mmsid.catalog.splits import Split
from mmsid.errors import MmsidError
from mmsid.progress import track
from mmsid.recommend.evaluate import Evaluation, Part, Score, evaluate, mask_seen, recommender_scores
from mmsid.recommend.evidence import Evidence, ranker_features
from mmsid.recommend.paths import ItemPaths
from mmsid.recommend.sid_transformer import SidTransformerShape
from mmsid.recommend.training import Schedule, fit

CANDIDATES_PER_SOURCE = 100
CANDIDATE_SOURCES = ("path", "near 0.6", "next 0.6", "far 0.85", "words 0.6", "words 0.85", "embedding 0.85", "labels 0.6")
MAX_EXAMPLES = 8000  # held-out items that the ranker is trained on
NEGATIVES = 500  # random items drawn per held-out item
RANKERS = 3  # averaged over seeds: a single ranker varies by about 1 % in NDCG@10
BATCH_SIZE = 64  # histories scored at once; every source holds (B, N) floats


class Ranker(nn.Module):
    """Linear model plus one hidden layer over the standardised features of an item and the log length of the history.

    Args:
        mean, deviation: (F,), of the features.
    """

    def __init__(self, mean: torch.Tensor, deviation: torch.Tensor, hidden: int = 16) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.linear = nn.Linear(len(mean), 1, bias=False)
        self.hidden, self.out = nn.Linear(len(mean) + 1, hidden), nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.out.weight)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Features (B, C, F) and history lengths (B,) -> scores (B, C)."""
        x = (features - self.mean) / self.deviation
        length = lengths.float().log()[:, None, None].expand(*x.shape[:2], 1)
        return (self.linear(x) + self.out(F.gelu(self.hidden(torch.cat([x, length], -1)))))[..., 0]


class Sources:
    """Scores of all items from the decoder and from every source of evidence.

    Args:
        decoder: histories -> log-probability (B, N) of each item's path under the trie.
    """

    def __init__(self, decoder: Score, evidence: Evidence) -> None:
        self.decoder, self.evidence = decoder, evidence

    def __call__(self, histories: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Scores float32 (B, N) by source name."""
        return {"path": self.decoder(list(histories)).cpu().numpy()} | self.evidence(histories)


@dataclass(frozen=True)
class FittedHybrid:
    """A trained hybrid recommender, with epochs and best valid NDCG@10 of its decoder and the training time in seconds."""

    sources: Sources
    rankers: Sequence[Ranker]
    epochs: int
    best: float
    seconds: float

    @torch.no_grad()
    def score(self, histories: list[np.ndarray]) -> torch.Tensor:
        """Scores (B, N) of histories, -inf for items that no source proposes."""
        return torch.cat([self._score(histories[start : start + BATCH_SIZE]) for start in range(0, len(histories), BATCH_SIZE)])

    def _score(self, histories: list[np.ndarray]) -> torch.Tensor:
        scores = self.sources(histories)
        candidates = _candidates(scores, histories)
        features = _gather_features(scores, candidates)
        lengths = torch.tensor([len(history) for history in histories])
        ranked = torch.stack([ranker(features, lengths) for ranker in self.rankers]).mean(0)
        result = torch.full((len(histories), self.sources.evidence.num_items), -torch.inf)
        return result.scatter_(1, torch.from_numpy(candidates), ranked)  # repeated candidates have equal scores

    def evaluate(self, split: Split, part: Part) -> Evaluation:
        """Item-level ranks on one part of the split."""
        return evaluate(self.score, split, part, self.sources.evidence.num_items)


def fit_hybrid(
    paths: ItemPaths,
    items: Sequence[Item],
    embeddings: np.ndarray,
    split: Split,
    *,
    shape: SidTransformerShape | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
    what: str = "hybrid",
) -> FittedHybrid:
    """Train the ranker on held-out items, then decoder and statistics on all train prefixes.

    Early stopping of the first decoder uses some of the held-out items; they give no gradients and no statistics. The
    decoder reads SIDs alone: one that also reads dense embeddings (as in LIGER) ranked no better.

    Args:
        embeddings: (N, D) dense text embeddings of unit norm, in the order of the items. They are one source of evidence.

    Raises:
        MmsidError: no train prefix has two items, so none can be held out; or the loss became NaN.
    """
    started = time.perf_counter()
    common = {"shape": shape, "schedule": schedule, "seed": seed}
    inner = _hold_out_last(split)
    users = np.random.default_rng(seed).permutation(inner.users("valid"))[:MAX_EXAMPLES]
    if not len(users):
        raise MmsidError("no user has two train items, so the ranker has no training examples; give sequences of 4 items or more")
    sources, _, _ = _fit_sources(paths, items, embeddings, inner, common, f"{what}, last train items held out")
    rankers = _fit_rankers(sources, [(inner.train[user], int(inner.valid[user])) for user in users], seed)
    sources, epochs, best = _fit_sources(paths, items, embeddings, split, common, what)
    return FittedHybrid(sources, rankers, epochs, best, time.perf_counter() - started)


def _fit_sources(
    paths: ItemPaths, items: Sequence[Item], embeddings: np.ndarray, split: Split, common: dict[str, Any], what: str
) -> tuple[Sources, int, float]:
    fitted = fit(paths, split, what=what, **common)
    decoder = recommender_scores(fitted.model, fitted.trie, "exact")  # exact: the ranker's random negatives need scores too
    return Sources(decoder, Evidence(items, embeddings, split.train)), fitted.epochs, fitted.best


def _hold_out_last(split: Split) -> Split:
    """The split whose valid items are the last train items, for users with an earlier item and no repetition of the last one."""
    held_out = [rows[-1] if len(rows) > 1 and rows[-1] not in rows[:-1] else -1 for rows in split.train]
    return split.with_train([slice(-1)] * len(split.train), np.array(held_out, dtype=np.int64))


def _gather_features(scores: dict[str, np.ndarray], candidates: np.ndarray) -> torch.Tensor:
    """Ranker features (B, C, F) of candidates (B, C)."""
    return torch.from_numpy(ranker_features({name: np.take_along_axis(values, candidates, 1) for name, values in scores.items()}))


def _fit_rankers(sources: Sources, examples: list[tuple[np.ndarray, int]], seed: int) -> list[Ranker]:
    """Train the rankers on (history, next item), with a softmax over the next item and random unseen items.

    Random negatives keep the scores calibrated over all items, unlike negatives drawn from the candidates.
    """
    rng, features, invalid = np.random.default_rng(seed), [], []
    num_items = sources.evidence.num_items
    for start in track(range(0, len(examples), BATCH_SIZE), what="evidence", unit="batches"):
        batch = examples[start : start + BATCH_SIZE]
        scores = sources([history for history, _ in batch])
        drawn = np.stack([np.append(item, rng.integers(num_items, size=min(NEGATIVES, num_items))) for _, item in batch])
        features.append(_gather_features(scores, drawn).half())
        seen = np.stack([np.isin(row, np.append(history, item)) for row, (history, item) in zip(drawn, batch, strict=True)])
        seen[:, 0] = False
        invalid.append(torch.from_numpy(seen))
    data = torch.cat(features), torch.tensor([len(history) for history, _ in examples]), torch.cat(invalid)
    return [_fit_ranker(*data, seed=RANKERS * seed + number) for number in track(range(RANKERS), what="rankers", unit="rankers")]


def _fit_ranker(features: torch.Tensor, lengths: torch.Tensor, invalid: torch.Tensor, seed: int, epochs: int = 20) -> Ranker:
    """Train one ranker from features (P, 1 + NEGATIVES, F) whose first item is the true one."""
    sample = features[:: max(1, len(features) // 500)].float().flatten(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ranker = Ranker(sample.mean(0), sample.std(0) + 1e-4)
        steps = epochs * math.ceil(len(features) / 256)
        optimizer = torch.optim.AdamW(ranker.parameters(), lr=0.02, weight_decay=0.3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(features)).split(256):
                scores = ranker(features[rows].float(), lengths[rows]).masked_fill(invalid[rows], -torch.inf)
                loss = F.cross_entropy(scores, torch.zeros(len(rows), dtype=torch.long))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
    return ranker.eval()


def _candidates(scores: dict[str, np.ndarray], histories: list[np.ndarray]) -> np.ndarray:
    """Item rows (B, C): the best unseen items of every candidate source. An item may occur several times."""
    best = []
    for name in CANDIDATE_SOURCES:
        unseen = mask_seen(torch.from_numpy(scores[name].copy()), histories)
        best.append(unseen.topk(min(CANDIDATES_PER_SOURCE, unseen.shape[1])).indices)
    return torch.cat(best, 1).numpy()
