"""Largest learning rate of the heads for a backbone, measured at the start of training.

A step of Adam changes every weight by about the learning rate, so a projected coordinate moves by up to rate x |h|_1, for all items alike.
Where that is more than the targets differ between items, the codes are lost in the first step. MiniLM at the default rate moves by .3
of the targets' deviation. The states of causal language models are long and nearly parallel: SmolLM2 would move by 8.8.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

MAX_MOVE = 0.5  # of the targets' deviation per coordinate


def head_rate_limit(states: Tensor, content: np.ndarray) -> float:
    """The learning rate at which a step moves a projected coordinate by `MAX_MOVE` of the deviation of its target.

    Args:
        states: (n, L, H), the states that the head projects.
        content: (N, D), the content coordinates of the targets.

    Returns:
        Infinity if the targets do not differ, or the states are zero.
    """
    length = float(states.abs().sum(-1).mean())
    deviation = math.sqrt(float(content.var(0).mean()))
    return MAX_MOVE * deviation / length if length > 0 and deviation > 0 else math.inf
