"""Stage `stability`: flip rates under changed pictures and captions, and catalogues without anything to change."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_backbones import tiny_bert, tiny_llava
from tiny_catalog import write_annotations, write_catalog

from mmsid.annotate import caption, interests
from mmsid.annotate.reannotate import reannotate
from mmsid.artifacts import read_json, writing
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.catalog.demo import write_demo_catalog
from mmsid.errors import ConfigError
from mmsid.tokenizer import stability, train
from mmsid.tokenizer.inputs import read_caption_texts, read_mined_interests
from mmsid.tokenizer.model import BackboneSettings


def trained(folder: Path, catalog: CatalogConfig, backbone: BackboneSettings, **changes) -> Path:
    settings = {"codebook_size": 6, "steps": 0, "batch_size": 8, "reconstruct": "off", "backbone": backbone}
    return train.run(train.TrainTokenizerConfig(out=folder / "tokenizer", catalog=catalog, **(settings | changes)))


@pytest.fixture(scope="module")
def pictured(tmp_path_factory) -> CatalogConfig:
    """24 items with one picture each; the last file is truncated."""
    folder = tmp_path_factory.mktemp("pictured")
    rng = np.random.default_rng(0)
    for number in range(24):
        small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        small.resize((40, 48), Image.Resampling.NEAREST).save(folder / f"{number}.png")
    (folder / "23.png").write_bytes((folder / "23.png").read_bytes()[:60])
    rows = [{"item_id": f"i{n}", "title": f"shoe {n % 5}", "image": f"{n}.png"} for n in range(24)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")
    return CatalogConfig(items=folder / "items.parquet")


def test_changed_pictures_are_encoded_again(pictured, tmp_path) -> None:
    backbone = BackboneSettings(path=tiny_llava(tmp_path / "llava"), kind="vlm", max_length=40)
    tokenizer = trained(tmp_path, pictured, backbone)
    config = stability.StabilityConfig(out=tmp_path / "out", tokenizer=tokenizer, catalog=pictured, crop=0.5, jpeg_quality=95)
    report = read_json(stability.run(config) / "stability.json")
    assert report["items"] == 24 and set(report["changes"]) == {"JPEG quality", "crop"}
    gentle, harsh = (report["changes"][name]["flip"]["any"] for name in ("JPEG quality", "crop"))
    assert 0 <= gentle < harsh <= 1, "cropping half the picture changes more codes than mild compression"
    again = stability.run(config.model_copy(update={"out": tmp_path / "again"}))
    assert read_json(again / "stability.json") == report
    assert {path.name for path in again.iterdir()} == {"stability.json", "stability.md", "manifest.json", "SHA256SUMS"}


def test_changed_pictures_are_captioned_by_the_given_function(pictured, tmp_path) -> None:
    def describe(catalog: CatalogConfig, folder: Path, words: str = "") -> tuple[Path, None]:
        """A captioner whose text depends on the item and on `words`."""
        with writing(folder / "caption", stage="caption", config={"words": words}) as draft:
            (draft.path / "shards").mkdir()
            rows = [
                {
                    "item_id": item.item_id,
                    "creative": 0,
                    "caption": f"{words}{item.title} striped red bag for {item.item_id}",
                    "status": "ok",
                    "flags": [],
                }
                for item in read_catalog(catalog).items
            ]
            pq.write_table(pa.Table.from_pylist(rows), draft.path / "shards" / "part-0.parquet")
        return folder / "caption", None

    captions, _ = describe(pictured, tmp_path / "captions")
    backbone = BackboneSettings(path=tiny_bert(tmp_path / "bert"), max_length=40)
    tokenizer = trained(tmp_path, pictured, backbone, captions=captions, use=("caption",))
    config = stability.StabilityConfig(
        out=tmp_path / "out", tokenizer=tokenizer, catalog=pictured, captions=captions, caption_dropout=0.5, max_items=10
    )
    same = read_json(stability.run(config, describe) / "stability.json")
    assert same["items"] == 10
    assert same["changes"]["JPEG quality"]["flip"]["any"] == 0.0, "the captions are the same"
    assert same["changes"]["caption words"]["flip"]["any"] > 0.0
    other = config.model_copy(update={"out": tmp_path / "other"})
    changed = read_json(stability.run(other, lambda catalog, folder: describe(catalog, folder, "noble office lamp ")) / "stability.json")
    figures = changed["changes"]["crop"]
    assert figures["flip"]["any"] > 0.0 and len(figures["flip"]["levels"]) == 3
    assert {"least_sure_quarter", "surest_quarter"} <= figures.keys()
    with pytest.raises(ConfigError, match="must be captioned again"):
        stability.run(config.model_copy(update={"out": tmp_path / "third"}))


def test_nothing_to_change_is_an_error(tmp_path) -> None:
    catalog = write_catalog(tmp_path)
    tokenizer = trained(tmp_path, catalog, BackboneSettings(path=tiny_bert(tmp_path / "bert"), max_length=40))
    with pytest.raises(ConfigError, match="there is nothing to change"):
        stability.run(stability.StabilityConfig(out=tmp_path / "out", tokenizer=tokenizer, catalog=catalog))


@pytest.mark.slow
def test_reannotate_uses_the_same_models(tmp_path) -> None:
    write_demo_catalog(tmp_path / "ads", items=6, users=0, seed=3)
    catalog = CatalogConfig(items=tmp_path / "ads" / "items.parquet")
    captions = caption.run(caption.CaptionConfig(out=tmp_path / "caption", catalog=catalog, batch_size=2))
    mined = interests.run(interests.InterestsConfig(out=tmp_path / "interests", catalog=catalog))
    new_captions, new_mined = reannotate(captions, mined, catalog, tmp_path / "again")
    assert read_caption_texts(new_captions) == read_caption_texts(captions) != {}
    assert read_mined_interests(new_mined) == read_mined_interests(mined)
    assert reannotate(None, None, catalog, tmp_path) == (None, None)
    world = tmp_path / "behaviour"
    world.mkdir()
    _, from_behaviour = write_annotations(world, write_catalog(world, items=32), source="coengagement")
    manifest = read_json(from_behaviour / "manifest.json")
    manifest["config"] = {"out": str(world), "generator": "coengagement", "catalog": {"items": str(world / "items.parquet")}}
    (from_behaviour / "manifest.json").write_text(json.dumps(manifest))
    assert reannotate(None, from_behaviour, catalog, tmp_path / "third") == (None, from_behaviour)
