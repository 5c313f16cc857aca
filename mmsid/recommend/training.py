"""Train one recommender on one SID table: all positions of all train prefixes, early stopping on valid NDCG@10."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from pydantic import Field

from mmsid.accelerator import OneProcess, make_accelerator
from mmsid.catalog.splits import Split
from mmsid.config import Section
from mmsid.errors import MmsidError
from mmsid.progress import track
from mmsid.recommend.evaluate import Decoding, Evaluation, Part, Recommender, Score, evaluate, recommender_scores
from mmsid.recommend.flat import FlatRecommender, FlatShape
from mmsid.recommend.history_encoder import pad_histories
from mmsid.recommend.paths import ItemPaths, PathTrie, item_paths
from mmsid.recommend.sid_transformer import SidTransformer, SidTransformerShape
from mmsid.recommend.tiger import TigerRecommender, TigerShape
from mmsid.sids.table import SidTable

Shape = SidTransformerShape | FlatShape | TigerShape


class Schedule(Section):
    """How a recommender is trained. Equal for every arm of a comparison.

    Attributes:
        epochs: at most; the learning rate falls to zero over them (cosine, after `warmup` steps).
        batch_size: users per step over all processes.
        lr: None: the architecture's own (instrument 4e-3, flat 1e-3, tiger 3e-4).
        patience: epochs without a better valid NDCG@10 before stopping; the best epoch's weights are kept.
        stop_users: users that early stopping looks at (a fixed sample by content hash); None: all.
    """

    epochs: int = Field(default=16, gt=0)
    batch_size: int = Field(default=256, gt=0)
    lr: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: int = Field(default=50, ge=0)
    patience: int = Field(default=4, gt=0)
    stop_users: int | None = Field(default=2048, gt=0)


@dataclass(frozen=True)
class Fitted:
    """A trained recommender with its trie, the epochs run, the best valid NDCG@10 seen, and the seconds it took."""

    model: Recommender
    trie: PathTrie
    epochs: int
    best: float
    seconds: float

    @property
    def score(self) -> Score:
        """histories -> (B, N), decoded as is usual for the architecture."""
        return recommender_scores(self.model, self.trie)

    def evaluate(self, split: Split, part: Part, decoding: Decoding = "auto", beam: int = 50, limit: int | None = None) -> Evaluation:
        """Item-level ranks of the model on one part of the split."""
        scores = recommender_scores(self.model, self.trie, decoding, beam)
        return evaluate(scores, split, part, self.trie.node_of.shape[1], limit)


def table_paths(table: SidTable) -> ItemPaths:
    """The paths of a SID table, rows as in the table (align it with the catalogue first)."""
    return item_paths(table.codes, table.suffix, table.codebook_sizes)


def build(paths: ItemPaths, shape: Shape) -> Recommender:
    """An untrained recommender of the architecture that the shape belongs to, weights from torch's generator."""
    if isinstance(shape, FlatShape):
        return FlatRecommender(paths, shape)
    if isinstance(shape, TigerShape):
        return TigerRecommender(paths, shape)
    return SidTransformer(torch.from_numpy(paths.tokens), paths.sizes, torch.from_numpy(paths.decided), shape)


def fit(
    paths: ItemPaths,
    split: Split,
    *,
    shape: Shape | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
    accelerator: Accelerator | OneProcess | None = None,
    what: str = "recommender",
) -> Fitted:
    """Train a recommender.

    Args:
        paths: of all N items, in catalogue order.
        shape: its sizes, and by their type the architecture; default: the instrument.
        accelerator: for several processes; each takes its share of every batch, rank 0 evaluates and decides to stop. `OneProcess`:
            this process trains alone, whatever the others do.

    Raises:
        MmsidError: no user has a train history, or the loss became NaN.
    """
    shape, schedule = shape or SidTransformerShape(), schedule or Schedule()
    accelerator = accelerator or make_accelerator()
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        torch.manual_seed(seed)
        wrapped = accelerator.prepare(build(paths, shape))
        model, trie = accelerator.unwrap_model(wrapped), PathTrie.build(paths, accelerator.device)
        torch.manual_seed(seed + 1_000_003 * accelerator.process_index)  # dropout differs between processes, weights do not
        scores = partial(recommender_scores, model, trie)
        epochs, best = train(wrapped, scores, split, schedule, num_items=len(paths.tokens), seed=seed, accelerator=accelerator, what=what)
    return Fitted(model.eval(), trie, epochs, best, time.perf_counter() - started)


