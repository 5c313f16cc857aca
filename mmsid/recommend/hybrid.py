"""The grounded recommender: a generative decoder that ranks its beams, and what retrieval proposes, by all that is known of them.

1. The game is played one step earlier: the last item of every train prefix is hidden. The decoder (the instrument, over SIDs
   alone) and the statistics of retrieval (evidence.py) are fitted on what remains.
2. A small ranker learns, from the hidden items, what the decoder's answer and each source of evidence are worth: a linear part and
   one hidden layer over the item's scores and the length of the history, softmax over the hidden item and random others.
   Neither decoder nor statistics were fitted on these items (early stopping of the inner decoder looks at some of them), and they are
   as fresh, and as rarely seen, as those to be predicted later; weights learned on items that were fitted on would trust the decoder's
   memory too much. No gradient, statistic or label comes from valid or test; the final decoder stops early on valid, as all do.
3. Decoder and statistics are fitted again on all train prefixes; the ranker stays.

To recommend, the best items of every source are proposed and ranked together. The decoder reads no dense embeddings: one that did
(after LIGER) ranked no better here, and made random SIDs as good as any (LOG.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmsid.catalog.items import Item
from mmsid.catalog.splits import Split
from mmsid.errors import MmsidError
from mmsid.progress import track
from mmsid.recommend.evaluate import Evaluation, Part, Score, evaluate, recommender_scores
from mmsid.recommend.evidence import Evidence, columns
from mmsid.recommend.paths import ItemPaths
from mmsid.recommend.sid_transformer import SidTransformerShape
from mmsid.recommend.training import Schedule, fit

PROPOSED = 100  # items that each source proposes
PROPOSERS = ("path", "near 0.6", "next 0.6", "far 0.85", "words 0.6", "words 0.85", "meaning 0.85", "labels 0.6")
POSITIONS = 8000  # hidden items that the ranker learns from, at most
OTHERS = 500  # items drawn beside the true one at each position
RANKERS = 3  # of different starts, averaged: one ranker varies by one part in a hundred of NDCG@10
AT_ONCE = 64  # histories scored together: every source holds (B, N) floats


class Ranker(nn.Module):
    """Linear part and one hidden layer over the standardised columns of an item and the log length of the history."""

    def __init__(self, mean: torch.Tensor, deviation: torch.Tensor, hidden: int = 16) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.linear = nn.Linear(len(mean), 1, bias=False)
        self.hidden, self.out = nn.Linear(len(mean) + 1, hidden), nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.out.weight)

    def forward(self, read: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Columns (B, C, F) and history lengths (B,) -> scores (B, C)."""
        x = (read - self.mean) / self.deviation
        length = lengths.float().log()[:, None, None].expand(*x.shape[:2], 1)
        return (self.linear(x) + self.out(F.gelu(self.hidden(torch.cat([x, length], -1)))))[..., 0]


