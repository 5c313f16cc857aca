"""The stage end to end on a tiny body: a blurred start is refined, a hopeless run keeps its start, foreign SIDs are refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_backbones import tiny_bert

from mmsid.artifacts import is_complete, read_json, read_manifest, read_table, writing
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.errors import ArtifactError
from mmsid.refine.loop import LoopConfig
from mmsid.refine.refine import RefineConfig, run
from mmsid.refine.reward import RewardConfig, SidReward
from mmsid.sids.folder import read_sid_folder
from mmsid.tokenizer import assign, train
from mmsid.tokenizer.inputs import load_inputs
from mmsid.tokenizer.model import BackboneSettings, ItemTokenizer

PRODUCTS = ("shoe", "bag", "lamp", "chair")
COLORS = ("red", "blue", "green")


def _catalog(folder, rng, users=160):
    """48 ads; users stay with one product, so that behaviour agrees with the word that the title hides among others."""
    items = [
        {"item_id": f"i{number}", "title": f"{COLORS[number % 3]} {PRODUCTS[number % 4]} {number}", "description": "new sale for home"}
        for number in range(48)
    ]
    pq.write_table(pa.Table.from_pylist(items), folder / "items.parquet")
    groups = [[item["item_id"] for item in items if item["title"].split()[1] == product] for product in PRODUCTS]
    sequences = [{"user_id": f"u{user}", "items": list(rng.permutation(groups[user % 4])[:7])} for user in range(users)]
    pq.write_table(pa.Table.from_pylist(sequences), folder / "sequences.parquet")
    return CatalogConfig(items=folder / "items.parquet", sequences=folder / "sequences.parquet", split={"inner_held_out": 0.25})


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Catalogue, a tokenizer that knows nothing of behaviour, and its SIDs."""
    folder = tmp_path_factory.mktemp("start")
    catalog = _catalog(folder, np.random.default_rng(0))
    tokenizer = train.run(
        train.TrainTokenizerConfig(
            out=folder / "tokenizer", catalog=catalog, backbone=BackboneSettings(path=tiny_bert(folder / "bert"), max_length=32),
            num_levels=2, codebook_size=8, steps=0, start={"behaviour_dim": 0}, reconstruct="off",
        )
    )  # fmt: skip
    sids = assign.run(assign.AssignConfig(out=folder / "sids", tokenizer=tokenizer, catalog=catalog))
    return {"catalog": catalog, "tokenizer": tokenizer, "sids": sids}


def _config(start, out, **changes):
    weights = {"sid_reward": 1.0, "neighbours": 1.0, "crowding": 0.1}
    loop = LoopConfig(rounds=changes.pop("rounds", 30), lr=1e-3, batch=64, kl=0.01, step_kl=0.3, most_kl=99.0, weights=weights)
    return RefineConfig(**{**start, "out": out, "loop": loop, "reward": RewardConfig(steps=60, least_gain=-1.0), **changes})


def test_refine_writes_a_whole_folder_and_improves(start, tmp_path):
    asked = []
    quick = lambda table: asked.append(table) or {"HR@50": 0.5, "coverage@10": 0.5}  # noqa: E731
    loose = {"raw_collisions": 1.0, "least_perplexity": 1.0, "rebuild": 10.0, "confidence": 0.5}
    out = run(_config(start, tmp_path / "refine", gate=loose), quick_recommender=quick)
    verdict = read_json(out / "gate.json")
    assert verdict["accepted"], verdict
    assert {"target", "lift", "rebuild", "hit_rate", "coverage"} <= {row["metric"] for row in verdict["rows"]} and len(asked) == 2
    before, after = read_sid_folder(start["sids"]), read_sid_folder(out / "sids")
    moved = read_table(out / "moved.parquet").to_pylist()
    assert {row["item_id"] for row in moved} == {
        item for item, old, new in zip(before.item_ids, before.codes.tolist(), after.codes.tolist(), strict=True) if old != new
    }
    assert np.isfinite([row["reward_gained"] for row in moved]).all()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"kl", "approximate_kl", "clip_fraction", "entropy_1", "entropy_2", "reward_sid_reward", "zero_variance_groups",
            "collisions", "perplexity_1", "dead_codes_2", "churn"} <= log[0].keys()  # fmt: skip
    assert read_manifest(out, "refine")["extra"]["accepted"] is True
    # the tokenizer written gives the raw codes written, for everyone
    catalog = read_catalog(start["catalog"])
    tokenizer = ItemTokenizer.from_pretrained(out / "tokenizer")
    inputs, _ = load_inputs(catalog, None, None, tokenizer.settings.use)
    assert (tokenizer.encode(inputs).raw_codes.numpy() == after.align([item.item_id for item in catalog.items]).raw_codes).all()
    assert after.tokenizer_sha256 == tokenizer.sha256() != before.tokenizer_sha256
    assert SidReward.load(out / "reward").names


def test_a_refused_run_keeps_the_start(start, tmp_path):
    config = _config(start, tmp_path / "refine", rounds=2, gate={"confidence": 1.1})
    out = run(config)
    verdict = read_json(out / "gate.json")
    assert not verdict["accepted"] and verdict["reasons"] and is_complete(out)
    before, after = read_sid_folder(start["sids"]), read_sid_folder(out / "sids")
    assert (before.codes == after.codes).all() and before.item_ids == after.item_ids
    old, new = ItemTokenizer.from_pretrained(start["tokenizer"]), ItemTokenizer.from_pretrained(out / "tokenizer")
    assert old.sha256() == new.sha256()
    assert all(torch.equal(a, b) for a, b in zip(old.head.parameters(), new.head.parameters()))


def test_a_reward_no_better_than_distance_stops_the_run_politely(start, tmp_path):
    config = _config(start, tmp_path / "refine", reward=RewardConfig(steps=5, least_gain=1.0))
    out = run(config)
    assert "distances" in read_json(out / "gate.json")["reasons"][0]
    assert "stopped" in json.loads((out / "log.jsonl").read_text()) and (out / "tokenizer" / "config.json").is_file()
    assert read_table(out / "moved.parquet").num_rows == 0


def test_sids_of_another_tokenizer_are_refused(start, tmp_path):
    table = read_sid_folder(start["sids"])
    table.raw_codes = (table.raw_codes + 1) % 8
    with writing(tmp_path / "foreign", stage="assign", config={}) as draft:
        table.save(draft.path / "sids.parquet")
    with pytest.raises(ArtifactError, match="assign SIDs with this tokenizer"):
        run(_config({**start, "sids": tmp_path / "foreign"}, tmp_path / "refine"))


def test_all_trainable_moves_the_adapter_too_and_catalogue_order_does_not_matter(start, tmp_path):
    out = run(_config(start, tmp_path / "refine", trainable="all", rounds=1, gate={"confidence": -1.0, "lift": 9.0, "raw_collisions": 1.0,
                      "least_perplexity": 1.0, "rebuild": 99.0}))  # fmt: skip
    old, new = ItemTokenizer.from_pretrained(start["tokenizer"]), ItemTokenizer.from_pretrained(out / "tokenizer")
    if read_json(out / "gate.json")["accepted"]:
        assert not torch.equal(old.backbone.queries, new.backbone.queries)
