"""The flat decoder and the encoder-decoder learn with the same training function as the SID transformer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_recommend_train import BRIEF, config_for, write_catalogue, write_sids

from mmsid.catalog.splits import Split
from mmsid.errors import ConfigError
from mmsid.recommend import train
from mmsid.recommend.flat import FlatShape
from mmsid.recommend.history_encoder import pad_histories
from mmsid.recommend.paths import item_paths
from mmsid.recommend.tiger import TigerShape
from mmsid.recommend.train import ModelConfig
from mmsid.recommend.training import Schedule, build, fit

SIZES = {"d_model": 32, "heads": 2, "hidden": 64, "layers": 1, "dropout": 0.0, "max_history": 3}
SHAPES = {"flat": FlatShape(**SIZES), "tiger": TigerShape(**SIZES)}
LR = {"flat": 0.01, "tiger": 0.003}
ITEMS = 30


def circle_split(users: int = 120) -> Split:
    """Histories where item i + 1 (mod 30) follows item i; 2 to 6 items precede the two targets."""
    rng = np.random.default_rng(0)
    histories = [(np.arange(rng.integers(4, 9)) + rng.integers(ITEMS)) % ITEMS for _ in range(users)]
    return Split(
        train=[history[:-2] for history in histories],
        before_test=[history[:-1] for history in histories],
        valid=np.array([history[-2] for history in histories]),
        test=np.array([history[-1] for history in histories]),
        held_out=np.zeros(users, dtype=bool),
    )


def circle_paths():
    codes = np.random.default_rng(1).permutation(36)[:ITEMS]
    return item_paths(np.stack([codes // 6, codes % 6], 1), None, (6, 6))


@pytest.mark.parametrize("architecture", SHAPES)
def test_a_deterministic_next_item_is_learned(architecture):
    split, paths = circle_split(), circle_paths()
    schedule = Schedule(epochs=30, batch_size=32, lr=LR[architecture], patience=30)
    fitted = fit(paths, split, shape=SHAPES[architecture], schedule=schedule, seed=0)
    assert fitted.best > 0.95 and fitted.epochs == 30 and fitted.seconds > 0
    assert fitted.evaluate(split, "test", beam=10).summary()["HR@1"] > 0.9  # chance is 1 / 30
    again = fit(paths, split, shape=SHAPES[architecture], schedule=Schedule(epochs=2, batch_size=32), seed=7)
    repeated = fit(paths, split, shape=SHAPES[architecture], schedule=Schedule(epochs=2, batch_size=32), seed=7)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), repeated.model.parameters(), strict=True))


@pytest.mark.parametrize("architecture", SHAPES)
def test_the_loss_is_the_likelihood_of_every_position_of_every_prefix(architecture):
    """The batched one-pass loss equals the sum of the losses of single positions, despite padding."""
    torch.manual_seed(0)
    codes = np.array([[0, 1], [0, 1], [0, 2], [1, 1], [1, 0]])
    paths = item_paths(codes, np.array([0, 1, -1, -1, -1]), (2, 3)).tokens
    model = build(item_paths(codes, np.array([0, 1, -1, -1, -1]), (2, 3)), SHAPES[architecture]).eval()
    histories = [np.array([0, 3, 1]), np.array([2]), np.array([4, 4, 2, 0])]
    with torch.no_grad():
        together = model(pad_histories(histories, 4)).item()
        total = 0.0
        for history in histories:
            for place, item in enumerate(history):
                steps = model.steps(pad_histories([history[:place]], 3))
                logits = steps.start()
                for level, code in enumerate(paths[item]):
                    children = np.unique(paths[(paths[:, :level] == paths[item, :level]).all(1), level])
                    total -= torch.log_softmax(logits[0, 0, children], 0)[children.tolist().index(code)].item()
                    if level + 1 < len(model.sizes):
                        logits = steps.step(level + 1, torch.zeros(1, 1, dtype=torch.long), torch.tensor([[code]]))
    assert together == pytest.approx(total, abs=1e-3)
    assert torch.isfinite(model(torch.tensor([[2]])))  # one item, nothing before it


def test_the_stage_trains_the_configured_architecture(tmp_path):
    folder = tmp_path / "data"
    write_sids(folder / "random.parquet", write_catalogue(folder))
    for architecture in SHAPES:
        train.run(
            config_for(
                folder, out=folder / architecture, architecture=architecture, classical_baselines=False, schedule=BRIEF | {"epochs": 1}
            )
        )
        (row,) = json.loads((folder / architecture / "metrics.json").read_text())["arms"]
        assert 0 <= row["metrics"]["NDCG@10"]["mean"] <= 1 and row["seconds"] > 0


def test_omitted_sizes_are_the_defaults_of_the_architecture():
    assert ModelConfig(layers=3).shape("tiger") == TigerShape(layers=3)
    assert ModelConfig().shape("flat") == FlatShape()
    with pytest.raises(ConfigError, match="d_model 130 is not a multiple of heads 4"):
        ModelConfig(d_model=130).shape("tiger")
