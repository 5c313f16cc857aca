"""The arithmetic of policy refinement: pure functions of tensors, no state but one running scale.

Conventions, kept everywhere in this room:

* A *path* is one whole code sequence of an item (L codes). The policy is a one-step bandit whose action is the path, so **the
  probability ratio is joint**: rho = pi(path) / pi_old(path), the product over the levels, never one ratio per level.
* All log-probabilities are normalised over the same enumerated paths (the mask); sampling and scoring share it.
* Advantages are of shape (items, group); a group holds the G paths sampled for one item and is never cut.
* KL is KL(policy || reference), exact, in the loss. The sampled estimators are for the log only.

Sources: PPO (Schulman 2017), clip-higher (DAPO, 2503.14476), GBPO (OneRec-V2, 2508.20900), Dr.GRPO (no division by the
deviation), GDPO (scale each component before summing, 2601.05242), MPO (likelihood of an improved
policy, 1806.06920).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


def log_ratio(new: Tensor, old: Tensor, limit: float = LOG_RATIO_LIMIT) -> Tensor:
    """log(pi / pi_old), clamped to +-`limit` so that exp() stays finite. Any shape. Raises FloatingPointError on NaN or infinity."""
    difference = new - old
    if not bool(torch.isfinite(difference).all()):
        raise FloatingPointError("log-probabilities of the sampled paths are not finite: the policy has diverged (lower the learning rate)")
    return difference.clamp(-limit, limit)


def clipped_surrogate(log_ratios: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """PPO's pessimistic term per sample, to be maximised: min(rho A, clip(rho, 1-low, 1+high) A). Same shape as the inputs."""
    ratio = log_ratios.exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)


def bounded_surrogate(new: Tensor, old: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """Clipped term where A >= 0, GBPO's bounded term where A < 0 (2508.20900v4): A pi / max(pi_old, 1 - sg(pi)).

    The gradient of log pi then carries A pi/(1-pi) instead of A: an unlikely path is no longer pressed down with full force where
    nothing is left to suppress. `new`, `old` (…) log-probabilities of the sampled paths; same shape out.
    """
    ratios = log_ratio(new, old)
    probability = new.detach().exp()
    floor = torch.maximum(old.exp(), 1.0 - probability)
    # pi / floor written through log pi, so that the gradient is the same and nothing underflows
    bounded = (new.clamp(min=-60.0) - floor.clamp(min=1e-12).log()).exp() * advantages
    return torch.where(advantages < 0, bounded, clipped_surrogate(ratios, advantages, clip_low, clip_high))


def _check_detached(old: Tensor, advantages: Tensor) -> None:
    if old.requires_grad or advantages.requires_grad:
        raise ValueError("old log-probabilities and advantages must be detached")


def surrogate(
    new: Tensor, old: Tensor, advantages: Tensor, clip_low: float, clip_high: float, negatives: Literal["clipped", "bounded"]
) -> Tensor:
    """Term to be maximised, per sample; `old` and `advantages` must be detached (checked: a gradient through them is a silent bug)."""
    _check_detached(old, advantages)
    if negatives == "bounded":
        return bounded_surrogate(new, old, advantages, clip_low, clip_high)
    return clipped_surrogate(log_ratio(new, old), advantages, clip_low, clip_high)


def tilted_likelihood(new: Tensor, old: Tensor, advantages: Tensor, eta: float) -> Tensor:
    """Log-likelihood of the policy improved in closed form, to be maximised, per item: sum_g q_g log pi_g, q ~ pi_old exp(A / eta).

    q is the maximiser of E_q[A] - eta KL(q || pi_old); fitting the policy to it by likelihood is MPO's M-step (1806.06920). All of it
    among the G paths handed in (q and pi are normalised over them): the item's whole tree, or a part of it drawn in any way. At
    pi = pi_old the gradient is q - pi: a path as rare as e^-7 that is worth 7 eta more than the likely ones pulls with all its weight,
    where a sampled policy gradient hardly ever sees it and the exact one multiplies it by its probability. (N, G) each -> (N,).
    """
    _check_detached(old, advantages)
    if not bool(torch.isfinite(new).all()):
        raise FloatingPointError("log-probabilities are not finite: the policy has diverged (lower the learning rate)")
    improved = (old + advantages / eta).softmax(dim=1)
    return (improved * new.log_softmax(dim=1)).sum(dim=1)


def _checked_groups(rewards: Tensor) -> Tensor:
    """(N, G) rewards: finite, G >= 2. Returns the mask (N, 1) of groups whose rewards are all equal."""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)}: advantages need groups of at least 2 samples, (items, group)")
    if not bool(torch.isfinite(rewards).all()):
        raise FloatingPointError("a reward is NaN or infinite")
    return (rewards == rewards[:, :1]).all(dim=1, keepdim=True)


