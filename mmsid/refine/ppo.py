"""Pure functions of policy optimisation: ratios, clipped and bounded surrogates, advantages, KL, entropy, path sampling.

An action is a whole path (L codes), so ratios are joint over the levels. Log-probabilities are normalised over an item's enumerated paths.
Sources: PPO (Schulman 2017), clip-higher (DAPO, 2503.14476), GBPO (OneRec-V2, 2508.20900), advantages without deviation (Dr.GRPO),
scaling per component (GDPO, 2601.05242).
"""

from __future__ import annotations

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
    """PPO's pessimistic objective per sample, to be maximised: min(rho A, clip(rho, 1-low, 1+high) A). Same shape as the inputs."""
    ratio = log_ratios.exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)


def surrogate(new: Tensor, old: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Objective per sample, to be maximised: clipped where A >= 0, GBPO's bounded term A pi / max(pi_old, 1 - sg(pi)) where A < 0.

    The bounded term (2508.20900v4) scales the gradient of log pi by A pi / (1 - pi) instead of A. An unlikely path with a negative
    advantage is therefore no longer suppressed with full force.

    Args:
        new, old: log-probabilities of the sampled paths, any shape.
        advantages: same shape; `old` and `advantages` must be detached.

    Raises:
        ValueError: `old` or `advantages` carries a gradient.
        FloatingPointError: see `log_ratio`.
    """
    if old.requires_grad or advantages.requires_grad:
        raise ValueError("old log-probabilities and advantages must be detached")
    ratios = log_ratio(new, old)
    probability = new.detach().exp()
    bound = torch.maximum(old.exp(), 1.0 - probability)
    # pi / bound is written through log pi: the gradient is the same and nothing underflows
    bounded = (new.clamp(min=-60.0) - bound.clamp(min=1e-12).log()).exp() * advantages
    return torch.where(advantages < 0, bounded, clipped_surrogate(ratios, advantages, clip_low, clip_high))


def check_groups(rewards: Tensor) -> Tensor:
    """Mask (N, 1) of the groups whose rewards (N, G) are all equal.

    Raises:
        ValueError: G < 2.
        FloatingPointError: a reward is not finite.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)}: advantages need groups of at least 2 samples, (items, group)")
    if not bool(torch.isfinite(rewards).all()):
        raise FloatingPointError("a reward is NaN or infinite")
    return (rewards == rewards[:, :1]).all(dim=1, keepdim=True)


def centred(rewards: Tensor) -> Tensor:
    """r_g - mean(r), exactly 0 where all rewards of a group are equal. (N, G) -> (N, G). Raises as `check_groups`."""
    return (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(check_groups(rewards), 0.0)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Leave-one-out advantages: A_g = r_g - mean of the other rewards of the group, not divided by the deviation. (N, G) -> (N, G).

    Unbiased, also under a constant added to the rewards. Groups of equal rewards give exactly 0. Raises as `check_groups`.
    """
    group = rewards.shape[1] if rewards.ndim == 2 else 0
    return centred(rewards) * (group / max(group - 1, 1))


def zero_variance_share(rewards: Tensor) -> float:
    """Share of the groups (N, G) whose rewards are all equal and give no gradient."""
    return float(check_groups(rewards).float().mean())


class RunningScale:
    """Divides each reward component by its own running scale, so that weights of components are comparable (GDPO).

    The scale is an exponential mean (weight `decay` on the past) of the root mean square deviation within the groups in which the
    component varies. A batch without such a group leaves the scale unchanged. A component that has never varied is not divided.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.scales: dict[str, float] = {}

    def __call__(self, name: str, rewards: Tensor) -> Tensor:
        """Update the scale of component `name` with `rewards` (N, G), then return the scaled rewards (N, G)."""
        equal = check_groups(rewards).squeeze(1)
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
    """Conditional entropies H(c_l | c_<l) in nats per item, (N, P) -> (N, L), of a tree of paths in depth-first order.

    `branching`: children per level, product = P. The entropies add up to `entropy` (chain rule). Raises ValueError for another P.
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


def approximate_kl(new: Tensor, old: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi_old || pi), one value >= 0 per sample of pi_old; any shape. For the log and for early stopping."""
    log_r = log_ratio(new, old)
    return torch.expm1(log_r) - log_r


def clip_fraction(log_ratios: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Share of each item's samples whose ratio is outside [1-low, 1+high]: (N, G) -> (N,)."""
    ratio = log_ratios.detach().exp()
    return ((ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)).float().mean(dim=1)


def sample_groups(log_p: Tensor, group: int, generator: torch.Generator) -> Tensor:
    """`group` paths per item, drawn with replacement from the policy itself: (N, P) -> int64 (N, G) path indices."""
    return torch.multinomial(log_p.exp(), group, replacement=True, generator=generator)
