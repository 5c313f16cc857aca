"""Control variants of refinement: other ways to move codes with the same reward, and as many scored paths or steps.

`ppo` is refinement itself without its gate. `exact`, `grpo` and `reward_weighted` change the gradient estimator; `per_item` trains a row of
logits per item; `best_of_n` uses no gradient; `shuffled` gives items the rewards of other items; `random` moves as many items at random;
`gumbel` trains the head by Gumbel-softmax on co-engagement without a reward (after DIGER, 2601.19711).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmsid.errors import ConfigError
from mmsid.progress import track
from mmsid.refine import ppo
from mmsid.refine.evidence import Codes
from mmsid.refine.loop import LoopConfig, Refinement, Scorer
from mmsid.refine.policy import BATCH, PathTree, Reference
from mmsid.refine.stage import Job
from mmsid.refine.ungated import refine_ungated, run_loop, usable_scorer, write_moved_sids
from mmsid.tokenizer.heads import ResidualHead

ROW_SCALE = 100.0  # factor on the logits of per_item: Adam then moves them as much faster; `step_kl` bounds its steps as well
SAMPLES = 24  # paths per item and round of best_of_n


def move(control: str, settings: dict[str, Any]) -> Path:
    """Move codes by a control with the keys of the stage `refine`. -> the SID folder written.

    Raises:
        ConfigError: an unknown key of the stage; `gumbel` on a head without code vectors.
        MmsidError: the reward is not usable on this catalogue (`gumbel` needs none); and what the stage raises.
    """
    return write_moved_sids(settings, MOVES[control])


# --- gradient estimators


class ExactGradient(Refinement):
    """Expected gradient over all enumerated paths instead of samples."""

    samples_policy = False

    def draw_paths(self, log_prob: Tensor) -> Tensor:
        """All paths of every item."""
        return torch.arange(log_prob.shape[1]).expand(len(log_prob), -1)

    def advantages(self, rewards: Tensor) -> Tensor:
        """Rewards minus their mean over the tree."""
        return ppo.centred(rewards)

    def gain(self, new: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        """Expected advantage under the policy."""
        return expected_reward(new, advantages)

    def mean_reward(self, rewards: Tensor, log_prob: Tensor) -> float:
        """Expected reward under the policy, averaged over items."""
        return float((rewards * log_prob.exp()).sum(1).mean())


class Grpo(Refinement):
    """GRPO: advantages divided by the deviation of their group, negative ones clipped instead of bounded."""

    def advantages(self, rewards: Tensor) -> Tensor:
        """`group_normalised` advantages."""
        return group_normalised(rewards)

    def gain(self, new: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        """PPO's clipped surrogate."""
        return ppo.clipped_surrogate(ppo.log_ratio(new, old), advantages, self.config.clip_low, self.config.clip_high).mean(dim=1)


class RewardWeighted(Refinement):
    """Reward-weighted regression on the policy's own samples."""

    def advantages(self, rewards: Tensor) -> Tensor:
        """`reward_weighted` weights."""
        return reward_weighted(rewards)


def expected_reward(log_p: Tensor, rewards: Tensor) -> Tensor:
    """Exact E_pi[r] per item over the enumerated paths, (N, P), (N, P) -> (N,); its gradient is the exact policy gradient.

    The mean reward of the item is subtracted first. That does not change the gradient and reduces rounding.

    Raises:
        ValueError: `rewards` carries a gradient.
    """
    if rewards.requires_grad:
        raise ValueError("rewards must be detached")
    return (log_p.exp() * (rewards - rewards.mean(dim=-1, keepdim=True))).sum(dim=-1)


def group_normalised(rewards: Tensor, ddof: int = 0, eps: float = 1e-6) -> Tensor:
    """GRPO advantages: (r - mean) / (std + eps), std with `ddof` (0 = population, as in 2604.20861). (N, G) -> (N, G).

    A constant factor of a group, such as an item's quality bonus, cancels. Raises as `ppo.check_groups`.
    """
    equal = ppo.check_groups(rewards)
    deviation = rewards.std(dim=1, keepdim=True, correction=ddof)
    return ((rewards - rewards.mean(dim=1, keepdim=True)) / (deviation + eps)).masked_fill(equal, 0.0)


