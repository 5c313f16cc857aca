"""Weights with NaN are refused wherever they are loaded, trained or used, so that they give no codes, rewards or rankings."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tokenizer_train import settings
from tiny_backbones import tiny_bert
from tiny_catalog import write_annotations, write_catalog

from mmsid.annotate.huggingface import HuggingFaceGenerator
from mmsid.backbone.lora import LoraSettings
from mmsid.backbone.packaged_weights import demo_weights
from mmsid.catalog import read_catalog, split_histories
from mmsid.errors import ArtifactError, ConfigError, MmsidError
from mmsid.recommend.flat import FlatShape
from mmsid.recommend.sid_transformer import SidTransformerShape
from mmsid.recommend.training import Schedule, fit, table_paths
from mmsid.refine.reward import SidReward
from mmsid.sids.table import SidTable
from mmsid.tokenizer import train
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import BackboneSettings, ItemTokenizer, TokenizerSettings

ITEMS = [ItemInput("red shoe"), ItemInput("blue bag for the office")]


def poison(path, name: str) -> None:
    """Set one value to NaN in the first tensor whose name ends in `name`."""
    tensors = load_file(path)
    next(tensor for key, tensor in tensors.items() if key.endswith(name)).view(-1)[0] = math.nan
    save_file(tensors, path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ItemTokenizer:
    body = tiny_bert(tmp_path_factory.mktemp("bert"))
    backbone = BackboneSettings(path=body, max_length=40, lora=LoraSettings(r=2))
    return ItemTokenizer(TokenizerSettings(backbone=backbone, codebook_size=4, code_dim=16, embedding_dim=16)).eval()


def test_a_tokenizer_with_nan_in_its_head_is_not_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert len(ItemTokenizer.from_pretrained(tmp_path).encode(ITEMS).raw_codes) == 2
    poison(tmp_path / "model.safetensors", "emb_head.weight")
    with pytest.raises(
        ArtifactError, match=r"model\.safetensors: emb_head\.weight holds 1 NaN or infinite of \d+ values; restore the file"
    ):
        ItemTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("weight", ["queries", "LayerNorm.weight"])
def test_a_tokenizer_whose_backbone_computes_nan_gives_no_codes(tokenizer, weight):
    found = next(value for name, value in tokenizer.named_parameters() if name.endswith(weight))
    kept = found.detach().clone()
    with torch.no_grad():
        found.view(-1)[0] = math.nan
    try:
        with pytest.raises(MmsidError, match=r"computes NaN or infinite states; its weights .*restore them or train again"):
            tokenizer.encode(ITEMS)
    finally:
        with torch.no_grad():
            found.copy_(kept)


def test_training_stops_before_nan_reaches_the_weights(tmp_path):
    catalog = write_catalog(tmp_path, items=32, users=8)
    captions, interests = write_annotations(tmp_path, catalog)
    world = {"catalog": catalog, "captions": captions, "interests": interests, "bert": tiny_bert(tmp_path / "bert")}
    config = settings(world, tmp_path / "tokenizer", checkpoint_every=1, learning_rate=1e30, head_learning_rate=1e30, reconstruct="off")
    with pytest.raises(MmsidError, match=r"the gradient is (nan|inf) at step [1-5] \(.*loss .*\); lower learning_rate"):
        train.run(config)
    assert not config.out.exists()
    checkpoint = load_file(tmp_path / ".tokenizer.draft" / "checkpoint.safetensors")
    assert all(torch.isfinite(value).all() for name, value in checkpoint.items() if name.startswith("model."))


def test_a_reward_with_nan_is_not_loaded(tmp_path):
    SidReward(["neighbours", "distance"], hidden=4).save(tmp_path, {})
    SidReward.load(tmp_path)
    poison(tmp_path / "reward.safetensors", "behaviour.0.weight")
    with pytest.raises(ArtifactError, match=r"reward\.safetensors: behaviour\.0\.weight holds 1 NaN"):
        SidReward.load(tmp_path)


@pytest.mark.parametrize("shape", [SidTransformerShape(d_model=8, heads=2, hidden=8, layers=1), FlatShape(d_model=8, heads=2, layers=1)])
def test_a_recommender_that_computes_nan_is_not_ranked(tmp_path, shape):
    config = write_catalog(tmp_path, items=32, users=8)
    catalog = read_catalog(config)
    split = split_histories(catalog, config.split)
    codes = np.stack([np.arange(32) // 8, np.arange(32) % 8], axis=1)
    paths = table_paths(SidTable.from_codes(catalog.item_ids, codes, (4, 8)))
    fitted = fit(paths, split, shape=shape, schedule=Schedule(epochs=1))
    fitted.evaluate(split, "valid")
    with torch.no_grad():
        for weight in fitted.model.parameters():
            weight.view(-1)[0] = math.nan
    with pytest.raises(MmsidError, match="scores contain NaN: the recommender diverged or its weights are damaged"):
        fitted.evaluate(split, "valid")


def test_a_captioner_with_nan_is_not_loaded(tmp_path):
    shutil.copytree(demo_weights(), tmp_path / "model")
    poison(tmp_path / "model" / "model.safetensors", "weight")
    with pytest.raises(ConfigError, match="contains NaN or infinite values; copy the model again"):
        HuggingFaceGenerator(tmp_path / "model").model  # noqa: B018 - the property loads the model
