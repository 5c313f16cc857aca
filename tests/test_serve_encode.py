"""Bundles of a run, and `mmsid encode`: new ads become texts, codes and neighbours as the catalogue's own items did."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from serve_world import ColourModel, picture, write_world

import mmsid
from mmsid.artifacts import read_json, read_table
from mmsid.catalog import PictureLimits
from mmsid.catalog.catalog import Catalog
from mmsid.cli import main
from mmsid.errors import ArtifactError, CatalogError, ConfigError, PictureError
from mmsid.serve import annotation
from mmsid.serve.ads import read_ad
from mmsid.serve.bundling import bundle_run
from mmsid.serve.engine import Engine

LIMITS = PictureLimits()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encode")
    run, bundle = write_world(folder)
    return {"folder": folder, "run": run, "bundle": bundle, "images": folder / "data" / "images"}


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    """The bundle names the demo model; tests answer in its place."""
    made = []
    monkeypatch.setattr(annotation, "build_generator", lambda config, record: made.append(ColourModel(record)) or made[-1])
    return made


def records(world) -> dict[str, dict]:
    rows = pq.read_table(world["folder"] / "data" / "items.parquet").to_pylist()
    for row in rows:
        row["image"] = (world["folder"] / "data" / row["image"]).read_bytes()
        row["attributes"] = {name: labels for name, labels in row["attributes"].items() if labels}
    return {row["item_id"]: row for row in rows}


def test_a_bundle_carries_what_new_ads_need(world):
    bundle = mmsid.load_bundle(world["bundle"])
    assert bundle.parts == ("recommender", "annotation", "items")
    assert mmsid.Recommender.from_pretrained(world["bundle"] / "recommender").item_ids == bundle.table.item_ids
    settings = read_json(world["bundle"] / "annotation.json")
    assert settings["caption"]["prompt"]["text"] == "Describe this ad as JSON." and settings["caption"]["fields"] == ["picture"]
    assert settings["interests"]["model"] == "demo" and len(settings["interests"]["prompt"]["sha256"]) == 64
    items = read_table(world["bundle"] / "items.parquet").to_pylist()
    assert [row["item_id"] for row in items] == bundle.table.item_ids and all(row["thumbnail"][8:12] == b"WEBP" for row in items)
    shown = next(row for row in items if row["item_id"] == "i3")
    assert (shown["title"], shown["caption"], shown["interests"]) == ("red chair 3", "a red thing", ["likes red"])
    for path in world["bundle"].rglob("*"):
        if path.suffix in (".json", ".md"):
            assert str(world["folder"]) not in path.read_text().replace(str(world["folder"] / "bert"), ""), path
    assert "Further contents" in (world["bundle"] / "README.md").read_text()


def test_parts_that_are_missing_are_said(world, tmp_path, capsys):
    alone = tmp_path / "alone" / "sids"
    alone.parent.mkdir()
    alone.symlink_to(world["run"] / "assign")
    out = bundle_run(tmp_path / "plain", tokenizer=world["run"] / "train_tokenizer", sids=alone)
    said = capsys.readouterr().err
    for part in ("no recommender", "no settings of the stage caption", "no settings of the stage interests"):
        assert part in said
    engine = Engine(out)
    assert engine.encode([read_ad({"title": "red shoe"}, LIMITS, "ad")])[0].codes.shape == (3,)
    assert any("the bundle has no recommender" in note for note in engine.notes)
    with pytest.raises(ConfigError, match="--run"):
        bundle_run(tmp_path / "none", tokenizer=world["run"] / "train_tokenizer")
    with pytest.raises(ArtifactError, match="no finished stage"):
        bundle_run(tmp_path / "none", run=tmp_path)


def test_an_ad_of_the_catalogue_gets_its_own_codes_and_content_hash(world, colours):
    """The same texts and picture give the content hash, caption, codes and embedding that the stages gave."""
    engine = Engine(world["bundle"])
    given = records(world)
    ads = [read_ad(given[f"i{n}"], LIMITS, "ad") for n in range(12)]
    items = {item.item_id: item for item in Catalog.read(world["run"] / "ingest").items}
    assert all(ad.item.content_sha256 == items[ad.item.item_id].content_sha256 for ad in ads)
    encoded = engine.encode(ads)
    assert [one.texts.caption for one in encoded[:3]] == ["a red thing", "a blue thing", "a green thing"]
    table, embeddings = engine.bundle.table, engine.bundle.embeddings.numpy()
    content = table.source == "content"
    for one in encoded:
        row = table.row_of[one.ad.item.item_id]
        assert np.allclose(one.embedding, embeddings[row], atol=1e-5)
        if content[row]:
            assert one.codes.tolist() == table.raw_codes[row].tolist()
        assert engine.known.nearest(one.embedding[None], 1)[0][0][1] > 0.999
    alone = engine.encode([ads[5]])[0]
    assert alone.codes.tolist() == encoded[5].codes.tolist() and np.allclose(alone.embedding, encoded[5].embedding, atol=1e-5)
    asked = [model.asked for model in colours]
    engine.encode(ads)
    assert [model.asked for model in colours] == asked, "equal ads are answered from memory"


def test_one_ad_as_text_and_as_json(world, capsys):
    picture_file = str(world["images"] / "3.png")
    main(
        ["encode", str(world["bundle"]), "--image", picture_file, "--title", "red chair", "--category", "home", "--attribute", "colour=red"]
    )
    out = capsys.readouterr().out
    assert "a red thing" in out and "likes red 0.80 (for friends of red)" in out and "SID        <a_" in out and "nearest" in out
    main(["encode", str(world["bundle"]), "--image", picture_file, "--title", "red chair", "--json", "--k", "2"])
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "ok" and found["item_id"] == "3" and len(found["nearest"]) == 2 and found["notes"] == []
    assert [step["token"] for step in found["path"]] == found["sid"] and len(found["sid"]) == 3
    counts = [step["items"] for step in found["path"]]
    assert counts == sorted(counts, reverse=True) and counts[0] > 0
    main(["encode", str(world["bundle"]), "--image", picture_file, "--no-caption", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["caption"] is None and found["notes"] == ["captions and interests are switched off"]
    main(["encode", str(world["bundle"]), "--title", "red chair", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["notes"] == ["no caption: no_picture", "no interests: no_picture"]


def test_a_folder_of_pictures(world, tmp_path, capsys):
    for name, data in {"b.png": picture("blue"), "a.png": picture("red"), "white.png": picture("white"), "notes.txt": b"text"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0torn")
    main(["encode", str(world["bundle"]), "--image", str(tmp_path), "--json"])
    done = capsys.readouterr()
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [one["item_id"] for one in found] == ["a", "b", "torn", "white"]
    assert [one["status"] for one in found] == ["ok", "ok", "quarantined", "ok"]
    assert found[0]["caption"] == "a red thing" and found[3]["caption"] is None and "no caption: invalid_json" in found[3]["notes"][0]
    assert "4 ads = 3 ok + 1 quarantined" in done.err


def test_a_table_is_streamed_and_bad_rows_are_reported(world, tmp_path, capsys):
    (tmp_path / "red.png").write_bytes(picture("red"))
    rows = [{"item_id": f"n{n}", "title": f"red shoe {n}", "image": "red.png", "categories": "home|shoe"} for n in range(70)]
    rows[3] |= {"image": "missing.png"}
    rows[40] |= {"image": "../../etc/passwd"}
    rows[69] |= {"title": "", "image": ""}
    lines = ["item_id,title,image,categories", *(",".join(row.values()) for row in rows)]
    (tmp_path / "ads.csv").write_text("\n".join(lines) + "\n")
    main(["encode", str(world["bundle"]), "--table", str(tmp_path / "ads.csv"), "--json", "--k", "1"])
    done = capsys.readouterr()
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [one["item_id"] for one in found] == [f"n{n}" for n in range(70)]
    bad = {one["item_id"]: one["reason"] for one in found if one["status"] == "quarantined"}
    assert set(bad) == {"n3", "n40", "n69"} and "outside" in bad["n40"] and "neither a picture nor a title" in bad["n69"]
    assert "70 ads = 67 ok + 3 quarantined" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to encode"),
        (["--image", "nowhere.png"], "nowhere.png does not exist"),
        (["--title", "x", "--attribute", "oak"], "NAME=LABEL"),
        (["--table", "none.csv"], "none.csv"),
        (["--title", "x", "--k", "-1"], "--k is -1"),
    ],
)
def test_errors_of_the_command_name_the_remedy(world, arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["encode", str(world["bundle"]), *arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 1 and words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"titel": "x"}, "unknown key 'titel'"),
        ({"title": ["x"]}, "title is"),
        ({}, "neither a picture nor a title"),
        ({"title": "x", "vectors": [1.0]}, "vectors"),
        ({"title": "x", "interests": ["a" * 300]}, "300 characters"),
        ({"title": "x", "item_id": "\ud800"}, "surrogate"),
        ({"title": "x", "image": 3}, "picture 1 is a int"),
        ({"title": "x", "images": [b""] * 9}, "9 pictures"),
    ],
)
def test_records_are_checked(record, words):
    with pytest.raises(CatalogError, match=words):
        read_ad(record, LIMITS, "ad")


def test_paths_and_urls_are_not_opened_without_a_folder(world, tmp_path):
    for reference in (str(world["images"] / "1.png"), "file:///etc/passwd", "http://127.0.0.1/a.png", "s3://bucket/a.png"):
        with pytest.raises(PictureError) as caught:
            read_ad({"title": "x", "image": reference}, LIMITS, "ad")
        assert caught.value.reason == "base64"
    (tmp_path / "in").mkdir()
    (tmp_path / "out.png").write_bytes(picture("red"))
    with pytest.raises(PictureError) as caught:
        read_ad({"title": "x", "image": "../out.png"}, LIMITS, "ad", folder=tmp_path / "in")
    assert caught.value.reason == "outside_root"


def test_a_model_that_cannot_be_loaded_is_a_note(world, monkeypatch):
    def missing(config, record):
        raise ConfigError("model 'acme/vlm' is not here")

    monkeypatch.setattr(annotation, "build_generator", missing)
    engine = Engine(world["bundle"])
    assert engine.notes == [f"no {what}: model 'acme/vlm' is not here" for what in ("captions", "interests")]
    assert engine.encode([read_ad({"image": picture("red")}, LIMITS, "ad")])[0].texts.caption == ""


@pytest.mark.slow
def test_the_demo_captioner_of_a_bundle_writes_what_the_stage_wrote(tmp_path, monkeypatch):
    """A drawn ad gets the caption, interests and codes that the pipeline gave it."""
    monkeypatch.undo()
    main(["demo-catalog", str(tmp_path / "demo"), "--items", "60", "--users", "60", "--seed", "1"])
    catalog = {"items": tmp_path / "demo" / "items.parquet", "fields": {"attributes": ["attributes"]}}
    run = tmp_path / "run"
    mmsid.ingest(run / "ingest", catalog)
    shop = run / "ingest"
    mmsid.caption(run / "caption", shop)
    mmsid.interests(run / "interests", shop, captions=run / "caption")
    settings = {"captions": run / "caption", "interests": run / "interests"}
    tokenizer = mmsid.train_tokenizer(
        run / "train_tokenizer", shop, codebook_size=8, steps=2, behaviour="none", reconstruct="off", **settings
    )
    mmsid.assign(run / "assign", shop, tokenizer, **settings)
    engine = Engine(mmsid.bundle(run / "bundle", run=run))
    items = Catalog.read(shop).items[:6]
    plain = [
        {"item_id": item.item_id, "title": item.title, "description": item.description, "categories": list(item.categories)}
        | {"attributes": {name: list(labels) for name, labels in item.attributes.items()}, "images": [p.read_bytes() for p in item.images]}
        for item in items
        if len(item.images) == 1
    ]
    encoded = engine.encode([read_ad(record, LIMITS, "ad") for record in plain])
    captions = {row["item_id"]: row["caption"] for row in read_table(run / "bundle" / "items.parquet").to_pylist()}
    table = engine.bundle.table
    assert len(encoded) >= 3
    for one in encoded:
        item_id = one.ad.item.item_id
        assert one.texts.caption == captions[item_id] and one.texts.interests
        assert one.codes.tolist() == table.raw_codes[table.row_of[item_id]].tolist()