def reward_weighted(rewards: Tensor, temperature: float = 1.0) -> Tensor:
    """Weights of reward-weighted regression (Peters 2007): G softmax(r / temperature) over the group, never negative.

    (N, G) -> (N, G); 0 where all rewards of a group are equal. Raises as `ppo.check_groups`.
    """
    return ((rewards / temperature).softmax(dim=1) * rewards.shape[1]).masked_fill(ppo.check_groups(rewards), 0.0)


# --- other policies and rewards


class TablePolicy:
    """Categorical policy per item: the reference's log-probabilities plus a trained row of P logits. It cannot encode new items."""

    def __init__(self, reference: Reference) -> None:
        self.start = start_tree(reference)
        self.logits = nn.Parameter(torch.zeros_like(self.start.log_prob))
        self.parameters = [self.logits]
        # the greedy path is the best level by level, not always the most likely one: without this lead items would move before any step
        self.lead = torch.zeros_like(self.start.log_prob)
        self.lead[:, 0] = self.start.log_prob.amax(1) - self.start.log_prob[:, 0]

    def tree(self, rows: Tensor, table: Codes) -> PathTree:
        """The reference's trees of item rows (R,), the same in every round."""
        return self.start.take(rows)

    def log_prob(self, rows: Tensor, tree: PathTree) -> Tensor:
        """(B,) item rows and their trees -> (B, P), with gradient."""
        return (tree.log_prob + ROW_SCALE * self.logits[rows]).log_softmax(-1)

    @torch.no_grad()
    def greedy(self) -> Codes:
        """Each item's best path of its tree, (N, L)."""
        best = (self.start.log_prob + self.lead + ROW_SCALE * self.logits).argmax(-1)
        return self.start.paths(best[:, None].cpu())[:, 0]


def start_tree(reference: Reference) -> PathTree:
    """The reference's own trees of all items, m^L paths each: for catalogues of benchmark size."""
    return reference.tree(torch.arange(len(reference.greedy), device=reference.states.device), reference.proposals(reference.greedy))


def best_of_n(reference: Reference, scorer: Scorer, config: LoopConfig, seed: int) -> Codes:
    """Rounds in which a part of the items draws `SAMPLES` paths from the reference and takes the best one if it beats the current codes.

    As many paths are scored as in the loop. -> codes (N, L).
    """
    order, draw = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    scale, tree, table = ppo.RunningScale(), start_tree(reference), reference.greedy.copy()
    for _ in track(range(max(1, round(config.rounds * config.group / SAMPLES))), what="best of n", unit="rounds"):
        rows = np.sort(order.permutation(len(table))[: max(1, round(config.moving * len(table)))])
        picks = ppo.sample_groups(tree.log_prob[torch.as_tensor(rows)].cpu(), SAMPLES, draw)
        candidates = np.concatenate([table[rows][:, None], tree.take(torch.as_tensor(rows)).paths(picks)], axis=1)
        parts = scorer(rows, candidates, table)
        rewards = sum(weight * scale(name, torch.as_tensor(parts[name])) for name, weight in config.weights.items())
        table[rows] = candidates[np.arange(len(rows)), rewards.argmax(dim=1).numpy()]  # among equal rewards the current codes stay
    return table


def shuffled(scorer: Scorer, seed: int) -> Scorer:
    """Scorer that gives every item the rewards of another item's candidates."""
    rng = np.random.default_rng(seed)

    def score(rows: NDArray, candidates: Codes, codes: Codes) -> dict[str, NDArray]:
        exchanged = rng.permutation(len(rows))
        return {name: part[exchanged] for name, part in scorer(rows, candidates, codes).items()}

    return score


def displaced_at_random(reference: Reference, codes: Codes, seed: int) -> Codes:
    """Move as many items as `codes` (N, L) moved, to paths of the same ranks in their own trees, but random items. -> (N, L).

    A path outside its item's tree counts as the least likely one.
    """
    tree = start_tree(reference).codes.cpu().numpy().astype(np.int64)
    same = (tree == codes[:, None]).all(-1)
    rank = np.where(same.any(1), same.argmax(1), tree.shape[1] - 1)
    drawn = np.random.default_rng(seed).permutation(rank)
    return tree[np.arange(len(tree)), drawn]


