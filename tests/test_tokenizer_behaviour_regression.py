"""The memory of behaviour: a Gaussian process whose noise falls with an item's interactions."""

import math

import pytest
import torch

from mmsid.tokenizer.behaviour_regression import BehaviourRegression, fit_behaviour_regression, kernel


def test_kernel_and_posterior_mean_by_hand() -> None:
    """Two keys at distance 1, length 1: k = exp(-1/2); the posterior mean with noise 1 / n is solved by hand."""
    near = math.exp(-0.5)
    keys = torch.tensor([[0.0], [1.0]])
    assert torch.allclose(kernel(keys, keys, 1.0), torch.tensor([[1.0, near], [near, 1.0]]))
    memory = BehaviourRegression(2, 1)
    memory.keys.copy_(keys)
    # K + diag(1, 1/4) = [[2, k], [k, 1.25]]; misses (3, 5)
    determinant = 2 * 1.25 - near**2
    memory.values.copy_(torch.tensor([[(1.25 * 3 - near * 5) / determinant], [(2 * 5 - near * 3) / determinant]]))
    expected = (1.25 * 3 - near * 5 + near * (2 * 5 - near * 3)) / determinant
    assert memory(torch.tensor([[[0.0]]])).item() == pytest.approx(expected, rel=1e-5)


def test_known_items_are_recalled_rare_ones_are_shrunk_and_strangers_left_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    keys, misses = 3 * torch.randn(300, 8, generator=rng), torch.randn(300, 4, generator=rng)
    misses = torch.cat([misses, torch.zeros(300, 4)], 1)
    count = torch.where(torch.arange(300) < 150, 400, 1)
    misses[150:, :4] += 2 * torch.randn(150, 4, generator=rng)  # what is known from one interaction is mostly noise
    count[299] = 0
    memory = fit_behaviour_regression(keys, misses, count, seed=0)
    assert len(memory.keys) == 299
    recalled = memory(keys[:, None])[:, 0]
    share = (recalled * misses).sum(1) / misses.square().sum(1)
    assert share[:150].mean() > 0.9
    assert share[150:299].mean() < 0.6
    assert memory(torch.full((1, 3, 8), 60.0)).abs().max() < 1e-6


def test_items_of_one_content_share_what_both_know() -> None:
    keys = torch.zeros(4, 2)
    keys[2], keys[3] = torch.tensor([9.0, 0.0]), torch.tensor([0.0, 9.0])
    misses = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    memory = fit_behaviour_regression(keys, misses, torch.tensor([50, 50, 50, 50]), seed=0)
    assert memory(keys[:1, None])[0, 0, 0].item() == pytest.approx(2.0, rel=0.1)


def test_without_known_items_nothing_is_added() -> None:
    memory = fit_behaviour_regression(torch.randn(3, 2), torch.randn(3, 2), torch.zeros(3), seed=0)
    assert (memory(torch.randn(5, 2, 2)) == 0).all()
