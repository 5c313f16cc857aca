"""Training of a recommender on one SID table: all positions of all train prefixes, early stopping on valid NDCG@10."""

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
from mmsid.recommend.evaluate import Evaluation, Part, Recommender, Score, evaluate, recommender_scores
from mmsid.recommend.flat import FlatRecommender, FlatShape
from mmsid.recommend.history_encoder import pad_histories, pad_weights
from mmsid.recommend.paths import ItemPaths, PathTrie, item_paths
from mmsid.recommend.sid_transformer import SidTransformer, SidTransformerShape
from mmsid.recommend.tiger import TigerRecommender, TigerShape
from mmsid.sids.table import SidTable

Shape = SidTransformerShape | FlatShape | TigerShape
_ARCHITECTURES = {SidTransformerShape: SidTransformer, FlatShape: FlatRecommender, TigerShape: TigerRecommender}


class Schedule(Section):
    """Training schedule of a recommender, the same for every method of a comparison.

    Attributes:
        epochs: maximum number of epochs; the learning rate decays to zero over them (cosine).
        batch_size: users per step over all processes.
        lr: None uses the default of the architecture (sid_transformer 4e-3, flat 1e-3, tiger 3e-4).
        weight_decay: of AdamW.
        warmup: steps of linear warm-up, at most a tenth of all steps.
        patience: epochs without a better valid NDCG@10 before training stops; the best epoch's weights are kept.
        stop_users: valid users evaluated for early stopping (a fixed sample by content hash); None: all.
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
    """A trained recommender with its trie, the epochs run, the best valid NDCG@10 and the training time in seconds."""

    model: Recommender
    trie: PathTrie
    epochs: int
    best: float
    seconds: float

    @property
    def score(self) -> Score:
        """Scoring function with the default decoding of the architecture: histories -> (B, N)."""
        return recommender_scores(self.model, self.trie)

    def evaluate(self, split: Split, part: Part, beam: int = 50, limit: int | None = None) -> Evaluation:
        """Item-level ranks of the model on one part of the split."""
        scores = recommender_scores(self.model, self.trie, beam=beam)
        return evaluate(scores, split, part, self.trie.num_items, limit, sids=self.trie.node_of[-1])


def table_paths(table: SidTable) -> ItemPaths:
    """Paths of the rows of a SID table. Align the table with the catalogue first."""
    return item_paths(table.codes, table.suffix, table.codebook_sizes)


def build(paths: ItemPaths, shape: Shape, trie: PathTrie | None = None) -> Recommender:
    """An untrained recommender of the shape's architecture, initialised from torch's global generator.

    Args:
        trie: trie that training normalises over, on the device of the model. None: the trie of all items.
    """
    return _ARCHITECTURES[type(shape)](paths, shape, trie)


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

    At each node of the trie, training normalises over the children that lead to a warm item, decoding over all children. So an item
    without train interactions is in no denominator of the loss, and training never makes its codes less likely.

    Args:
        paths: of all N items, in catalogue order.
        shape: sizes of the recommender; their type selects the architecture. Default: the SID transformer.
        accelerator: with several processes, each takes its share of every batch, and rank 0 evaluates and decides when to stop.
            `OneProcess` trains in this process alone.
        what: label of the progress bar.

    Raises:
        MmsidError: no user has a train history, or the loss became NaN.
    """
    shape, schedule = shape or SidTransformerShape(), schedule or Schedule()
    accelerator = accelerator or make_accelerator()
    started = time.perf_counter()
    warm = PathTrie.build(paths, accelerator.device, np.unique(np.concatenate(train_histories(split))))
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        torch.manual_seed(seed)
        wrapped = accelerator.prepare(build(paths, shape, warm))
        model, trie = accelerator.unwrap_model(wrapped), PathTrie.build(paths, accelerator.device)
        torch.manual_seed(seed + 1_000_003 * accelerator.process_index)  # processes share the weights but not the dropout masks
        scores = partial(recommender_scores, model, trie)
        epochs, best = train(wrapped, scores, split, schedule, num_items=len(paths.tokens), seed=seed, accelerator=accelerator, what=what)
    return Fitted(model.eval(), trie, epochs, best, time.perf_counter() - started)


