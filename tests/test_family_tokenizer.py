"""The item tokenizer on eight families of vision-language models: training with LoRA, saving, loading, alone as in a batch."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from tiny_backbones import tiny_llava
from tiny_families import FAMILIES, picture
from transformers import AutoConfig

from mmsid.backbone.lora import LoraSettings
from mmsid.backbone.query_tokens import QueryBackbone
from mmsid.backbone.vlm import PICTURE_TOKENS, VlmBackbone
from mmsid.catalog import CatalogConfig
from mmsid.errors import ConfigError
from mmsid.tokenizer.backbones import BackboneSettings
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import ItemTokenizer
from mmsid.tokenizer.train import run as train_tokenizer
from mmsid.tokenizer.train_config import TrainTokenizerConfig


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory) -> str:
    return FAMILIES[request.param](tmp_path_factory.mktemp("family") / request.param)


def items() -> list[ItemInput]:
    """One picture, two, none, no text; portrait, landscape and square; texts of different length."""
    return [
        ItemInput("red shoe", (picture(0, 200, 120),)),
        ItemInput("a blue lamp for the garden and the office", (picture(1, 60, 300), picture(2, 90, 90))),
        ItemInput("no picture at all"),
        ItemInput("", (picture(3, 50, 120),)),
    ]


@torch.no_grad()
def test_states_do_not_depend_on_the_batch_and_depend_on_the_picture(family):
    backbone = VlmBackbone(family, max_length=24, max_pictures=2, picture_tokens=64).eval()
    assert backbone.causal
    together = backbone.read(backbone.collate(items(), pad_to=16)).states
    for row, item in enumerate(items()):
        assert torch.allclose(backbone.read(backbone.collate([item])).states[0], together[row], atol=2e-5)
    other = backbone.read(backbone.collate([ItemInput("red shoe", (picture(9, 200, 120),))])).states[0]
    assert (other - together[0]).abs().amax(-1).min() > 1e-2
    assert not backbone.unread


def test_a_photograph_costs_no_more_than_the_default_budget(family):
    backbone: QueryBackbone = VlmBackbone(family, max_length=24)
    large, small = (backbone.tokens(ItemInput("red shoe", pictures))["input_ids"].shape[1] for pictures in ((picture(0, 3000, 2000),), ()))
    assert 0 < large - small <= PICTURE_TOKENS


def catalogue(folder: Path, count: int = 24) -> CatalogConfig:
    rows = []
    for n in range(count):
        picture(n % 6, 60 + 20 * (n % 3), 90).save(folder / f"{n}.png")
        rows.append({"item_id": f"i{n}", "title": "red shoe " * (1 + n % 4), "image": f"{n}.png", "categories": ["a", "b"][: 1 + n % 2]})
    pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")
    return CatalogConfig(items=folder / "items.parquet")


@pytest.mark.slow
def test_training_with_lora_saving_and_loading(family, tmp_path):
    config = TrainTokenizerConfig(
        out=tmp_path / "tokenizer", catalog=catalogue(tmp_path), use=("title", "pictures"), num_levels=2, codebook_size=8, steps=2,
        batch_size=6, precision="fp32", learning_rate=1e-2,
        backbone=BackboneSettings(kind="vlm", path=family, max_length=16, picture_tokens=64, lora=LoraSettings(r=2)),
    )  # fmt: skip
    folder = train_tokenizer(config)
    tokenizer = ItemTokenizer.from_pretrained(folder)
    adapters = [value for name, value in tokenizer.state_dict().items() if "lora_B" in name]
    assert adapters and all(value.abs().sum() > 0 for value in adapters), "the adapter was trained and saved"
    ads = [{"title": item.text or "x", "images": list(item.pictures)[:1]} for item in items()]
    together, alone = tokenizer.encode(ads), [tokenizer.encode([ad]) for ad in ads]
    assert torch.equal(together.raw_codes, torch.cat([one.raw_codes for one in alone]))
    assert torch.allclose(together.embedding, torch.cat([one.embedding for one in alone]), atol=1e-5)
    saved = tokenizer.save_pretrained(tmp_path / "copy") or tmp_path / "copy"
    again = ItemTokenizer.from_pretrained(saved).encode(ads)
    assert torch.equal(again.raw_codes, together.raw_codes) and torch.allclose(again.embedding, together.embedding, atol=1e-6)
    darker = [ad | {"images": [picture(40 + n, 100, 100)]} for n, ad in enumerate(ads)]
    assert not np.allclose(tokenizer.encode(darker).embedding, together.embedding, atol=1e-3), "pictures reach the embedding"


@pytest.mark.parametrize("model_type", ["mllama", "florence2", "qwen2"])
def test_a_family_without_one_row_of_tokens_is_refused_by_name(model_type, tmp_path):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"family '{model_type}', which reads .*use|family '{model_type}', which reads .*need a decoder"):
        VlmBackbone(str(tmp_path))


def test_bf16_weights_encode_alone_as_in_a_batch(tmp_path):
    path = tiny_llava(tmp_path / "llava")
    backbone = VlmBackbone(path, max_length=24, dtype="bfloat16").eval()
    assert backbone.causal and backbone.model.dtype == torch.bfloat16
    assert VlmBackbone(path).model.dtype == torch.float32, "auto is float32 on a CPU"
