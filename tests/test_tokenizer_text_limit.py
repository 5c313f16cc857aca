"""What the limit on text tokens cuts off is counted and reported, and a vision-language model without pictures is refused."""

import numpy as np
import pytest
from test_refine_stage import make_catalog
from tiny_backbones import tiny_bert, tiny_llava, tiny_tokenizer

from mmsid.artifacts import read_manifest
from mmsid.errors import ConfigError
from mmsid.tokenizer import train
from mmsid.tokenizer.model import BackboneSettings
from mmsid.tokenizer.text_limit import cut_texts

FIELDS = ("title", "caption", "interests")


def test_cut_fields_by_hand():
    tokenizer = tiny_tokenizer()
    texts = ["title: red shoe. caption: red shoe. interests: red.", "title: red."]
    length = len(tokenizer(texts[0], add_special_tokens=False)["input_ids"])
    caption = len(tokenizer("title: red shoe. caption: red shoe.", add_special_tokens=False)["input_ids"])
    assert cut_texts(texts, FIELDS, tokenizer, length) is None and cut_texts([], FIELDS, tokenizer, 1) is None
    whole_caption = cut_texts(texts, FIELDS, tokenizer, caption)
    assert whole_caption == (1, length, {"interests": 1})
    assert cut_texts(texts, FIELDS, tokenizer, caption - 2).fields == {"caption": 1, "interests": 1}
    assert cut_texts(texts * 2, FIELDS, tokenizer, 3).items == 4
    assert "max_length=5" in whole_caption.describe(5, 2) and "interests (1)" in whole_caption.describe(5, 2)


def _config(folder, **changes):
    common = {"out": folder / "tokenizer", "catalog": make_catalog(folder, np.random.default_rng(0)), "num_levels": 2, "codebook_size": 8}
    return train.TrainTokenizerConfig(**common | {"steps": 0, "reconstruct": "off"} | changes)


def test_training_reports_what_is_cut_off(tmp_path):
    backbone = BackboneSettings(path=tiny_bert(tmp_path / "bert"), max_length=24)
    with pytest.warns(UserWarning, match=r"max_length=24 cuts the texts of 48 of 48 items; not read to the end: description \(48\)"):
        train.run(_config(tmp_path, backbone=backbone, use=("title", "description")))
    assert read_manifest(tmp_path / "tokenizer", "train_tokenizer")["extra"]["cut_texts"]["items"] == 48


def test_a_vision_language_model_without_pictures_is_refused(tmp_path):
    backbone = BackboneSettings(kind="vlm", path=tiny_llava(tmp_path / "llava"), max_length=24)
    with pytest.raises(ConfigError, match=r"reads title and no pictures; add pictures to train_tokenizer\.use"):
        train.run(_config(tmp_path, backbone=backbone, use=("title",)))
    with pytest.raises(ConfigError, match=r"none of the 48 items has a picture; set catalog\.fields\.image"):
        train.run(_config(tmp_path, backbone=backbone))
