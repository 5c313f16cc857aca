"""What a recommended SID earns in reinforcement: the reward of QARM (arXiv 2604.20861, equation of r) in parts, as pure functions.

    r = exact + prefix_weight * prefix + quality_weight * quality

    exact    1 where the path decodes to the target; 1 / n where n items share it, because then it is that often meant
    prefix   length of the common prefix with the target over the number of levels; a collision suffix never counts
    quality  q of the target, paid with `exact` only (the relevance gate): a well-described wrong item earns nothing

The paper's reward for being a valid SID is left out: rollouts through the trie are valid, and a constant has no advantage.

q is one number per target, so inside the group of rollouts for one history it only scales the hit. Division of the advantages by the
group's deviation cancels that scale (reference figures: a hit among eight earns 2.646 whatever q is). Here q weighs the advantage
instead: A = q * (r - mean r), which is what multiplying all parts by q and dividing by nothing gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from mmsid.recommend.paths import ItemPaths


class RewardParts(NamedTuple):
    """Parts of the reward of B rollouts, each (B,) float."""

    exact: torch.Tensor
    prefix: torch.Tensor
    quality: torch.Tensor


def reward_parts(
    paths: torch.Tensor, target_paths: torch.Tensor, sharing: torch.Tensor, quality: torch.Tensor, num_levels: int
) -> RewardParts:
    """Score rollouts against their targets.

    Args:
        paths, target_paths: int64 (B, D) codes of the rollouts and of their targets; D = num_levels, or one more with a suffix level.
        sharing: (B,) items that have the target's path, the target included.
        quality: (B,) q of the targets, in [0, 1].
    """
    same = paths == target_paths
    exact = same.all(1).float() / sharing
    prefix = same[:, :num_levels].int().cumprod(1).sum(1).float() / num_levels
    return RewardParts(exact, prefix, quality * exact)


class PathRewards:
    """The parts of the reward as TRL reward functions, each logged by name.

    Args:
        quality: (N,) text quality of the items, in [0, 1].
        num_levels: levels that count for the prefix; a suffix level beyond them does not.
    """

    def __init__(self, paths: ItemPaths, quality: np.ndarray, num_levels: int) -> None:
        self.paths, self.num_levels = torch.from_numpy(paths.tokens), num_levels
        self.offsets = torch.from_numpy(np.cumsum([0, *paths.sizes[:-1]]))
        self.quality = torch.from_numpy(quality).float()
        _, which, counts = np.unique(paths.tokens, axis=0, return_inverse=True, return_counts=True)
        self.sharing = torch.from_numpy(counts[which.reshape(-1)]).float()

    def functions(self, *, weighted: bool) -> list[Callable[..., list[float]]]:
        """One function per part, in the order exact, prefix, quality; `weighted` multiplies each by the target's quality."""

        def part(name: str) -> Callable[..., list[float]]:
            def reward(completion_ids: list[list[int]], target: list[int], **unused: Any) -> list[float]:
                rows = torch.tensor(target)
                drawn = torch.tensor(completion_ids) - self.offsets
                parts = reward_parts(drawn, self.paths[rows], self.sharing[rows], self.quality[rows], self.num_levels)
                value = getattr(parts, name)
                return (value * self.quality[rows] if weighted else value).tolist()

            reward.__name__ = name
            return reward

        return [part(name) for name in ("exact", "prefix", "quality")]
