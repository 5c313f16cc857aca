"""What behaviour says beyond content, remembered by content: a Gaussian process on top of the linear projection.

Content predicts a fifth of the behaviour vectors' variance; the rest belongs to the item alone. A tokenizer that may read content
only can still give a known item the codes that its train behaviour asks for, because its content tells which item it is: the
memory holds, for every item with train interactions, what the linear projection misses of its fused vector, under the
item's own projected state as the key. An item close to a key is corrected by it; a new item, far from all keys, keeps the linear
prediction.

How far to trust an item's behaviour depends on how much there is of it. The misses are modelled as one smooth function of the key
plus noise of variance sigma^2 / n_i (n_i train interactions): the posterior mean (Rasmussen & Williams 2006, eq. 2.25)

    m(s) = k(s, keys) (K + diag(sigma^2 / n_i))^-1 misses,    k(s, s') = exp(-|s - s'|^2 / 2 l^2)

returns nearly all of a well-known item's own miss, and for an item seen once mostly what similar items miss. The length l and sigma^2 are
those of the largest marginal likelihood (eq. 2.30, the amplitude profiled out) on a grid.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

MOST = 16_384  # keys; the closed form takes their cube in time, their square in memory
SAMPLE = 1_500  # rows that the marginal likelihood looks at
LENGTHS = (0.25, 0.5, 1.0, 2.0)  # times the median distance of an item to its nearest neighbour
NOISES = (0.1, 0.3, 1.0, 3.0, 10.0)  # sigma^2, relative to the variance of the smooth part


class BehaviourRegression(nn.Module):
    """m(s): `keys` (M, D), `values` (M, D) = (K + noise)^-1 misses, `length` (): buffers. Refinement may train the
    values (`loop.behaviour_rate`), nothing else does."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("values", torch.zeros(size, dim))
        self.register_buffer("length", torch.ones(()))

    def forward(self, s: Tensor) -> Tensor:
        """Correction (B, 1, D) of projected states s (B, L, D): one for all levels, looked up by their mean."""
        return (kernel(s.mean(1), self.keys, self.length) @ self.values)[:, None]


def kernel(x: Tensor, keys: Tensor, length: Tensor | float) -> Tensor:
    """exp(-|x - key|^2 / 2 l^2): x (B, D), keys (M, D) -> (B, M)."""
    squared = x.square().sum(-1, keepdim=True) + keys.square().sum(-1) - 2 * x @ keys.T
    return torch.exp(-squared.clamp_min(0) / (2 * length**2))


@torch.no_grad()
def fit_behaviour_regression(keys: Tensor, misses: Tensor, interactions: Tensor, seed: int) -> BehaviourRegression:
    """Fit the memory.

    Args:
        keys: (n, D) projected states, mean over levels.
        misses: (n, D), fused vector less projected state.
        interactions: (n,) train interactions; items without any teach nothing and are left out.
    """
    known = (interactions > 0).nonzero().flatten()
    rng = np.random.default_rng([seed, 11])
    if len(known) > MOST:  # the best-known items: theirs is the behaviour worth keeping; equals by lot
        order = np.lexsort((rng.permutation(len(known)), -interactions[known].numpy()))
        known = known[np.sort(order[:MOST])]
    keys, misses, count = keys[known].double(), misses[known].double(), interactions[known].double()
    some = torch.from_numpy(np.sort(rng.permutation(len(known))[:SAMPLE]))
    length, noise = _likeliest(keys[some], misses[some], count[some])
    memory = BehaviourRegression(len(known), keys.shape[1])
    if len(known):
        gram = kernel(keys, keys, length)
        gram.diagonal().add_(noise / count)
        memory.values.copy_(torch.cholesky_solve(misses, torch.linalg.cholesky(gram)))
        memory.keys.copy_(keys)
        memory.length.fill_(length)
    return memory


def _likeliest(keys: Tensor, misses: Tensor, count: Tensor) -> tuple[float, float]:
    """The length and the noise of the largest marginal likelihood."""
    if len(keys) < 2:
        return 1.0, NOISES[0]
    nearest = torch.cdist(keys, keys).fill_diagonal_(math.inf).amin(1)
    unit = float(nearest[nearest > 0].median()) if bool((nearest > 0).any()) else 1.0
    found = {(factor * unit, noise): _log_likelihood(keys, misses, count, factor * unit, noise) for factor in LENGTHS for noise in NOISES}
    return max(found, key=lambda key: found[key])


def _log_likelihood(keys: Tensor, misses: Tensor, count: Tensor, length: float, noise: float) -> float:
    """log p(misses) up to a constant, the D columns independent, their common amplitude at its maximum."""
    gram = kernel(keys, keys, length)
    gram.diagonal().add_(noise / count)
    factor = torch.linalg.cholesky(gram)
    white = torch.linalg.solve_triangular(factor, misses, upper=False)
    rows, columns = misses.shape
    amplitude = float(white.square().mean().clamp_min(1e-12))
    return -0.5 * rows * columns * math.log(amplitude) - columns * float(factor.diagonal().log().sum())
