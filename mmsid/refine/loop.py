"""The refinement loop: groups of paths, leave-one-out advantages, a few PPO epochs per round, exact KL to the frozen start.

Each round scores the paths of a random half of the items against the current greedy codes of all other items, then takes clipped steps.
With several processes, all draw the same samples, each computes the gradient of its share of every minibatch, and the gradients are
summed: the codes are those of one process up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from mmsid.config import Section
from mmsid.errors import MmsidError
from mmsid.progress import track
from mmsid.refine import ppo
from mmsid.refine.early_stopping import MonitoredMetric, table_figures
from mmsid.refine.evidence import Codes, Floats
from mmsid.refine.policy import BATCH, ROUNDING, PathTree, Reference

# rows (R,), candidates (R, C, L), current codes of all items (N, L) -> components (R, C), higher is better, finite
Scorer = Callable[[NDArray, Codes, Codes], dict[str, Floats]]
Describe = Callable[[int, Codes], dict[str, Any]]  # round, raw codes (N, L) -> further figures for the log

MOST_MOVING = 2048  # items per round: the target of the KL ends rounds of more items before all are read


class Policy(Protocol):
    """A trainable distribution over the paths of every item."""

    parameters: Sequence[Tensor]

    def tree(self, rows: Tensor, table: Codes) -> PathTree:
        """Path trees of item rows (R,), given the current codes of all items (N, L)."""

    def log_prob(self, rows: Tensor, tree: PathTree) -> Tensor:
        """(B,) item rows and their trees -> (B, P) log-probabilities, with gradient."""

    def greedy(self) -> Codes:
        """Argmax codes of all items, (N, L)."""


class LoopConfig(Section):
    """Policy optimisation. The ratio is joint over the levels of a path; KL is KL(policy || reference) over the item's tree.

    Attributes:
        rounds: largest number of rounds; step_kl and the learning rate fall linearly over them.
        group: paths scored per item and round.
        epochs: passes over the paths of a round, at most; `step_kl` may end them earlier.
        batch: items per minibatch, over all processes; a group is never split.
        lr: learning rate of the first round.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        kl: coefficient of the exact KL to the reference. Above 0, items move only as far as their reward pays for it.
        moving: share of the items that are optimised per round, at most 2,048 items: only their trees are held.
        grad_norm: maximum norm of the gradient.
        step_kl: target of KL(old || new) of the first round, in nats. Epochs end at 1.5 times the target of their round. The learning rate
            rises by half after a round below half of it and is halved after one above twice of it; a round beyond 4 times is undone.
        patience: the run ends and keeps the start when the monitored metric, averaged over so many rounds, is not above its value at the
            start; 0: never. It does not end at its peak, because later levels still improve when the first, which it reads, no longer does.
        checkpoint_every: rounds between checkpoints.
        weights: weight of every reward component (see `mmsid.refine.evidence`).
    """

    execution_keys: ClassVar[tuple[str, ...]] = ("checkpoint_every",)

    rounds: int = 60
    group: int = 24
    epochs: int = 3
    batch: int = 256
    lr: float = 1e-4
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl: float = 0.0
    moving: float = 0.5
    grad_norm: float = 1.0
    step_kl: float = 1.0
    patience: int = Field(20, ge=0)
    checkpoint_every: int = Field(5, ge=1)
    weights: dict[str, float] = Field(default={"sid_reward": 1.0, "neighbours": 1.0, "codes": 1.0, "balance": 1.5, "crowding": 0.7})


class Refinement:
    """State and rounds of one refinement run: policy, optimiser, running scales, random generators, monitored metric.

    Subclasses change the estimator by overriding `draw_paths`, `advantages` and `gain`. `samples_policy` tells whether the paths are
    samples of the policy, so that its KL can be estimated from them.

    Args:
        policy: trained in place.
        reference: the frozen start.
        scorer: reward components of candidates.
        accelerator: device and processes.
        quality: (N,) factors of the advantages, one per item.
        metric: held-out metric of raw codes for early stopping; it must not be part of the reward.
        describe: further figures for the log, computed on rank 0.
    """

    samples_policy = True

    def __init__(
        self,
        policy: Policy,
        reference: Reference,
        scorer: Scorer,
        config: LoopConfig,
        accelerator: Accelerator,
        seed: int = 0,
        quality: NDArray | None = None,
        metric: MonitoredMetric | None = None,
        describe: Describe | None = None,
    ) -> None:
        self.policy, self.reference, self.scorer = policy, reference, scorer
        self.config, self.accelerator, self.metric, self.describe = config, accelerator, metric, describe
        self.items = len(reference.greedy)
        self.quality = torch.ones(self.items, 1) if quality is None else torch.as_tensor(quality, dtype=torch.float32)[:, None]
        # a large epsilon keeps Adam from scaling rounding noise up to full steps where the gradient is zero
        self.optimizer = torch.optim.Adam([{"params": [weight]} for weight in policy.parameters], lr=config.lr, eps=1e-6)
        self.scale = ppo.RunningScale()
        self.generator = torch.Generator().manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.skipped, self.step_kl, self.lr = 0, config.step_kl, config.lr
        self.next_round, self.ended = 0, False
        self.start_weights = [weight.detach().clone() for weight in policy.parameters]
        self.monitored: list[float] = []  # metric of the start and of every round

    def run(self, log: Callable[[dict[str, Any]], None], save: Callable[[Refinement], None] | None = None) -> Codes:
        """Run the rounds from `next_round` on and return the greedy codes (N, L).

        Args:
            log: called with one flat record per round.
            save: called every `checkpoint_every` rounds and after the last one (`checkpoint.save_state`).

        Raises:
            MmsidError: the gradient was not finite in three steps, or a weight names no component.
        """
        table, note = self.policy.greedy(), {}
        if self.next_round == 0 and self.metric is not None:
            self.monitored = [self.metric(table)]
        rounds = range(self.next_round, 0 if self.ended else self.config.rounds)
        for number in track(rounds, what="refine", unit="rounds", note=note):
            record = {"round": number, **self.round(table)}
            before, table = table, self.policy.greedy()
            record |= table_figures(table, self.reference.head.codebook_size, before, self.reference.greedy)
            reason = None
            if self.metric is not None:
                record["monitored"] = self.metric(table)
                self.monitored.append(record["monitored"])
                reason = self._without_gain()
            if self.describe is not None and self.accelerator.is_main_process:
                record |= self.describe(number, table)
            self.next_round, self.ended = number + 1, reason is not None
            log(record | ({"stopped": reason} if reason else {}))
            note |= {key: record[key] for key in ("reward", "kl", "monitored", "churn", "collisions") if key in record}
            last = self.ended or self.next_round == self.config.rounds
            if save is not None and (last or self.next_round % self.config.checkpoint_every == 0):
                save(self)
            if self.ended:
                break
        if not self.ended:
            return table
        self._restore(self.start_weights)
        return self.policy.greedy()

    def draw_paths(self, log_prob: Tensor) -> Tensor:
        """Path indices (R, G) to score, from the policy's log-probabilities (R, P) on the CPU."""
        return ppo.sample_groups(log_prob, self.config.group, self.generator)

    def advantages(self, rewards: Tensor) -> Tensor:
        """Advantages (R, G) of the scaled rewards (R, G)."""
        return ppo.leave_one_out(rewards)

    def gain(self, new: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        """Objective per item, to be maximised: log-probabilities of the drawn paths and their advantages, (B, G) each -> (B,)."""
        return ppo.surrogate(new, old, advantages, self.config.clip_low, self.config.clip_high).mean(dim=1)

    def mean_reward(self, rewards: Tensor, log_prob: Tensor) -> float:
        """Mean of rewards (R, G) for the log; `log_prob` (R, P) is the policy that the paths were drawn from."""
        return float(rewards.mean())

    def _annealed(self, number: int) -> float:
        """Factor of step_kl and learning rate in a round."""
        return 1 - number / self.config.rounds

    def _without_gain(self) -> str | None:
        """Reason to end the run, if the monitored metric has gained nothing."""
        start, recent = self.monitored[0], self.monitored[1:][-self.config.patience :]
        if not self.config.patience or len(recent) < self.config.patience or np.mean(recent) > start:
            return None
        return f"the monitored metric is {np.mean(recent):.4f} on average of {len(recent)} rounds and was {start:.4f} at the start"

    def _restore(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for weight, old in zip(self.policy.parameters, weights, strict=True):
                weight.copy_(old)

    def round(self, table: Codes) -> dict[str, Any]:
        """Draw, score and optimise once against the current codes (N, L); returns the figures of the round."""
        config, device = self.config, self.accelerator.device
        self.step_kl = config.step_kl * self._annealed(self.next_round)
        if self.next_round:
            self.lr *= self._annealed(self.next_round) / self._annealed(self.next_round - 1)
        moving = np.sort(self.rng.permutation(self.items)[: min(MOST_MOVING, max(1, round(config.moving * self.items)))])
        rows = torch.as_tensor(moving, device=device)
        tree = self.policy.tree(rows, table)
        old_all = self._log_prob(rows, tree)
        picks = self.draw_paths(old_all.cpu())
        rewards, record = self._rewards(self.scorer(moving, tree.paths(picks), table), old_all.cpu())
        advantages = self.advantages(rewards) * self.quality[moving]
        old = old_all.gather(1, picks.to(device))
        before = [weight.detach().clone() for weight in self.policy.parameters]
        figures = self._optimise(rows, tree, old_all, picks.to(device), old, advantages.float().to(device))
        figures |= self._adapt(figures["round_kl"], before)
        if figures["undone"]:
            figures["kl"] = float(ppo.exact_kl(old_all, tree.log_prob).mean())
        return record | figures

    def _rewards(self, parts: dict[str, Floats], old_all: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Weighted sum (R, G) of the scaled components, and the unscaled mean of each component for the log."""
        rewards, record = torch.zeros(next(iter(parts.values())).shape, dtype=torch.float64), {}
        for name, weight in self.config.weights.items():
            if name not in parts:
                raise MmsidError(f"refine.loop.weights names {name!r}; the components of the reward are {', '.join(parts)}")
            if weight != 0.0:
                part = torch.as_tensor(parts[name], dtype=torch.float64)
                record[f"reward_{name}"] = self.mean_reward(part, old_all)
                rewards = rewards + weight * self.scale(name, part)
        return rewards, record | {"zero_variance_groups": ppo.zero_variance_share(rewards), "reward": self.mean_reward(rewards, old_all)}

    def _adapt(self, moved: float, before: list[Tensor]) -> dict[str, Any]:
        """Keep the KL `moved` of a round near `step_kl`, and undo a round that exceeds four times that.

        The effect of a learning rate depends on the size of a policy's states and on its temperatures, which differ between tokenizers by
        orders of magnitude.
        """
        config = self.config
        undone = not moved <= 4 * self.step_kl  # NaN is undone too
        if undone:
            self._restore(before)
            self.optimizer.state.clear()
        factor = 0.25 if undone else 0.5 if moved > 2 * self.step_kl else 1.5 if 0 < moved < 0.5 * self.step_kl else 1.0
        self.lr = min(max(self.lr * factor, config.lr * 1e-4), config.lr * 30)
        return {"undone": undone, "lr": self.lr}

    @torch.no_grad()
    def _log_prob(self, rows: Tensor, tree: PathTree) -> Tensor:
        """Log-probabilities (R, P) of the current policy, in pieces."""
        places = torch.arange(len(rows), device=rows.device)
        return torch.cat([self.policy.log_prob(rows[piece], tree.take(piece)) for piece in places.split(BATCH)])

    def _optimise(self, rows: Tensor, tree: PathTree, old_all: Tensor, picks: Tensor, old: Tensor, advantages: Tensor) -> dict[str, Any]:
        """`epochs` passes over the groups (first axis R of every argument); ends before a step that would exceed the KL limit."""
        config, clipped, steps, epochs, stopped = self.config, [], 0, 0, False
        for _ in range(config.epochs):
            epochs += 1
            for chosen in np.array_split(self.rng.permutation(len(rows)), max(1, math.ceil(len(rows) / config.batch))):
                batch = torch.as_tensor(chosen, device=rows.device)
                own = batch[self.accelerator.process_index :: self.accelerator.num_processes]
                loss, sums = self._loss(
                    rows[own], tree.take(own), old_all[own], picks[own], old[own], advantages[own], len(batch), first=steps == 0
                )
                sums = self.accelerator.reduce(sums, reduction="sum")
                approximate, kl, clip_share, signal = (float(value) / len(batch) for value in sums)
                if steps and approximate > 1.5 * self.step_kl:
                    stopped = True
                    break
                clipped.append(clip_share)
                if signal == 0.0 and (kl < 1e-6 or config.kl == 0.0):
                    continue  # the gradient is zero: a step could only amplify rounding noise
                self._step(loss)
                steps += 1
            if stopped:
                break
        now = self._log_prob(rows, tree)
        levels = ppo.level_entropies(now, tree.branching).mean(0)
        log_ratios = ppo.log_ratio(now.gather(1, picks), old)
        round_kl = float(ppo.exact_kl(old_all, now).mean())
        return {
            "steps": steps,
            "epochs": epochs,
            "stopped_early": stopped,
            "clip_fraction": float(np.mean(clipped)),
            "log_ratio_mean": float(log_ratios.mean()),
            "log_ratio_max": float(log_ratios.abs().max()),
            # KL(old || new) of the round: estimated from the samples, and exact over all paths
            "approximate_kl": float(ppo.approximate_kl(now.gather(1, picks), old).mean()) if self.samples_policy else round_kl,
            "round_kl": round_kl,
            "kl": float(ppo.exact_kl(now, tree.log_prob).mean()),
            "skipped_steps": self.skipped,
            **{f"entropy_{level + 1}": float(value) for level, value in enumerate(levels)},
        }

    def _loss(
        self, rows: Tensor, tree: PathTree, old_all: Tensor, picks: Tensor, old: Tensor, advantages: Tensor, size: int, first: bool
    ) -> tuple[Tensor, Tensor]:
        """Loss summed over the rows and divided by `size`; sums of KL(old || new), KL to the reference, clip fraction, |advantage|."""
        config = self.config
        new_all = self.policy.log_prob(rows, tree)
        rounding = getattr(self.policy, "rounding", ROUNDING)
        if first and not torch.allclose(new_all.detach(), old_all, rtol=rounding / 20, atol=rounding):
            difference = float((new_all.detach() - old_all).abs().max())
            raise MmsidError(
                f"the policy scores its own samples differently in the first step, by {difference:.3g} "
                f"nats where rounding explains {rounding}: dropout or a mask differs; this is a bug"
            )
        new = new_all.gather(1, picks)
        gain = self.gain(new, old, advantages)
        kl = ppo.exact_kl(new_all, tree.log_prob)
        loss = (-gain + config.kl * kl).sum() / size
        with torch.no_grad():
            clipped = ppo.clip_fraction(ppo.log_ratio(new, old), config.clip_low, config.clip_high).sum()
            distance = ppo.approximate_kl(new, old).mean(1).sum() if self.samples_policy else ppo.exact_kl(old_all, new_all).sum()
            return loss, torch.stack([distance, kl.sum(), clipped, advantages.abs().sum()])

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if self.accelerator.num_processes > 1:
            parameters = self.policy.parameters
            shares = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in parameters]
            total = self.accelerator.reduce(torch.cat([share.flatten() for share in shares]), reduction="sum")
            for weight, piece in zip(parameters, total.split([weight.numel() for weight in parameters]), strict=True):
                weight.grad = piece.view_as(weight)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters, self.config.grad_norm)
        if not bool(torch.isfinite(norm)):
            self.skipped += 1
            if self.skipped >= 3:
                raise MmsidError(f"the gradient was not finite in {self.skipped} steps; lower refine.loop.lr (now {self.config.lr})")
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
