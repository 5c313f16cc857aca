"""The cost table of the README is arithmetic: here it is done by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import roofline


def test_one_entry_worked_by_hand():
    # prefill 2 x (1.7e9 x 406 + .4e9 x 1024) = 2.1996e12 flop: 2.2241 ms at 989e12; decode step 3.4e9 + 256 x 114,688 x 456 =
    # 16.788e9 bytes: 5.0115 ms at 3.35e12, 100 of them shared by 256 pictures: 1.9576 ms
    model, gpu = roofline.MODELS[0], roofline.GPUS[1]
    assert roofline.pictures_per_second(model, gpu, 256, practical=False) == pytest.approx(1e3 / (2.2241 + 1.9576), rel=1e-4)
    assert roofline.pictures_per_second(model, gpu, 256) == pytest.approx(1e3 / (2.2241 / 0.45 + 1.9576 / 0.60), rel=1e-4)


def test_more_tokens_a_bigger_model_or_a_slower_card_cost_more():
    rate = roofline.pictures_per_second
    a100, h100, h200 = roofline.GPUS
    assert all(rate(model, a100, 256) < rate(model, h100, 256) < rate(model, h200, 256) for model in roofline.MODELS)
    assert all(rate(model, h100, 1024) < rate(model, h100, 256) for model in roofline.MODELS)
    assert rate(roofline.MODELS[0], h100, 256) > rate(roofline.MODELS[1], h100, 256) > rate(roofline.MODELS[2], h100, 256)