def train(
    wrapped: torch.nn.Module,
    scores: Callable[[], Score],
    split: Split,
    schedule: Schedule,
    *,
    num_items: int,
    seed: int,
    accelerator: Accelerator | OneProcess,
    what: str,
) -> tuple[int, float]:
    """The one training loop of all recommenders; leaves the weights of the best epoch. -> (epochs run, best valid NDCG@10).

    Args:
        wrapped: a prepared module: histories (B, T) -> summed loss over their items; `shape` names its lr and max_history.
        scores: makes the scoring function of the weights as they stand.

    Raises:
        MmsidError: no user has a train history, or the loss became NaN.
    """
    model = accelerator.unwrap_model(wrapped)
    histories = [history for history in split.train if len(history)]
    if not histories:
        raise MmsidError("no user has a train history, so no recommender can be trained; give the catalogue sequences of 3 items or more")
    lr = schedule.lr or model.shape.lr
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=schedule.weight_decay)
    steps = schedule.epochs * math.ceil(len(histories) / schedule.batch_size)
    warmup = min(schedule.warmup, max(1, steps // 10))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    )
    order = np.random.default_rng(seed)
    best, kept, waited, note = -1.0, None, 0, {}
    epoch = 0
    for epoch in track(range(1, schedule.epochs + 1), what=what, unit="epochs", note=note):
        loss = _epoch(wrapped, histories, order.permutation(len(histories)), schedule.batch_size, optimizer, rate, accelerator)
        verdict = [None]
        if accelerator.is_main_process:
            found = evaluate(scores(), split, "valid", num_items, schedule.stop_users).summary()["NDCG@10"]
            verdict = [(found, math.isfinite(loss))]
        # one process judges for all: figures that differ in the last bit must not let the processes part ways
        found, finite = (verdict if accelerator.num_processes == 1 else broadcast_object_list(verdict))[0]
        if not finite:
            raise MmsidError(f"{what}: the loss is {loss} after epoch {epoch}; lower lr (now {lr})")
        note |= {"loss": loss, "valid NDCG@10": found}
        waited += 1
        if found > best:
            best, waited = found, 0
            kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        if waited >= schedule.patience:
            break
    model.load_state_dict(kept)
    return epoch, best


def _epoch(
    wrapped: torch.nn.Module,
    histories: list[np.ndarray],
    order: np.ndarray,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    rate: torch.optim.lr_scheduler.LRScheduler,
    accelerator: Accelerator | OneProcess,
) -> float:
    """One pass; the mean negative log-likelihood per item (of this process's share), in nats."""
    wrapped.train()
    window = accelerator.unwrap_model(wrapped).window
    total, count = 0.0, 0
    for start in range(0, len(order), batch_size):
        users = order[start : start + batch_size]
        positions = sum(min(len(histories[user]), window) for user in users)
        mine = users[accelerator.process_index :: accelerator.num_processes]
        batch = pad_histories([histories[user] for user in mine], window).to(accelerator.device)
        optimizer.zero_grad(set_to_none=True)
        loss = wrapped(batch)
        # gradients are averaged over processes, so each share is weighted by the whole batch's positions
        accelerator.backward(loss * (accelerator.num_processes / positions))
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        rate.step()
        total += float(loss.detach())
        count += int((batch >= 0).sum())
    return total / max(1, count)
