"""Behaviour regression: a Gaussian process whose noise falls with the number of interactions."""

import math

import pytest
import torch

from mmsid.tokenizer.behaviour_regression import BehaviourRegression, fit_behaviour_regression, kernel


def test_kernel_and_posterior_mean_by_hand() -> None:
    """Two keys at distance 1, length 1: k = exp(-1/2); the posterior mean with noise 1 / n is computed by hand."""
    near = math.exp(-0.5)
    keys = torch.tensor([[0.0], [1.0]])
    assert torch.allclose(kernel(keys, keys, 1.0), torch.tensor([[1.0, near], [near, 1.0]]))
    regression = BehaviourRegression(2, 1)
    regression.keys.copy_(keys)
    # K + diag(1, 1/4) = [[2, k], [k, 1.25]]; residuals (3, 5)
    determinant = 2 * 1.25 - near**2
    regression.values.copy_(torch.tensor([[(1.25 * 3 - near * 5) / determinant], [(2 * 5 - near * 3) / determinant]]))
    expected = (1.25 * 3 - near * 5 + near * (2 * 5 - near * 3)) / determinant
    assert regression(torch.tensor([[[0.0]]])).item() == pytest.approx(expected, rel=1e-5)


def test_frequent_items_are_corrected_fully_rare_ones_partly_and_distant_ones_not_at_all() -> None:
    rng = torch.Generator().manual_seed(0)
    keys, residuals = 3 * torch.randn(300, 8, generator=rng), torch.randn(300, 4, generator=rng)
    residuals = torch.cat([residuals, torch.zeros(300, 4)], 1)
    count = torch.where(torch.arange(300) < 150, 400, 1)
    residuals[150:, :4] += 2 * torch.randn(150, 4, generator=rng)  # one interaction is mostly noise
    count[299] = 0
    regression = fit_behaviour_regression(keys, residuals, count, seed=0)
    assert len(regression.keys) == 299
    correction = regression(keys[:, None])[:, 0]
    share = (correction * residuals).sum(1) / residuals.square().sum(1)
    assert share[:150].mean() > 0.9
    assert share[150:299].mean() < 0.6
    assert regression(torch.full((1, 3, 8), 60.0)).abs().max() < 1e-6


def test_items_of_equal_content_share_their_mean() -> None:
    keys = torch.zeros(4, 2)
    keys[2], keys[3] = torch.tensor([9.0, 0.0]), torch.tensor([0.0, 9.0])
    residuals = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    regression = fit_behaviour_regression(keys, residuals, torch.tensor([50, 50, 50, 50]), seed=0)
    assert regression(keys[:1, None])[0, 0, 0].item() == pytest.approx(2.0, rel=0.1)


def test_without_interactions_the_correction_is_zero() -> None:
    regression = fit_behaviour_regression(torch.randn(3, 2), torch.randn(3, 2), torch.zeros(3), seed=0)
    assert (regression(torch.randn(5, 2, 2)) == 0).all()
