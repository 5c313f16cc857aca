"""Stage `train_captioner`: training, resuming, catalogues, LoRA on a hub model; accuracy of the packaged weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmsid.accelerator import make_accelerator
from mmsid.annotate.captioner import evaluate
from mmsid.annotate.captioner.config import DEMO_TEMPLATE, Augment, DrawnSource, LoraSection, Phase, TrainCaptionerConfig
from mmsid.annotate.captioner.data import Targets, catalog_set, draw_set
from mmsid.annotate.captioner.model import ModelSizes, build_captioner, build_processor, save_captioner, train_text_tokenizer
from mmsid.annotate.captioner.stage import load_pictures, run, train_from_config
from mmsid.annotate.captioner.template import CaptionTemplate
from mmsid.annotate.captioner.training import make_batch
from mmsid.annotate.prompts import load_prompt
from mmsid.artifacts import read_json, read_manifest, write_table
from mmsid.backbone.packaged_weights import demo_weights
from mmsid.catalog.config import CatalogConfig
from mmsid.catalog.demo import facts as demo
from mmsid.errors import CatalogError, ConfigError

TINY = ModelSizes(
    image_size=48, tower_hidden=32, tower_layers=1, tower_heads=2, tower_intermediate=48, text_hidden=32, text_layers=1, text_heads=2,
    text_intermediate=48, vocabulary=420,
)  # fmt: skip


def phase(steps: int) -> Phase:
    return Phase(steps=steps, batch_size=8, warmup_steps=2, adamw_lr=3e-3)


@pytest.fixture
def photographs(tmp_path):
    """Twelve plain pictures of two colours and two kinds. The last file is damaged."""
    rows = []
    for row in range(12):
        color, kind = ("navy blue", "red")[row % 2], ("mug", "pan")[row // 6]
        Image.new("RGB", (40, 60), (10 + row, 20, 120) if row % 2 == 0 else (200, 20, 10 + row)).save(tmp_path / f"{row}.png")
        rows.append({"item_id": f"i{row}", "image": f"{row}.png", "color": color, "kind": kind if row != 3 else ""})
    (tmp_path / "11.png").write_bytes((tmp_path / "11.png").read_bytes()[:60])
    write_table(tmp_path / "items.parquet", rows)
    return CatalogConfig(items=tmp_path / "items.parquet")


def test_training_on_drawn_cards_writes_a_folder_that_the_auto_classes_load(tmp_path):
    config = TrainCaptionerConfig(
        out=tmp_path / "model", source="drawn", drawn=DrawnSource(cards=40, held_out=4, seen=2),
        sizes=TINY.model_copy(update={"image_size": 96, "patch_size": 24}), vision_warmup=phase(20), captioning=phase(2), joint=phase(20),
    )  # fmt: skip
    run(config)
    manifest = read_manifest(config.out, "train_captioner")
    phases = manifest["extra"]["phases"]
    assert phases["joint"]["steps"] == 20 and phases["joint"]["pictures"] == 160
    assert phases["joint"]["last_loss"] < np.log(420)  # loss of a uniform distribution over the vocabulary
    assert manifest["counts"] == {"training_pictures": 40, "held_out_pictures": 4, "seen_pictures": 2}
    assert set(read_json(config.out / "measured.json")["held_out"]["fields"]) == set(demo.PICTURE_FIELDS)
    assert not (config.out / "state").exists() and not (config.out / "pictures").exists()
    processor, model = AutoProcessor.from_pretrained(config.out), AutoModelForImageTextToText.from_pretrained(config.out)
    texts, _ = evaluate.generate_texts(model, processor, np.zeros((2, 96, 96, 3), np.uint8), "Describe this ad as JSON.", max_new_tokens=3)
    assert len(texts) == 2


def test_interrupted_run_continues_at_its_checkpoint(tmp_path, monkeypatch):
    config = TrainCaptionerConfig(
        out=tmp_path / "model", source="drawn", drawn=DrawnSource(cards=20, held_out=0, seen=0),
        checkpoint_seconds=0,
        sizes=TINY.model_copy(update={"image_size": 96, "patch_size": 24}), vision_warmup=phase(4), captioning=phase(1), joint=phase(2),
    )  # fmt: skip
    from mmsid.annotate.captioner import stage

    make_batch, batches = stage.make_batch, []

    def interrupted_at_the_third_batch(*args):
        batches.append(args[2].tolist())
        if len(batches) == 3:
            raise KeyboardInterrupt
        return make_batch(*args)

    monkeypatch.setattr(stage, "make_batch", interrupted_at_the_third_batch)
    train, _ = load_pictures(config, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train_from_config(config, train, tmp_path, make_accelerator("auto", unused_parameters=True))
    assert read_json(tmp_path / "state" / "progress.json")["step"] == 2
    _, _, history = train_from_config(config, train, tmp_path, make_accelerator("auto", unused_parameters=True))
    assert history["vision_warmup"]["steps"] == 2 and batches[3] == batches[2]  # the third batch is repeated
    assert (tmp_path / "model.safetensors").exists()


def test_a_drawn_set_is_a_prefix_of_a_larger_one_and_all_its_cards_are_held_out(tmp_path):
    small, large = draw_set(tmp_path, 3, seed=4), draw_set(tmp_path, 6, seed=4)
    assert np.array_equal(small.pictures, large.pictures[:3]) and small.captions == large.captions[:3]
    held = draw_set(tmp_path, 3, seed=4, held_out=True)
    triple = [(held.values["product"][row], held.values["color"][row], held.values["pattern"][row]) for row in range(3)]
    for product, color, pattern in triple:
        card = demo.CardFacts(product, color, pattern, "Velo", 10, "SALE", "cork", "spring", "Atlas")
        assert demo.held_out(card)


def test_boxes_follow_the_shift_and_the_mirror(tmp_path):
    from mmsid.annotate.captioner.labels import build_labels

    data = draw_set(tmp_path, 4, seed=1)
    data.boxes = np.full((4, 5, 4), np.nan, dtype=np.float32)
    data.boxes[:, 0] = [40, 40, 50, 50]  # the patch (3, 3) of 12 px
    labels = build_labels(data.values, ("color",), ())
    plain = make_batch(data, labels, np.arange(4), 12, np.random.default_rng(0), Augment(shift=0))
    flipped = make_batch(data, labels, np.arange(4), 12, np.random.default_rng(0), Augment(shift=0, flip=True))
    assert plain.masks[:, 0].nonzero()[:, 1].tolist() == [27] * 4
    mirrored = [not torch.equal(a, b) for a, b in zip(plain.pixels, flipped.pixels, strict=True)]
    assert sum(mirrored) == 2
    for row, is_mirrored in enumerate(mirrored):
        assert flipped.masks[row, 0].nonzero().flatten().tolist() == [28 if is_mirrored else 27]
        assert torch.equal(flipped.pixels[row].flip(-1) if is_mirrored else flipped.pixels[row], plain.pixels[row])


def test_catalogue_pictures_without_boxes(photographs, tmp_path):
    config = TrainCaptionerConfig(
        out=tmp_path / "model", catalog=photographs, caption_template="{color} {kind}", fields=("kind", "color"), digit_fields=(),
        interest_share=0.0, sizes=TINY, vision_warmup=phase(3), captioning=phase(1), joint=phase(2),
        augment=Augment(flip=True, tint=0.1), targets=Targets(held_out_share=0.3),
    )  # fmt: skip
    run(config)
    counts = read_manifest(config.out)["counts"]
    assert counts["training_pictures"] + counts["held_out_pictures"] == 10  # one picture has no kind, another is damaged
    data = catalog_set(photographs, config.targets, config.fields, config.caption_template, 48, tmp_path / "again", 0)
    assert sorted(set(data.captions)) == ["navy blue mug", "navy blue pan", "red mug", "red pan"] and data.boxes is None
    with pytest.raises(CatalogError, match="no column 'gender'"):
        catalog_set(photographs, config.targets, ("gender",), "{gender}", 48, tmp_path / "again", 0)
    with pytest.raises(ConfigError, match="catalog is missing"):
        run(TrainCaptionerConfig(out=tmp_path / "none"))


def test_lora_changes_projections_of_the_language_model_only(photographs, tmp_path):
    tokens = train_text_tokenizer(["Describe this ad as JSON.", '{"caption": "red mug"}'], 400)
    save_captioner(build_captioner(TINY, tokens), build_processor(TINY, tokens), tmp_path / "base")
    common = dict(
        catalog=photographs, caption_template="{color} {kind}", fields=("kind", "color"), digit_fields=(), interest_share=0.0, sizes=TINY,
        base_model=str(tmp_path / "base"), captioning=phase(12),
    )  # fmt: skip
    run(TrainCaptionerConfig(out=tmp_path / "merged", lora=LoraSection(rank=2), **common))
    before, after = (AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict() for name in ("base", "merged"))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all("language_model" in name and "_proj" in name for name in changed)
    with pytest.raises(ConfigError, match="matches no layer"):
        run(TrainCaptionerConfig(out=tmp_path / "wrong", lora=LoraSection(target="nothing"), **common))


def test_lora_labels_are_the_answer_tokens(tmp_path):
    from mmsid.annotate.captioner.lora import conversation_batch
    from mmsid.backbone.chat import ChatFormat

    tokens = train_text_tokenizer(["Describe this ad as JSON.", '{"caption": "red mug"}'], 400)
    processor = build_processor(TINY, tokens)
    pictures = [Image.new("RGB", (48, 48))] * 2
    batch = conversation_batch(
        ChatFormat(processor, "tiny"), pictures, ["Describe."] * 2, ['{"caption": "red mug"}', '{"caption": "a very red mug"}']
    )
    labelled = [tokens.decode(row[row != -100]) for row in batch["labels"]]
    assert labelled == ['{"caption": "red mug"}<end>', '{"caption": "a very red mug"}<end>']
    assert processor.tokenizer.padding_side == "left"


def packaged_captioner_on_drawn_ads(number: int) -> tuple[list[str], list[str], dict[str, list[str]]]:
    folder = demo_weights()
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    from mmsid.catalog.demo.cards import draw_card

    rng = np.random.default_rng(2024)
    facts = [demo.random_facts(rng, held_out_triples=True) for _ in range(number)]
    pictures = np.stack([np.asarray(draw_card(f, rng).image) for f in facts])
    captions, _ = evaluate.generate_texts(model, processor, pictures, load_prompt("caption_demo").text)
    interests, _ = evaluate.generate_texts(model, processor, pictures[:8], load_prompt("interests_demo").text)
    return captions, interests, {field: [str(getattr(f, field)) for f in facts] for field in demo.PICTURE_FIELDS}


def test_packaged_captioner_writes_json():
    captions, interests, truth = packaged_captioner_on_drawn_ads(12)
    assert all(set(json.loads(text)) == {"caption"} for text in captions)
    assert all(set(json.loads(text)) == {"descriptors", "summary"} for text in interests)
    assert evaluate.field_accuracy(captions, truth, CaptionTemplate(DEMO_TEMPLATE, {"product": list(demo.PRODUCTS)})).mean > 0.85
    assert sum(path.stat().st_size for path in demo_weights().iterdir()) < 25e6


@pytest.mark.slow
def test_packaged_captioner_is_accurate_on_held_out_combinations():
    captions, _, truth = packaged_captioner_on_drawn_ads(100)
    scored = evaluate.field_accuracy(captions, truth, CaptionTemplate(DEMO_TEMPLATE, {"product": list(demo.PRODUCTS)}))
    assert scored.parsed == 1.0 and scored.mean >= 0.95 and scored.exact >= 0.8


def test_captions_and_interests_may_come_from_columns(tmp_path):
    Image.new("RGB", (96, 48)).save(tmp_path / "a.png")
    texts = {"text": "one red mug", "mined": '{"summary": "x"}'}
    write_table(tmp_path / "items.parquet", [{"item_id": "a", "image": "a.png", "kind": "mug", **texts}])
    targets = Targets(caption_column="text", interests_column="mined")
    data = catalog_set(CatalogConfig(items=tmp_path / "items.parquet"), targets, ("kind",), "{nothing}", 48, tmp_path / "p", 0)
    assert data.captions == ["one red mug"] and data.interests == ['{"summary": "x"}'] and data.values == {"kind": ["mug"]}