class Sources:
    """Decoder and evidence of one set of histories: every source's scores of all items.

    Args:
        decoder: histories -> log p (B, N) of each item's path under the trie.
    """

    def __init__(self, decoder: Score, evidence: Evidence) -> None:
        self.decoder, self.evidence = decoder, evidence

    def __call__(self, histories: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Source -> (B, N) float32."""
        return {"path": self.decoder(list(histories)).cpu().numpy()} | self.evidence(histories)


@dataclass(frozen=True)
class FittedHybrid:
    """A trained recommender: epochs and best valid NDCG@10 of its decoder, and the seconds that all of it took."""

    sources: Sources
    rankers: Sequence[Ranker]
    epochs: int
    best: float
    seconds: float

    @torch.no_grad()
    def score(self, histories: list[np.ndarray]) -> torch.Tensor:
        """histories -> (B, N); -inf for items that no source proposes."""
        return torch.cat([self._score(histories[start : start + AT_ONCE]) for start in range(0, len(histories), AT_ONCE)])

    def _score(self, histories: list[np.ndarray]) -> torch.Tensor:
        known = self.sources(histories)
        chosen = _proposals(known, histories)
        read = torch.from_numpy(columns({name: np.take_along_axis(values, chosen, 1) for name, values in known.items()}))
        lengths = torch.tensor([len(history) for history in histories])
        scores = torch.stack([ranker(read, lengths) for ranker in self.rankers]).mean(0)
        found = torch.full((len(histories), self.sources.evidence.num_items), -torch.inf)
        return found.scatter_(1, torch.from_numpy(chosen), scores)  # an item proposed twice has one score, written twice

    def evaluate(self, split: Split, part: Part, limit: int | None = None) -> Evaluation:
        """Item-level ranks on one part of the split."""
        return evaluate(self.score, split, part, self.sources.evidence.num_items, limit)


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
    """Train decoder, ranker, and decoder again.

    Args:
        embeddings: (N, D) dense text embeddings of unit length, rows as the items': one of the sources of evidence.

    Raises:
        MmsidError: no train prefix holds two items, so there is none to hide, or the loss became NaN.
    """
    started = time.perf_counter()
    common = {"shape": shape, "schedule": schedule, "seed": seed}
    inner = _one_step_earlier(split)
    users = np.random.default_rng(seed).permutation(inner.users("valid"))[:POSITIONS]
    if not len(users):
        raise MmsidError("no user has two train items, so the ranker has nothing to learn from; give sequences of 4 items or more")
    sources, _, _ = _fit_sources(paths, items, embeddings, inner, common, f"{what}, one step earlier")
    positions = [(inner.train[user], int(inner.valid[user])) for user in users]
    rankers = _fit_rankers(sources, positions, seed)
    sources, epochs, best = _fit_sources(paths, items, embeddings, split, common, what)
    return FittedHybrid(sources, rankers, epochs, best, time.perf_counter() - started)


def _fit_sources(
    paths: ItemPaths, items: Sequence[Item], embeddings: np.ndarray, split: Split, common: dict[str, Any], what: str
) -> tuple[Sources, int, float]:
    fitted = fit(paths, split, what=what, **common)
    # exact, so that what is no beam has a score too: the ranker learns from random items
    decoder = recommender_scores(fitted.model, fitted.trie, "exact")
    return Sources(decoder, Evidence(items, embeddings, split.train)), fitted.epochs, fitted.best


def _one_step_earlier(split: Split) -> Split:
    """The split whose valid items are the last train items, where they are new to the user and something precedes them."""
    hidden = [rows[-1] if len(rows) > 1 and rows[-1] not in rows[:-1] else -1 for rows in split.train]
    return replace(split, train=[rows[:-1] for rows in split.train], valid=np.array(hidden, dtype=np.int64))


def _fit_rankers(sources: Sources, positions: list[tuple[np.ndarray, int]], seed: int) -> list[Ranker]:
    """Softmax of the true item against random unseen ones: unlike proposed ones, they leave the scores right over all items."""
    rng, reads, seen = np.random.default_rng(seed), [], []
    num_items = sources.evidence.num_items
    for start in track(range(0, len(positions), AT_ONCE), what="evidence", unit="batches"):
        part = positions[start : start + AT_ONCE]
        known = sources([history for history, _ in part])
        drawn = np.stack([np.append(item, rng.integers(num_items, size=min(OTHERS, num_items))) for _, item in part])
        reads.append(torch.from_numpy(columns({name: np.take_along_axis(values, drawn, 1) for name, values in known.items()})).half())
        invalid = np.stack([np.isin(row, np.append(history, item)) for row, (history, item) in zip(drawn, part, strict=True)])
        invalid[:, 0] = False
        seen.append(torch.from_numpy(invalid))
    read, invalid = torch.cat(reads), torch.cat(seen)
    lengths = torch.tensor([len(history) for history, _ in positions])
    starts = track(range(RANKERS), what="rankers", unit="rankers")
    return [_fit_ranker(read, lengths, invalid, seed=RANKERS * seed + start) for start in starts]


def _fit_ranker(read: torch.Tensor, lengths: torch.Tensor, invalid: torch.Tensor, seed: int, epochs: int = 20) -> Ranker:
    """One ranker from columns (P, 1 + OTHERS, F) whose first item is the true one."""
    some = read[:: max(1, len(read) // 500)].float().flatten(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ranker = Ranker(some.mean(0), some.std(0) + 1e-4)
        steps = epochs * math.ceil(len(read) / 256)
        optimizer = torch.optim.AdamW(ranker.parameters(), lr=0.02, weight_decay=0.3)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(read)).split(256):
                scores = ranker(read[rows].float(), lengths[rows]).masked_fill(invalid[rows], -torch.inf)
                loss = F.cross_entropy(scores, torch.zeros(len(rows), dtype=torch.long))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
    return ranker.eval()


def _proposals(known: dict[str, np.ndarray], histories: Sequence[np.ndarray]) -> np.ndarray:
    """Item rows (B, C) that some source ranks among its best unseen ones; the same item may stand in several columns."""
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    chosen = []
    for name in PROPOSERS:
        scores = torch.from_numpy(known[name].copy())
        scores[torch.from_numpy(rows), torch.from_numpy(np.concatenate(list(histories)))] = -torch.inf
        chosen.append(scores.topk(min(PROPOSED, scores.shape[1])).indices)
    return torch.cat(chosen, 1).numpy()
