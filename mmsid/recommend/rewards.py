"""Rewards of recommended SIDs for reinforcement, after arXiv 2604.20861: exact hit, common prefix and text quality.

r = exact + prefix_weight * prefix + quality_weight * quality. The paper's reward for a valid SID is omitted, because
rollouts through the trie are always valid. The quality q of a target only scales the reward inside a group of rollouts,
and dividing advantages by the group's standard deviation cancels it. Here q weights the advantage: A = q * (r - mean r).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from mmsid.recommend.paths import ItemPaths


class RewardParts(NamedTuple):
    """Parts of the reward of B rollouts, each float (B,).

    Attributes:
        exact: 1 / n if the path is the target's and n items share it, else 0.
        prefix: length of the common prefix with the target / number of levels, without the collision suffix.
        quality: q of the target times `exact`; a well-described wrong item earns nothing.
    """

    exact: torch.Tensor
    prefix: torch.Tensor
    quality: torch.Tensor


def reward_parts(
    paths: torch.Tensor, target_paths: torch.Tensor, sharing: torch.Tensor, quality: torch.Tensor, num_levels: int
) -> RewardParts:
    """Score rollouts against their targets.

    Args:
        paths, target_paths: int64 (B, D), codes of the rollouts and of their targets; D = num_levels, plus one with a suffix level.
        sharing: (B,), number of items with the target's path, including the target.
        quality: (B,), q of the targets, in [0, 1].
    """
    same = paths == target_paths
    exact = same.all(1).float() / sharing
    prefix = same[:, :num_levels].int().cumprod(1).sum(1).float() / num_levels
    return RewardParts(exact, prefix, quality * exact)


class PathRewards:
    """Parts of the reward as TRL reward functions, each logged under its own name.

    Args:
        quality: (N,), text quality of the items, in [0, 1].
        num_levels: number of levels that count for the prefix, without a suffix level.
    """

    def __init__(self, paths: ItemPaths, quality: np.ndarray, num_levels: int) -> None:
        self.paths, self.num_levels = torch.from_numpy(paths.tokens), num_levels
        self.offsets = torch.from_numpy(np.cumsum([0, *paths.sizes[:-1]]))
        self.quality = torch.from_numpy(quality).float()
        _, group, counts = np.unique(paths.tokens, axis=0, return_inverse=True, return_counts=True)
        self.sharing = torch.from_numpy(counts[group.reshape(-1)]).float()

    def functions(self, *, weighted: bool) -> list[Callable[..., list[float]]]:
        """One function per part, in the order exact, prefix, quality. `weighted` multiplies each by the target's quality."""

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