# --- Gumbel-softmax


def _gumbel(job: Job) -> Codes:
    """Straight-through Gumbel-softmax through all levels; losses 1 : 1 : 1 as published. -> raw codes (N, L).

    InfoNCE between the quantised vectors of co-engaged items replaces the recommender's loss; the other losses are reconstruction of the
    frozen states and commitment. The noise falls linearly to 0 over as many steps as the loop may take.
    """
    head, loop, config = job.tokenizer.head, job.config.loop, job.config
    if not isinstance(head, ResidualHead):
        raise ConfigError("the control `gumbel` trains code vectors, and a parallel head has none; use a tokenizer with a residual head")
    generator = torch.Generator().manual_seed(config.seed)
    pairs = job.neighbours.tocoo()
    chances = torch.from_numpy(pairs.data)
    target = torch.cat([job.reference.head.project(piece)[:, -1] for piece in job.reference.states.split(BATCH)]).detach()
    steps = loop.rounds * loop.epochs * max(1, round(loop.moving * len(target) / loop.batch))
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-4)
    for step in track(range(steps), what="gumbel", unit="steps"):
        chosen = torch.multinomial(chances, loop.batch // 2, replacement=True, generator=generator).numpy()
        rows = torch.from_numpy(np.concatenate([pairs.row[chosen], pairs.col[chosen]]).astype(np.int64)).to(target.device)
        s = head.project(job.reference.states[rows])
        quantised = _quantise(head, s, 1.0 - step / steps, generator)
        loss = _distances(quantised, s[:, -1], target[rows]) + _contrast(quantised, loop.batch // 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return job.policy().greedy()


def _quantise(head: ResidualHead, s: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """(B, L, D) -> (B, D): sum of one sampled code vector per level, with the gradient of the softmax (tau 2, as published)."""
    codes, total = torch.zeros(len(s), 0, dtype=torch.int64, device=s.device), torch.zeros_like(s[:, 0])
    for level in range(head.num_levels):
        logits = head.level_logits(s, codes).log_softmax(-1)
        uniform = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-9).to(s.device)
        soft = ((logits - noise * (-uniform.log()).log()) / 2.0).softmax(-1)
        chosen = soft.argmax(-1)
        total = total + (nn.functional.one_hot(chosen, soft.shape[-1]) + soft - soft.detach()) @ head.vectors[level]
        codes = torch.cat([codes, chosen[:, None]], 1)
    return total


def _distances(quantised: Tensor, s: Tensor, target: Tensor) -> Tensor:
    """Reconstruction of the frozen states plus commitment, both in units of the states' mean square."""
    size = target.square().sum(-1).mean()
    return ((quantised - target).square().sum(-1).mean() + (s - quantised.detach()).square().sum(-1).mean()) / size


def _contrast(quantised: Tensor, half: int, tau: float = 0.07) -> Tensor:
    """InfoNCE of the first `half` rows against their partners in the second half."""
    unit = nn.functional.normalize(quantised, dim=-1)
    return nn.functional.cross_entropy(unit[:half] @ unit[half:].T / tau, torch.arange(half, device=unit.device))


# --- the controls by name


def _random(job: Job) -> Codes:
    return displaced_at_random(job.reference, run_loop(job, usable_scorer(job)), job.config.seed)


MOVES: dict[str, Callable[[Job], Codes]] = {
    "exact": lambda job: run_loop(job, usable_scorer(job), kind=ExactGradient),
    "grpo": lambda job: run_loop(job, usable_scorer(job), kind=Grpo),
    "reward_weighted": lambda job: run_loop(job, usable_scorer(job), kind=RewardWeighted),
    "per_item": lambda job: run_loop(job, usable_scorer(job), TablePolicy(job.reference)),
    "best_of_n": lambda job: best_of_n(job.reference, usable_scorer(job), job.config.loop, job.config.seed),
    "shuffled": lambda job: run_loop(job, shuffled(usable_scorer(job), job.config.seed)),
    "random": _random,
    "gumbel": _gumbel,
}
# functions of this module by name, because the bench sends them to its worker processes
CONTROLS: dict[str, Callable[[dict[str, Any]], Path]] = {"ppo": refine_ungated} | {control: partial(move, control) for control in MOVES}
