"""Losses against values computed by hand."""

import math

import pytest
import torch

from mmsid.tokenizer import losses


def test_supervised_contrast_by_hand() -> None:
    # cosines: (0,1) = 0, (0,2) = -1, (1,2) = 0; tau 1; the only positive pair is (0, 1)
    z = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    positives = torch.zeros(3, 3, dtype=torch.bool)
    positives[0, 1] = positives[1, 0] = True
    first = -math.log(1 / (1 + math.exp(-1)))
    second = -math.log(1 / 2)
    assert losses.supervised_contrast(z, z, positives, tau=1.0).item() == pytest.approx((first + second) / 2, abs=1e-6)
    # two positives of one anchor are averaged inside the log-share
    positives[:] = False
    positives[0, 1] = positives[0, 2] = True
    share = math.log(1 + math.exp(-1))
    assert losses.supervised_contrast(z, z, positives, tau=1.0).item() == pytest.approx(((0 + share) + (1 + share)) / 2, abs=1e-6)
    assert losses.supervised_contrast(z, z, torch.zeros(3, 3, dtype=torch.bool)).item() == 0.0


def test_gathered_candidates_give_the_same_value() -> None:
    torch.manual_seed(0)
    z = torch.randn(6, 2, 4)
    categories = torch.tensor([[0, 0], [0, 1], [1, 2], [1, 2], [0, 1], [1, 3]])
    positives = (categories[:, None] == categories[None]).permute(2, 0, 1) & ~torch.eye(6, dtype=torch.bool)
    whole = losses.multi_granularity_contrast(z, z, positives)
    first = losses.supervised_contrast(z[3:, 0], z[:, 0], positives[0, 3:], own=torch.arange(3, 6))
    by_hand = losses.supervised_contrast(z[:3, 0], z[:, 0], positives[0, :3])
    level = losses.supervised_contrast(z[:, 0], z[:, 0], positives[0])
    assert level.item() == pytest.approx((first.item() + by_hand.item()) / 2, abs=1e-6)
    assert whole.item() == pytest.approx((level + losses.supervised_contrast(z[:, 1], z[:, 1], positives[1])).item() / 2, abs=1e-6)


def test_info_nce_by_hand() -> None:
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    partners = torch.tensor([[5.0, 0.0], [1.0, 0.0]])
    first = math.log(2)  # both partners at cosine 1
    second = math.log(2)  # both at cosine 0
    assert losses.info_nce(anchors, partners, tau=1.0).item() == pytest.approx((first + second) / 2, abs=1e-6)
    assert losses.info_nce(anchors, partners, torch.tensor([False, True]), tau=1.0).item() == pytest.approx(second, abs=1e-6)
    everything = torch.ones(2, 2, dtype=torch.bool)
    assert losses.info_nce(anchors, partners, excluded=everything).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.info_nce(anchors, partners, torch.zeros(2, dtype=torch.bool)).item() == 0.0


def test_code_cross_entropy_and_regression_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]]])
    assert losses.code_cross_entropy(logits, torch.tensor([[1, 0]])).item() == pytest.approx((-math.log(0.75) + math.log(2)) / 2, abs=1e-6)
    s = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert losses.space_regression(s, torch.tensor([[0.0, 0.0]])).item() == pytest.approx((1 + 4) / 2 / 2)


def test_sequence_nll_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    ids, mask = torch.tensor([[1, 0], [0, 0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    values = losses.sequence_nll(logits, ids, mask)
    assert values[0].item() == pytest.approx((math.log(2) - math.log(0.75)) / 2, abs=1e-6) and values[1].item() == 0.0
