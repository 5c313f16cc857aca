"""Training does not lose the codes of its start where the states of a backbone are long and nearly parallel, as in language models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_tokenizer_train import settings
from tiny_backbones import tiny_bert
from tiny_catalog import write_annotations, write_catalog
from transformers import AutoModel, AutoTokenizer

from mmsid.artifacts import read_json, read_manifest
from mmsid.tokenizer import train
from mmsid.tokenizer.head_rate import MAX_MOVE, head_rate_limit
from mmsid.tokenizer.model import BackboneSettings


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    """A tiny encoder, and the same one with a large constant in every state."""
    folder = tmp_path_factory.mktemp("world")
    catalog = write_catalog(folder)
    captions, interests = write_annotations(folder, catalog)
    plain = tiny_bert(folder / "bert")
    model = AutoModel.from_pretrained(plain)
    with torch.no_grad():
        model.encoder.layer[-1].output.LayerNorm.bias.add_(30.0)
    model.save_pretrained(folder / "long")
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder / "long")
    return {"catalog": catalog, "captions": captions, "interests": interests, "bert": plain, "long": str(folder / "long")}


def codes_loss(world: dict, out, path: str) -> tuple[list[float], dict]:
    folder = train.run(settings(world, out, backbone=BackboneSettings(path=path, max_length=40), steps=8, reconstruct="off"))
    return [row["codes"] for row in read_json(folder / "training.json")["history"]], read_manifest(folder)["extra"]


def test_the_limit_by_hand():
    states = torch.tensor([[[3.0, -1.0]], [[1.0, 3.0]]])  # lengths 4 and 4
    content = np.array([[0.0, 2.0], [0.0, 0.0]], np.float32)  # variances 0 and 1, so the deviation per coordinate is the root of .5
    assert head_rate_limit(states, content) == pytest.approx(MAX_MOVE * 0.5**0.5 / 4)
    assert head_rate_limit(states, np.ones((2, 2), np.float32)) == float("inf")


def test_long_parallel_states_lower_the_rate_of_the_heads_and_keep_the_codes(world, tmp_path, capsys, monkeypatch):
    losses, extra = codes_loss(world, tmp_path / "limited", world["long"])
    assert extra["head_learning_rate"] < 2e-5
    assert "the heads learn with" in " ".join(capsys.readouterr().err.split())
    assert losses[-1] < losses[0]
    monkeypatch.setattr("mmsid.tokenizer.training.head_rate_limit", lambda states, content: float("inf"))
    lost, extra = codes_loss(world, tmp_path / "free", world["long"])
    assert "head_learning_rate" not in extra
    assert np.mean(lost) > 2 * np.mean(losses) and max(lost) > 2 * max(losses)  # single steps differ between processors


def test_ordinary_states_keep_the_configured_rate(world, tmp_path):
    assert "head_learning_rate" not in codes_loss(world, tmp_path / "plain", "minilm")[1]