def train_histories(split: Split) -> list[np.ndarray]:
    """Train histories with at least one item.

    Raises:
        MmsidError: no user has one.
    """
    histories = [history for history in split.train if len(history)]
    if not histories:
        raise MmsidError("no user has a train history, so no recommender can be trained; give the catalogue sequences of 3 items or more")
    return histories


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
    """Training loop of all recommenders. Restores the weights of the best epoch.

    Args:
        wrapped: a prepared module, histories (B, T), and their event weights if there are any -> loss summed over their items, with
            attributes `shape` and `window`.
        scores: returns the scoring function of the current weights.

    Returns:
        The number of epochs run and the best valid NDCG@10.

    Raises:
        MmsidError: no user has a train history, or the loss became NaN.
    """
    model = accelerator.unwrap_model(wrapped)
    histories = train_histories(split)
    weights = None if split.train_weights is None else [each for each in split.train_weights if len(each)]
    lr = schedule.lr or model.shape.lr
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=schedule.weight_decay)
    steps = schedule.epochs * math.ceil(len(histories) / schedule.batch_size)
    warmup = min(schedule.warmup, max(1, steps // 10))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    )
    rng = np.random.default_rng(seed)
    best, best_state, epochs_without_gain, note = -1.0, None, 0, {}
    epoch = 0
    for epoch in track(range(1, schedule.epochs + 1), what=what, unit="epochs", note=note):
        loss = _epoch(wrapped, histories, weights, rng.permutation(len(histories)), schedule.batch_size, optimizer, scheduler, accelerator)
        verdict = [None]
        if accelerator.is_main_process:
            found = evaluate(scores(), split, "valid", num_items, schedule.stop_users).summary()["NDCG@10"]
            verdict = [(found, math.isfinite(loss))]
        # rank 0 decides for all processes: their own figures may differ in the last bit
        found, finite = (verdict if accelerator.num_processes == 1 else broadcast_object_list(verdict))[0]
        if not finite:
            raise MmsidError(f"{what}: the loss is {loss} after epoch {epoch}; lower lr (now {lr})")
        note |= {"loss": loss, "valid NDCG@10": found}
        epochs_without_gain += 1
        if found > best:
            best, epochs_without_gain = found, 0
            best_state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        if epochs_without_gain >= schedule.patience:
            break
    model.load_state_dict(best_state)
    return epoch, best


def _epoch(
    wrapped: torch.nn.Module,
    histories: list[np.ndarray],
    weights: list[np.ndarray] | None,
    order: np.ndarray,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    accelerator: Accelerator | OneProcess,
) -> float:
    """Train for one epoch. -> mean negative log-likelihood per item of this process's share, weighted by `weights`, in nats."""
    wrapped.train()
    window = accelerator.unwrap_model(wrapped).window
    total, count = 0.0, 0.0
    for start in range(0, len(order), batch_size):
        users = order[start : start + batch_size]
        size = sum(min(len(histories[user]), window) if weights is None else float(weights[user][-window:].sum()) for user in users)
        share = users[accelerator.process_index :: accelerator.num_processes]
        batch = pad_histories([histories[user] for user in share], window).to(accelerator.device)
        optimizer.zero_grad(set_to_none=True)
        factors = () if weights is None else (pad_weights([weights[user] for user in share], window).to(accelerator.device),)
        loss = wrapped(batch, *factors)
        # gradients are averaged over processes, so each share is divided by the positions, or their weights, of the whole batch
        accelerator.backward(loss * (accelerator.num_processes / size))
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        total += float(loss.detach())
        count += float(factors[0].sum()) if factors else int((batch >= 0).sum())
    return total / (count or 1)
