"""The refinement loop: groups of sampled paths, leave-one-out advantages, a few PPO epochs per round, exact KL to the frozen start.

One round: everybody's greedy codes become the table; a random half of the items draws G paths each; every path is scored against the
table of the others (so that of two colliding items not both leave); the policy takes a few clipped steps on those groups.

Several processes: all draw the same samples from the same seed, each computes the gradient of its share of every minibatch, and the
gradients are added up. Hence the same codes as one process, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from mmsid.config import Section
from mmsid.errors import MmsidError
from mmsid.progress import track
from mmsid.refine import ppo
from mmsid.refine.early_stopping import MonitoredMetric, table_figures
from mmsid.refine.evidence import Codes, Floats
from mmsid.refine.policy import BATCH, Reference

# rows (R,), candidates (R, C, L), everybody's codes (N, L) -> components (R, C), higher is better, finite
Scorer = Callable[[NDArray, Codes, Codes], dict[str, Floats]]
Describe = Callable[[int, Codes], dict[str, Any]]  # round, raw codes (N, L) -> further figures for the log


_ADVANTAGES = {"leave_one_out": ppo.leave_one_out, "group_normalised": ppo.group_normalised, "reward_weighted": ppo.reward_weighted}

RENAMED_COMPONENTS = {"rebuild": "reconstruction", "consensus": "robust_prediction"}


class Policy(Protocol):
    """What the loop moves."""

    parameters: Sequence[Tensor]
    rates: Sequence[float]  # learning rate of each over `LoopConfig.lr`

    def log_prob(self, rows: Tensor) -> Tensor:
        """(B,) item rows -> (B, P) log-probabilities over each item's tree, with gradient."""

    def noisy_log_prob(self, rows: Tensor, turn: int) -> Tensor:
        """The same of the items read with the noise of a turn; asked only where `noisy` is set."""

    def greedy(self) -> Codes:
        """Argmax codes of all items, (N, L)."""


class LoopConfig(Section):
    """Policy optimisation. The ratio is joint over the levels of a path; KL is KL(policy || reference) over the item's tree."""

    renamed_keys: ClassVar[dict[str, str]] = {"memory_rate": "behaviour_rate"}

    rounds: int = 30
    group: int = 8
    epochs: int = 3
    batch: int = 256  # items per minibatch, over all processes; a group is never cut
    lr: float = 1e-4
    behaviour_rate: float = Field(
        0.0, ge=0
    )  # learning rate of the memory's values over lr; 0: they stay. Only for a reward that is sure of
    # single items (consensus): what every item has for itself learns the noise of the others
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl: float = 0.05  # coefficient of the exact KL to the reference
    entropy: float = 0.0  # bonus; not 0 means the policy moves even under a constant reward
    advantage: Literal["leave_one_out", "group_normalised", "reward_weighted"] = "leave_one_out"  # the others are control arms
    negatives: Literal["bounded", "clipped"] = "bounded"
    objective: Literal["clipped", "likelihood"] = "clipped"  # likelihood: of the improved policy, on paths drawn evenly: rare ones too
    eta: float = Field(0.25, gt=0)  # likelihood: units of advantage that are worth a nat
    noisy: float = Field(0.0, ge=0, le=1)  # likelihood: share of it asked of items read with words missing, so that codes do not flip
    noisy_readings: int = Field(4, ge=1)  # so many of every item, their states kept, one a round in turn: one alone left more flips
    gradient: Literal["sampled", "exact"] = "sampled"  # exact: expected gradient over the whole tree, the control arm
    moving: float = 0.5  # share of the items that moves per round
    grad_norm: float = 1.0
    step_kl: float = 0.05  # KL(old || new) aimed at per round: passes end at 1.5 times this, a round beyond 4 times is undone
    adapt: bool = True  # learning rate up by half where a round moved less than half of step_kl, down by half where more than twice
    anneal: bool = False  # step_kl and learning rate fall linearly over the rounds, so that the last ones no longer shake the codes
    most_kl: float = 1.5  # the run ends when the mean exact KL to the reference passes this
    patience: int = Field(8, ge=0)  # rounds without a better watched figure before the run ends at its best round; 0: never
    checkpoint_every: int = Field(5, ge=1)  # rounds
    weights: dict[str, float] = Field(default={"sid_reward": 1.0, "codes": 1.0, "balance": 1.0, "crowding": 0.3, "reconstruction": 0.2})

    @field_validator("weights")
    @classmethod
    def _current_names(cls, weights: dict[str, float]) -> dict[str, float]:
        for old, new in RENAMED_COMPONENTS.items():
            if old in weights:
                raise ValueError(f"the reward component {old} was renamed; write {new}")
        return weights

    @model_validator(mode="after")
    def _noise_needs_likelihood(self) -> LoopConfig:
        if self.noisy and self.objective != "likelihood":
            raise ValueError(
                f"noisy is {self.noisy:g}, but only the objective likelihood reads noisy items; set objective=likelihood, or noisy=0"
            )
        return self