def centred(rewards: Tensor) -> Tensor:
    """r_g - mean(r), exactly 0 where all rewards of a group are equal. (N, G) -> (N, G). Raises as `leave_one_out`."""
    return (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(_checked_groups(rewards), 0.0)


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_g = r_g - mean of the *other* rewards of the group, no division by the deviation. (N, G) -> (N, G).

    Unbiased with or without a constant added to the rewards. Groups of equal rewards give exactly 0. Raises ValueError for G < 2,
    FloatingPointError for non-finite rewards.
    """
    group = rewards.shape[1] if rewards.ndim == 2 else 0
    return centred(rewards) * (group / max(group - 1, 1))


def group_normalised(rewards: Tensor, ddof: int = 0, eps: float = 1e-6) -> Tensor:
    """GRPO's control arm: (r - mean) / (std + eps), std with `ddof` (0 = population, as in 2604.20861). (N, G) -> (N, G).

    Anything constant in a group, and any bonus that only rescales it, cancels here; that is why it is a control and not the default.
    """
    equal = _checked_groups(rewards)
    deviation = rewards.std(dim=1, keepdim=True, correction=ddof)
    return ((rewards - rewards.mean(dim=1, keepdim=True)) / (deviation + eps)).masked_fill(equal, 0.0)


def reward_weighted(rewards: Tensor, temperature: float = 1.0) -> Tensor:
    """Control arm: G softmax(r / temperature) over the group, never negative: supervised steps on one's samples, by their worth.

    (N, G) -> (N, G); 0 where all rewards of a group are equal (they teach nothing). After reward-weighted regression (Peters 2007).
    """
    return ((rewards / temperature).softmax(dim=1) * rewards.shape[1]).masked_fill(_checked_groups(rewards), 0.0)


def zero_variance_share(rewards: Tensor) -> float:
    """Share of the groups (N, G) whose rewards are all equal: they teach nothing."""
    return float(_checked_groups(rewards).float().mean())


class RunningScale:
    """Divides each reward component by a running scale of its own, so that weights compare like with like (GDPO).

    The scale is an exponential mean (weight `decay` on the past) of the root mean square deviation within groups, over the groups in
    which the component varies at all. A batch in which it never varies leaves the scale untouched; a component never seen varying is
    passed through undivided (it is constant in every group and cancels anyway).
    """

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.scales: dict[str, float] = {}

    def __call__(self, name: str, rewards: Tensor) -> Tensor:
        """`rewards` (N, G) of component `name` -> the same, scaled. Updates the scale first."""
        equal = _checked_groups(rewards).squeeze(1)
        if not bool(equal.all()):
            varying = rewards[~equal]
            now = float((varying - varying.mean(dim=1, keepdim=True)).square().mean().sqrt())
            before = self.scales.get(name)
            self.scales[name] = now if before is None else self.decay * before + (1.0 - self.decay) * now
        return rewards / max(self.scales.get(name, 1.0), 1e-8)


def exact_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the enumerated paths, per item: (N, P), (N, P) -> (N,). Both normalised over the last axis; >= 0, 0 iff equal."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats over the enumerated paths, per item: (N, P) -> (N,)."""
    return -(log_p.exp() * log_p).sum(dim=-1)


def level_entropies(log_p: Tensor, branching: tuple[int, ...]) -> Tensor:
    """Conditional entropies H(c_l | c_<l) per item, (N, P) -> (N, L), of a tree of paths in depth-first order.

    `branching`: children per level, product = P. They add up to `entropy` (chain rule).
    """
    if log_p.shape[-1] != int(torch.tensor(branching).prod()):
        raise ValueError(f"{log_p.shape[-1]} paths do not make a tree with {branching} children per level")
    joint, left = [], log_p.shape[-1]
    for children in branching:
        left //= children
        prefixes = log_p.reshape(log_p.shape[0], -1, left).logsumexp(dim=-1)
        joint.append(entropy(prefixes))
    stacked = torch.stack(joint, dim=1)
    return torch.diff(stacked, dim=1, prepend=torch.zeros_like(stacked[:, :1]))


def expected_reward(log_p: Tensor, rewards: Tensor) -> Tensor:
    """Exact E_pi[r] per item over the enumerated paths, (N, P), (N, P) -> (N,); its gradient is the exact policy gradient.

    The control arm, and the judge of the sampled estimator. The item's mean reward is taken off first: no effect on the gradient (the
    probabilities add up to one), less rounding.
    """
    if rewards.requires_grad:
        raise ValueError("rewards must be detached")
    return (log_p.exp() * (rewards - rewards.mean(dim=-1, keepdim=True))).sum(dim=-1)


class KlEstimates(NamedTuple):
    """Monte-Carlo estimates of KL(pi || other) from samples of pi, one value per sample (r = other / pi)."""

    k1: Tensor  # -log r: unbiased, may be negative; as a loss its gradient is 0 in expectation
    k2: Tensor  # (log r)^2 / 2
    k3: Tensor  # r - 1 - log r: unbiased, never negative


def kl_estimates(log_p: Tensor, log_other: Tensor) -> KlEstimates:
    """Schulman's k1, k2, k3 at sampled paths; any shape. For the log only: the loss uses `exact_kl`."""
    log_r = log_ratio(log_other, log_p)
    return KlEstimates(-log_r, 0.5 * log_r.square(), torch.expm1(log_r) - log_r)


def approximate_kl(new: Tensor, old: Tensor) -> float:
    """k3 estimate of KL(pi_old || pi) at samples of pi_old: what PPO codes print as approx_kl. A number >= 0."""
    return float(kl_estimates(old.detach(), new.detach()).k3.mean())


def clip_fraction(log_ratios: Tensor, clip_low: float, clip_high: float) -> float:
    """Share of the samples whose ratio lies outside [1-low, 1+high]."""
    ratio = log_ratios.detach().exp()
    return float(((ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)).float().mean())


def even_groups(log_p: Tensor, group: int, generator: torch.Generator) -> Tensor:
    """The likeliest path of every item and `group` - 1 others, all different, whatever their probability: (N, P) -> int64 (N, group).

    All P where there are no more.
    """
    lot = torch.rand(log_p.shape, generator=generator)
    lot.scatter_(1, log_p.argmax(dim=1, keepdim=True), 2.0)
    return lot.topk(min(group, log_p.shape[1]), dim=1).indices


def sample_groups(log_p: Tensor, group: int, generator: torch.Generator) -> Tensor:
    """`group` paths per item, drawn with replacement from the policy itself: (N, P) -> int64 (N, G) path indices."""
    return torch.multinomial(log_p.exp(), group, replacement=True, generator=generator)
