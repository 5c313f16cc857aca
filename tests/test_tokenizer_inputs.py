"""Inputs of the tokenizer: the text of an item, annotation folders, and interests that must not be read."""

from pathlib import Path

import pytest
from tiny_catalog import write_annotations, write_catalog

from mmsid.catalog import Item, read_catalog
from mmsid.errors import ArtifactError, ConfigError
from mmsid.tokenizer.inputs import MinedInterests, build_inputs, load_inputs, read_caption_texts, read_mined_interests


def item(**facts) -> Item:
    empty = {"title": "", "description": "", "images": (), "categories": (), "attributes": {}, "problems": ()}
    return Item(**({"item_id": "a", "content_sha256": "0"} | empty | facts))


def test_text_of_an_item() -> None:
    full = item(
        title="Red shoe.",
        description="For the city",
        categories=("wear", "shoes"),
        attributes={"season": ("summer", "spring"), "brand": ("Velo",)},
        images=(Path("a.jpg"),),
    )
    mined = {"a": MinedInterests("llm", ("runs daily", "saves money"), "a runner")}
    read = build_inputs([full], {"a": "a red shoe"}, mined)[0]
    assert read.text == (
        "title: Red shoe. caption: a red shoe. interests: runs daily; saves money. categories: wear > shoes. "
        "attributes: brand: Velo; season: summer, spring. description: For the city."
    )
    assert read.pictures == (Path("a.jpg"),)
    assert build_inputs([full], {"a": "a red shoe"}, mined, ["title", "caption"])[0] == type(read)("title: Red shoe. caption: a red shoe.")
    assert build_inputs([item()])[0].text == ""


def test_behavioural_interests_are_never_read() -> None:
    mined = {"a": MinedInterests("coengagement", ("secret",), "secret summary")}
    with pytest.raises(ConfigError, match="co-engagement"):
        build_inputs([item(title="x")], None, mined, ["title", "interests"])
    assert "secret" not in build_inputs([item(title="x")], None, mined)[0].text


def test_annotation_folders(tmp_path) -> None:
    catalog = read_catalog(write_catalog(tmp_path, items=6, users=0, sequences=False))
    captions, interests = write_annotations(tmp_path, write_catalog(tmp_path, items=6, sequences=False))
    texts, mined = read_caption_texts(captions), read_mined_interests(interests)
    assert set(texts) == set(mined) == {"i1", "i2", "i3", "i4"}, "quarantined and sensitive rows are left out"
    assert mined["i1"].descriptors[0].startswith("likes"), "highest confidence first"
    inputs, fields = load_inputs(catalog, captions, interests)
    row = catalog.row_of["i2"]
    assert "caption: a plain blue" in inputs[row].text or "caption: a plain" in inputs[row].text
    assert "interests" in fields
    assert "caption:" not in inputs[catalog.row_of["i5"]].text
    with pytest.raises(ArtifactError, match="no manifest"):
        read_caption_texts(tmp_path / "nowhere")
    assert read_caption_texts(None) == {}