class Refinement:
    """Holds what a run changes: policy and optimiser, running scales, random streams, the best round so far.

    Args:
        policy: moved in place.
        reference: the frozen start with its path trees.
        scorer: reward components of candidates.
        accelerator: device and processes.
        quality: (N,) multiplies the advantage of each item's group (anything constant within a group cancels otherwise).
        metric: a held-out figure of raw codes, of another kind than the reward; the run ends at its best round.
        describe: further figures for the log, asked on rank 0.
    """

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
        # a large epsilon keeps Adam from blowing rounding noise up to full steps where there is nothing to learn
        self.optimizer = torch.optim.Adam([{"params": [weight]} for weight in policy.parameters], lr=config.lr, eps=1e-6)
        self.scale = ppo.RunningScale()
        self.draw = torch.Generator().manual_seed(seed)
        self.order = np.random.default_rng(seed)
        self.skipped, self.step_kl, self.lr = 0, config.step_kl, config.lr
        self.next_round, self.ended = 0, False
        self.best, self.waited = -math.inf, 0
        self.best_weights: list[Tensor] | None = None

    def run(self, log: Callable[[dict[str, Any]], None], save: Callable[[Refinement], None] | None = None) -> Codes:
        """The rounds from `next_round` on; `log` gets one flat record per round. -> greedy codes (N, L) at the end.

        Args:
            save: called every `checkpoint_every` rounds and after the last one (`checkpoint.save_state`).

        Raises:
            MmsidError: the gradient was not finite in three steps, or a weight belongs to no component.
        """
        table, note = self.policy.greedy(), {}
        if self.next_round == 0 and self.metric is not None:
            self._look(self.metric(table))
        rounds = range(self.next_round, 0 if self.ended else self.config.rounds)
        for number in track(rounds, what="refine", unit="rounds", note=note):
            record = {"round": number, **self.round(table)}
            before, table = table, self.policy.greedy()
            record |= table_figures(table, self.reference.head.codebook_size, before, self.reference.greedy)
            record["outside_tree"] = self._outside_tree(table)
            reason = None
            if record["kl"] > self.config.most_kl:
                reason = f"mean KL to the reference {record['kl']:.3f} is above most_kl {self.config.most_kl}"
            if self.metric is not None:
                record["monitored"] = self.metric(table)
                if self._look(record["monitored"]):
                    reason = reason or f"the watched figure has not passed {self.best:.4f} for {self.waited} rounds"
            if self.describe is not None and self.accelerator.is_main_process:
                record |= self.describe(number, table)
            self.next_round, self.ended = number + 1, reason is not None
            log(record | ({"stopped": reason} if reason else {}))
            note |= {key: record[key] for key in ("reward", "kl", "monitored", "churn", "collisions") if key in record}
            if save is not None and (
                self.ended or self.next_round % self.config.checkpoint_every == 0 or self.next_round == self.config.rounds
            ):
                save(self)
            if self.ended:
                break
        if self.best_weights is None or not self.config.patience:
            return table
        self._restore(self.best_weights)
        return self.policy.greedy()

    def _left(self, number: int) -> float:
        """What annealing has left of step and rate in a round."""
        return 1 - number / self.config.rounds if self.config.anneal else 1.0

    @property
    def _own_samples(self) -> bool:
        """Whether the groups are samples of the policy itself, so that its KL can be estimated from them; else the exact one is taken."""
        return self.config.gradient == "sampled" and self.config.objective == "clipped"

    def _look(self, value: float) -> bool:
        """Take the watched figure down; True when it has not risen for `patience` rounds."""
        if value > self.best:
            self.best, self.waited = value, 0
            self.best_weights = [weight.detach().clone() for weight in self.policy.parameters]
        else:
            self.waited += 1
        return 0 < self.config.patience <= self.waited

    def _restore(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for weight, old in zip(self.policy.parameters, weights, strict=True):
                weight.copy_(old)

    def _outside_tree(self, codes: Codes) -> float:
        """Share of the items whose greedy path is none that was enumerated: there, KL and expected reward are blind."""
        inside = (self.reference.tree.codes.cpu().numpy() == codes[:, None]).all(-1).any(-1)
        return float(1 - inside.mean())

    def round(self, table: Codes) -> dict[str, Any]:
        """Sample, score, optimise once; -> the round's figures."""
        config, device = self.config, self.accelerator.device
        self.step_kl = config.step_kl * self._left(self.next_round)
        if self.next_round:
            self.lr *= self._left(self.next_round) / self._left(self.next_round - 1)
        moving = np.sort(self.order.permutation(self.items)[: max(1, round(config.moving * self.items))])
        rows = torch.as_tensor(moving, device=device)
        with torch.no_grad():
            old_all = torch.cat([self.policy.log_prob(piece) for piece in rows.split(BATCH)])
        picks = ppo.sample_groups(old_all.cpu(), config.group, self.draw)
        if config.objective == "likelihood":
            picks = ppo.even_groups(old_all.cpu(), config.group, self.draw)
        if config.gradient == "exact":
            picks = torch.arange(old_all.shape[1]).expand(len(moving), -1)
        candidates = self.reference.tree.codes[rows].cpu().gather(1, picks[..., None].expand(-1, -1, table.shape[1])).numpy()
        rewards, record = self._rewards(self.scorer(moving, candidates, table), old_all.cpu())
        if config.gradient == "exact":
            signal = ppo.centred(rewards) * self.quality[moving]
        else:
            signal = _ADVANTAGES[config.advantage](rewards) * self.quality[moving]
        old = old_all.gather(1, picks.to(device))
        before = [weight.detach().clone() for weight in self.policy.parameters]
        figures = self._optimise(rows, old_all, picks.to(device), old, signal.float().to(device))
        figures |= self._adapt(figures["round_kl"], before)
        if figures["undone"]:
            figures["kl"] = float(ppo.exact_kl(old_all, self.reference.tree.log_prob[rows]).mean())
        return record | figures

    def _rewards(self, parts: dict[str, Floats], old_all: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Weighted sum (R, C) of the scaled components, and the mean of each under the policy (R, P), unscaled."""
        exact = self.config.gradient == "exact"
        mean = (lambda part: float((part * old_all.exp()).sum(1).mean())) if exact else (lambda part: float(part.mean()))
        rewards, record = torch.zeros(next(iter(parts.values())).shape, dtype=torch.float64), {}
        for name, weight in self.config.weights.items():
            if name not in parts:
                raise MmsidError(f"refine.loop.weights names {name!r}; the components of the reward are {', '.join(parts)}")
            if weight != 0.0:
                part = torch.as_tensor(parts[name], dtype=torch.float64)
                record[f"reward_{name}"] = mean(part)
                rewards = rewards + weight * self.scale(name, part)
        return rewards, record | {"zero_variance_groups": ppo.zero_variance_share(rewards), "reward": mean(rewards)}

    def _adapt(self, moved: float, before: list[Tensor]) -> dict[str, Any]:
        """Keep the distance of a round near `step_kl`, whatever the scale of the weights; undo a round that went much too far.

        How far a step carries a policy depends on the size of its states and on its temperatures, which differ between tokenizers by
        orders of magnitude; a fixed learning rate that suits one collapses the next in a single step.
        """
        config = self.config
        undone = not moved <= 4 * self.step_kl  # NaN is undone too
        if undone:
            self._restore(before)
            self.optimizer.state.clear()
        if config.adapt or undone:
            factor = 0.25 if undone else 0.5 if moved > 2 * self.step_kl else 1.5 if 0 < moved < 0.5 * self.step_kl else 1.0
            self.lr = min(max(self.lr * factor, config.lr * 1e-4), config.lr * 30)
        return {"undone": undone, "lr": self.lr}

    def _optimise(self, rows: Tensor, old_all: Tensor, picks: Tensor, old: Tensor, signal: Tensor) -> dict[str, Any]:
        """`epochs` passes over the groups; stops the round before a step that would go too far. All of first axis R."""
        config, clipped, steps, epochs, stopped = self.config, [], 0, 0, False
        for _ in range(config.epochs):
            epochs += 1
            for chosen in np.array_split(self.order.permutation(len(rows)), max(1, math.ceil(len(rows) / config.batch))):
                batch = torch.as_tensor(chosen, device=rows.device)
                mine = batch[self.accelerator.process_index :: self.accelerator.num_processes]
                loss, sums = self._loss(rows[mine], old_all[mine], picks[mine], old[mine], signal[mine], len(batch), first=steps == 0)
                sums = self.accelerator.reduce(sums, reduction="sum")
                approximate, kl, beyond, loudest = (float(value) / len(batch) for value in sums)
                if steps and approximate > 1.5 * self.step_kl:
                    stopped = True
                    break
                clipped.append(beyond)
                if loudest == 0.0 and kl < 1e-6 and config.entropy == 0.0:
                    continue  # nothing to learn and nothing to undo: a step could only amplify rounding noise
                self._step(loss)
                steps += 1
            if stopped:
                break
        with torch.no_grad():
            now = torch.cat([self.policy.log_prob(piece) for piece in rows.split(BATCH)])
        levels = ppo.level_entropies(now, self.reference.tree.branching).mean(0)
        log_ratios = ppo.log_ratio(now.gather(1, picks), old)
        round_kl = float(ppo.exact_kl(old_all, now).mean())
        return {
            "steps": steps,
            "epochs": epochs,
            "stopped_early": stopped,
            "clip_fraction": float(np.mean(clipped)),
            "log_ratio_mean": float(log_ratios.mean()),
            "log_ratio_max": float(log_ratios.abs().max()),
            # the same distance twice, KL(old || new) of the round: from the samples, and over all paths
            "approximate_kl": ppo.approximate_kl(now.gather(1, picks), old) if self._own_samples else round_kl,
            "round_kl": round_kl,
            "kl": float(ppo.exact_kl(now, self.reference.tree.log_prob[rows]).mean()),
            "skipped_steps": self.skipped,
            **{f"entropy_{level + 1}": float(value) for level, value in enumerate(levels)},
        }

    def _loss(
        self, rows: Tensor, old_all: Tensor, picks: Tensor, old: Tensor, signal: Tensor, size: int, first: bool
    ) -> tuple[Tensor, Tensor]:
        """Loss summed over the rows over `size`, and sums for the log: KL(old || new), KL to reference, clip fraction, |signal|."""
        config = self.config
        new_all = self.policy.log_prob(rows)
        # rounding alone: batches of another shape differ by thousandths of a nat on a GPU, dropout or a wrong mask by far more
        if first and not torch.allclose(new_all.detach(), old_all, rtol=1e-3, atol=2e-2):
            raise MmsidError("the policy scores its own samples differently in the first step: dropout or a mask differs; this is a bug")
        new = new_all.gather(1, picks)
        if config.objective == "likelihood":
            gain = ppo.tilted_likelihood(new, old, signal, config.eta)
            if config.noisy:
                heard = self.policy.noisy_log_prob(rows, self.next_round).gather(1, picks)
                gain = (1 - config.noisy) * gain + config.noisy * ppo.tilted_likelihood(heard, old, signal, config.eta)
        elif config.gradient == "exact":
            gain = ppo.expected_reward(new_all, signal)
        else:
            gain = ppo.surrogate(new, old, signal, config.clip_low, config.clip_high, config.negatives).mean(dim=1)
        kl = ppo.exact_kl(new_all, self.reference.tree.log_prob[rows])
        loss = (-gain + config.kl * kl - config.entropy * ppo.entropy(new_all)).sum() / size
        with torch.no_grad():
            ratios = ppo.log_ratio(new, old)
            moved = ((ratios.exp() < 1 - config.clip_low) | (ratios.exp() > 1 + config.clip_high)).float().mean(1).sum()
            distance = ppo.kl_estimates(old, new).k3.mean(1).sum() if self._own_samples else ppo.exact_kl(old_all, new_all).sum()
            return loss, torch.stack([distance, kl.sum(), moved, signal.abs().sum()])

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
        for group, rate in zip(self.optimizer.param_groups, self.policy.rates, strict=True):
            group["lr"] = self.lr * rate
        self.optimizer.step()
