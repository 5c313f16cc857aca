"""The co-engagement miner: a worked example of four items, and no use of held-out interactions."""

import json
import math

import numpy as np
import pytest
from annotate_stub import rows_of

from mmsid.annotate.coengagement import Phrase, mine_phrases, phrases_json
from mmsid.annotate.interests import InterestsConfig, run
from mmsid.annotate.readers import read_interests
from mmsid.artifacts import read_manifest
from mmsid.catalog import CatalogConfig, co_engagement, read_catalog

TITLES = {"kettle": "red kettle", "stove": "camping stove", "camplamp": "camping lamp", "desklamp": "desk lamp"}


@pytest.fixture
def catalog_config(tmp_path):
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps({"item_id": key, "title": title}) for key, title in TITLES.items()))
    # train prefixes (the last two go to valid and test): u0 kettle-stove; u1 kettle-camplamp, twice kettle-stove over users
    histories = [["kettle", "stove"], ["kettle", "stove", "desklamp", "desklamp"], ["kettle", "camplamp", "desklamp", "desklamp"]]
    (tmp_path / "users.jsonl").write_text(
        "\n".join(json.dumps({"user_id": f"u{at}", "items": items}) for at, items in enumerate(histories))
    )
    return CatalogConfig(items=tmp_path / "items.jsonl", sequences=tmp_path / "users.jsonl", split={"inner_held_out": 0.0})


def test_phrases_of_four_items_worked_by_hand(catalog_config):
    catalog = read_catalog(catalog_config)
    row = catalog.row_of
    histories = [[row["kettle"], row["stove"]], [row["kettle"], row["stove"]], [row["kettle"], row["camplamp"]]]
    weights = co_engagement([np.array(rows) for rows in histories], 4)
    mined = dict(zip(catalog.item_ids, mine_phrases(catalog, weights, {})))
    # kettle's neighbours: stove with weight 2, camplamp with weight 1; phrases of two items: camping (both), lamp (camplamp)
    assert mined["kettle"] == [Phrase("camping", 1.0), Phrase("lamp", round(1 / 3, 4))]
    assert mined["stove"] == mined["camplamp"] == []  # their only neighbour, kettle, shares no word with any item
    assert mined["desklamp"] == []
    assert math.log(5 / 3) + 1 > (math.log(5 / 3) + 1) / 3  # both phrases are equally rare, so support alone ranks them


def test_captions_are_used_and_a_word_pair_replaces_its_words(catalog_config):
    catalog = read_catalog(catalog_config)
    row = catalog.row_of
    weights = co_engagement([np.array([row["kettle"], row["stove"]]), np.array([row["camplamp"], row["stove"]])], 4)
    mined = mine_phrases(catalog, weights, {"stove": "a gas flame for the tent", "camplamp": "gas flame"})
    # "gas flame" is as well supported and as rare as "gas" and "flame": the pair comes first and its words add nothing new
    assert [phrase.text for phrase in mined[row["kettle"]]] == ["gas flame", "camping"]
    assert all("for the" not in phrase.text for phrases in mined for phrase in phrases)


def test_the_stage_writes_the_source_and_the_gate_leaves_out_items_without_coengagement(catalog_config, tmp_path):
    out = run(InterestsConfig(out=tmp_path / "interests", catalog=catalog_config, generator="coengagement", max_quarantined=0.0))
    rows = {row["item_id"]: row for row in rows_of(out, "interests")}
    assert rows["kettle"]["status"] == "ok" and rows["kettle"]["source"] == "coengagement"
    assert rows["desklamp"]["reason"] == "no_coengagement"  # its only interactions are in valid and test
    assert read_manifest(out)["counts"] == {"in": 4, "ok": 1, "quarantined": 3}
    mined = read_interests(out)["kettle"]
    assert mined.source == "coengagement"
    assert [(i.descriptor, i.confidence) for i in mined.descriptors] == [("camping", 1.0), ("lamp", 0.3333)]
    assert mined.summary == "camping, lamp"


def test_phrases_as_json():
    assert json.loads(phrases_json([Phrase("a b", 0.25)])) == [["a b", 0.25]]
