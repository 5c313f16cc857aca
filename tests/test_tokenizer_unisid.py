"""`loss: unisid`: implied settings, single-key ablations, and the weights that each loss trains."""

from pathlib import Path

import pytest
import torch
from tiny_backbones import tiny_bert, tiny_decoder
from tiny_catalog import write_annotations, write_catalog

from mmsid import stages
from mmsid.artifacts import read_json, read_tensors
from mmsid.backbone.lora import LoraSettings
from mmsid.config import load_yaml
from mmsid.recommend.bench.files import load_suite
from mmsid.tokenizer import train
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import BackboneSettings, ItemTokenizer

CONFIG = Path(__file__).parents[1] / "configs" / "unisid.yaml"
ABLATIONS = {  # override -> remaining losses
    "weights.contrast=0": {"embedding", "reconstruction"},
    "weights.embedding=0": {"contrast", "reconstruction"},
    "reconstruct=off": {"contrast", "embedding"},
    "reconstruct=attributes": {"contrast", "embedding", "reconstruction"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("unisid")
    catalog = write_catalog(folder)
    captions, interests = write_annotations(folder, catalog)
    return {"catalog": catalog, "captions": captions, "interests": interests, "folder": folder, "causal": tiny_decoder(folder / "qwen")}


def unisid_config(*overrides: str) -> train.TrainTokenizerConfig:
    """The shipped configuration, with overrides of its tokenizer."""
    return stages.stage_configs(load_yaml(CONFIG, [f"train_tokenizer.{one}" for one in overrides]), str(CONFIG))["train_tokenizer"]


def test_the_shipped_configuration_is_the_published_loss() -> None:
    config = unisid_config()
    weights = config.resolved_weights()
    assert (weights.contrast, weights.embedding, weights.reconstruction) == (1.0, 1.0, 0.1), "L_sid + L_emb + 0.1 L_rec"
    assert (weights.codes, weights.regression) == (0.0, 0.0), "none of our losses"
    assert config.resolved_head() == "parallel" and config.resolved_start().mode == "random"
    assert not config.uses_coengagement(config.finest) and not config.uses_coengagement(config.partners), "categories only"
    assert config.reconstruct_from == "states", "continuous states, not codes"


def test_one_key_changes_one_setting_and_survives_serialization() -> None:
    whole = unisid_config().resolved_weights()
    without = unisid_config("weights.contrast=0")
    assert without.resolved_weights() == whole.model_copy(update={"contrast": 0.0})
    written = without.model_dump_json()
    assert train.TrainTokenizerConfig.model_validate_json(written).model_dump_json() == written
    assert unisid_config("start.window=2").resolved_start().mode == "random"
    ours = train.TrainTokenizerConfig(out="x", catalog={"items": "y"}, weights={"contrast": 0.3}).resolved_weights()
    assert (ours.codes, ours.contrast, ours.embedding) == (1.0, 0.3, 0.1)


@pytest.mark.parametrize("ablation", [None, *ABLATIONS])
def test_training_on_a_causal_backbone_uses_the_configured_losses(world, tmp_path, ablation) -> None:
    small = {"steps": 3, "batch_size": 16, "decoder_steps": 5, "codebook_size": 8, "use": ("title", "caption", "categories")}
    small["backbone"] = BackboneSettings(path=world["causal"], max_length=40, lora=LoraSettings(r=2))
    changes = small | {name: world[name] for name in ("catalog", "captions", "interests")} | {"out": tmp_path / "out"}
    out = train.run(unisid_config(*([ablation] if ablation else [])).model_copy(update=changes))
    tokenizer = ItemTokenizer.from_pretrained(out)
    assert tokenizer.backbone.causal and tokenizer.settings.head == "parallel"
    history = read_json(out / "training.json")
    assert set(history["history"][0]) == {"loss"} | ABLATIONS.get(ablation, {"contrast", "embedding", "reconstruction"})
    assert history["reconstruct"] == {"reconstruct=off": "off", "reconstruct=attributes": "attributes"}.get(ablation, "summary")
    started = ItemTokenizer(tokenizer.settings).state_dict()
    moved = {name for name, weight in read_tensors(out / "model.safetensors").items() if not torch.equal(weight, started[name])}
    heads = {f"head.levels.{level}.{part}" for level in range(3) for part in ("weight", "bias")}
    assert (heads <= moved) == (ablation != "weights.contrast=0"), "only the contrast trains the heads"
    assert ("emb_head.weight" in moved) == (ablation != "weights.embedding=0") and "backbone.queries" in moved


def test_suite_rows_differ_by_one_key() -> None:
    suite = load_suite("tokenizer")
    chosen = {name: arm.tokenizer for name, arm in suite.arms.items() if arm.tokenizer is not None}
    base = chosen["unisid"]
    assert chosen["ours"] == {} and base["loss"] == "unisid"
    for name, keys in chosen.items():
        own = {key: value for key, value in keys.items() if key not in base} if name.startswith("unisid_") else keys
        if name.startswith("pixels"):
            assert own.keys() == {"use", "backbone"}, f"{name} changes {own}; pictures need a vision-language backbone"
        elif name == "titles_colours_efficientnet":
            assert own == chosen["titles_alone"] | chosen["colours_efficientnet"]
        elif name not in ("ours", "unisid", "suffix", "colliding"):
            assert len(own) == 1, f"{name} changes {own}"
            inner = next(iter(own.values()))
            assert not isinstance(inner, dict) or len(inner) == 1, f"{name} changes {inner}"
    assert suite.arms["suffix"].collisions == "suffix" and "unisid" in load_suite("sid_methods").arms


def test_fields_left_out_and_pooled_states(world, tmp_path) -> None:
    backbone = BackboneSettings(path=tiny_bert(tmp_path / "bert"), max_length=40, states="pooled")
    config = {"codebook_size": 8, "steps": 1, "batch_size": 8, "reconstruct": "off", "backbone": backbone, "without": ("caption", "title")}
    folders = {name: world[name] for name in ("catalog", "captions", "interests")}
    tokenizer = ItemTokenizer.from_pretrained(train.run(train.TrainTokenizerConfig(out=tmp_path / "out", **folders, **config)))
    assert not {"caption", "title"} & set(tokenizer.settings.use) and "interests" in tokenizer.settings.use
    with torch.no_grad():
        h, e = tokenizer.hidden(tokenizer.collate([ItemInput("red shoe")]))
    assert torch.equal(h[0, 0], h[0, 2]) and torch.equal(h[0, 0, : e.shape[1]], e[0]), "the same state for all tokens"
