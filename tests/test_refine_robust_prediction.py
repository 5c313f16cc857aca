"""Robust leave-one-out regression: planted outliers, leave-one-out by hand, error growth and proposals."""

import numpy as np
import pytest
import torch

from mmsid.refine.robust_prediction import STRENGTHS, RobustPrediction, _leave_one_out, expected
from mmsid.tokenizer.heads import ParallelHead, ResidualHead

ITEMS, LEVELS, CODES, HIDDEN, DIM = 200, 2, 8, 12, 6


def _planted(seed: int = 0, noise: float = 0.05):
    """States linear in the evidence plus noise, a fifth exchanged between items: evidence, right states, damaged states, mask."""
    rng = np.random.default_rng(seed)
    evidence = rng.normal(size=(ITEMS, 10)).astype(np.float32)
    right = evidence @ rng.normal(size=(10, HIDDEN)) + noise * rng.normal(size=(ITEMS, HIDDEN))
    damaged = right.copy()
    rows = rng.permutation(ITEMS)[: ITEMS // 5]
    damaged[rows] = right[np.roll(rows, 1)]
    broken = np.zeros(ITEMS, bool)
    broken[rows] = True
    return evidence, torch.tensor(right, dtype=torch.float32), torch.tensor(damaged, dtype=torch.float32), broken


def test_exchanged_states_are_predicted_from_the_others_and_get_little_weight():
    evidence, right, damaged, broken = _planted()
    prediction, trust = expected(damaged, evidence)
    error = (prediction - right).square().sum(1)
    assert error[broken].max() < 0.02 * (damaged - right).square().sum(1)[broken].mean()
    assert trust[broken].max() < 0.05 < 0.3 < trust[~broken].median()
    # without reweighting the exchanged states damage all predictions
    plain, even = expected(damaged, evidence, rounds=0)
    assert torch.equal(even, torch.ones(ITEMS, dtype=torch.float64))
    assert (plain - right).square().mean() > 5 * error.mean() / HIDDEN


def test_each_row_is_predicted_by_a_fit_without_it():
    evidence, right, _, _ = _planted(noise=1.0)
    x, y = torch.tensor(evidence)[:30], right[:30]
    weight = torch.linspace(0.2, 1.0, 30, dtype=torch.float64)
    predicted = _leave_one_out(x, y, weight)

    def without(row: int, strength: float) -> torch.Tensor:
        """Weighted ridge of the other rows, the penalty in the units of all rows, the mean unpenalised."""
        mean = (weight @ x.double()) / weight.sum()
        unit = torch.linalg.eigvalsh((x - mean).T @ (weight[:, None] * (x - mean))).mean()
        some = [other for other in range(30) if other != row]
        design = torch.cat([x[some].double(), torch.ones(29, 1, dtype=torch.float64)], 1)
        penalty = strength * unit * torch.diag(torch.tensor([1.0] * 10 + [0.0], dtype=torch.float64))
        weights = torch.linalg.solve(design.T @ (weight[some, None] * design) + penalty, design.T @ (weight[some, None] * y[some].double()))
        return torch.cat([x[row].double(), torch.ones(1, dtype=torch.float64)]) @ weights

    by_hand = {strength: torch.stack([without(row, strength) for row in range(30)]) for strength in STRENGTHS}
    errors = {strength: float((weight[:, None] * (rows - y).square()).sum()) for strength, rows in by_hand.items()}
    assert torch.allclose(predicted.double(), by_hand[min(errors, key=errors.get)], atol=1e-4)


def test_a_row_with_full_leverage_does_not_divide_by_zero():
    evidence = np.zeros((5, 3), np.float32)
    evidence[4] = 1.0  # no other row has this feature
    prediction, trust = expected(torch.arange(10.0).view(5, 2), evidence)
    assert torch.isfinite(prediction).all() and torch.isfinite(trust).all()
    assert torch.isfinite(expected(torch.ones(4, 2), np.ones((4, 3), np.float32)).scores).all()


@pytest.mark.parametrize("kind", ["residual", "parallel"])
def test_candidates_near_the_prediction_are_rewarded_and_proposed(kind):
    evidence, right, damaged, broken = _planted()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = ResidualHead(HIDDEN, LEVELS, CODES, DIM) if kind == "residual" else ParallelHead(HIDDEN, LEVELS, CODES)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.normal_(std=0.5)
    states = lambda values: values[:, None].expand(-1, LEVELS, -1).contiguous()  # noqa: E731
    prediction = RobustPrediction(head, states(damaged), evidence)
    codes = {name: head.greedy(head.project(states(values))).codes.numpy() for name, values in (("right", right), ("damaged", damaged))}
    rows = np.flatnonzero(broken & (codes["right"] != codes["damaged"]).any(1))
    growth = prediction.growth(rows, np.stack([codes["right"][rows], codes["damaged"][rows]], 1))
    assert len(rows) > 20 and (growth[:, 0] < growth[:, 1]).mean() > 0.95
    best = np.zeros((ITEMS, 1, 0), np.int64)
    for _ in range(LEVELS):
        best = np.concatenate([best, prediction.after(np.arange(ITEMS), best)], -1)
    assert (best[rows, 0] == codes["right"][rows]).all(1).mean() > 0.9
    assert np.abs(prediction.growth(np.arange(ITEMS), best)).max() < 1e-6
    with torch.no_grad():  # training the head does not change the prediction
        for parameter in head.parameters():
            parameter.zero_()
    assert np.array_equal(prediction.growth(rows, np.stack([codes["right"][rows], codes["damaged"][rows]], 1)), growth)
