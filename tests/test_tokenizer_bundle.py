"""Code renaming after retraining, bundles, and equal raw codes in a new process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_backbones import tiny_bert
from tiny_catalog import write_catalog

from mmsid.artifacts import read_json, read_manifest
from mmsid.backbone.lora import LoraSettings
from mmsid.catalog import read_catalog, split_histories
from mmsid.cli import main
from mmsid.errors import ArtifactError, ConfigError
from mmsid.sids import SidTable
from mmsid.sids.churn import churn_report
from mmsid.tokenizer import assign, train
from mmsid.tokenizer.behaviour import behaviour_of_catalog
from mmsid.tokenizer.bundle import load_bundle, write_bundle
from mmsid.tokenizer.inputs import load_inputs
from mmsid.tokenizer.model import BackboneSettings, ItemTokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("bundle")
    world = {"folder": folder, "catalog": write_catalog(folder), "bert": tiny_bert(folder / "bert")}
    world |= dict(zip(("tokenizer", "sids"), published(world, "first")))
    world["bundle"] = write_bundle(world["tokenizer"], world["sids"], folder / "bundle")
    return world


def published(world: dict, name: str, **changes) -> tuple[Path, Path]:
    backbone = BackboneSettings(path=world["bert"], max_length=40, lora=LoraSettings(r=2))
    settings = {"codebook_size": 6, "steps": 2, "batch_size": 8, "backbone": backbone, "reconstruct": "off"} | changes
    tokenizer = train.run(train.TrainTokenizerConfig(out=world["folder"] / name / "tokenizer", catalog=world["catalog"], **settings))
    return tokenizer, assign.run(
        assign.AssignConfig(out=world["folder"] / name / "sids", tokenizer=tokenizer, catalog=world["catalog"], collisions="none")
    )


@pytest.mark.parametrize("head", ["residual", "parallel"])
def test_a_retrained_tokenizer_agrees_with_published_codes(world, head, capsys) -> None:
    changes = {"seed": 3, "steps": 6, "head": head}
    free, free_sids = published(world, f"{head}-free", **changes)
    bound, bound_sids = published(world, f"{head}-bound", align_codes_to=world["sids"], **changes)
    old, loose, renamed = (SidTable.load(path) for path in (world["sids"], free_sids, bound_sids))
    unnamed, named = churn_report(old, loose), churn_report(old, renamed)
    assert named["kept_together"] == unnamed["kept_together"], "renaming does not change the groups"
    assert named["changed"]["levels"] == named["changed_if_renamed"]["levels"] == unnamed["changed_if_renamed"]["levels"]
    assert all(a < b for a, b in zip(named["changed"]["levels"], unnamed["changed"]["levels"]))
    found = read_json(bound / "training.json")["figures"]["renamed"]
    assert found["shared"] == 64 and np.allclose(found["agreement"]["after"], 1 - np.array(named["changed"]["levels"]))
    assert read_json(free / "config.json")["tokenizer_sha256"] != read_json(bound / "config.json")["tokenizer_sha256"]
    main(["churn", str(world["sids"]), str(bound_sids), "--out", str(world["folder"] / "churn.json")])
    assert "64 items in both tables" in capsys.readouterr().out and read_json(world["folder"] / "churn.json") == named


def test_renaming_needs_the_same_sizes(world) -> None:
    with pytest.raises(ConfigError, match=r"codebooks \(6, 6, 6\), this tokenizer 3 of 5"):
        published(world, "other", codebook_size=5, align_codes_to=world["sids"])


FRESH = """
import json, sys
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import ItemTokenizer
texts, vectors, interactions = json.load(sys.stdin)
items = [ItemInput(text) for text in texts]
codes = ItemTokenizer.from_pretrained(sys.argv[1]).encode(items, behaviour=vectors, interactions=interactions).raw_codes
print(json.dumps(codes.tolist()))
"""


@pytest.mark.slow
def test_a_fresh_process_gives_the_published_raw_codes(world) -> None:
    catalog = read_catalog(world["catalog"])
    tokenizer = ItemTokenizer.from_pretrained(world["bundle"])
    texts = [item.text for item in load_inputs(catalog, None, None, tokenizer.settings.use)[0]]
    known = behaviour_of_catalog(tokenizer.behaviour, catalog, split_histories(catalog, world["catalog"].split))
    moved = shutil.copytree(world["bundle"], world["folder"] / "elsewhere")
    command = [sys.executable, "-c", FRESH, str(moved)]
    done = subprocess.run(
        command,
        input=json.dumps([texts, known.vectors.tolist(), known.interactions.tolist()]),
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ.copy(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    table = SidTable.load(moved / "sids")
    assert table.item_ids == catalog.item_ids
    assert json.loads(done.stdout.splitlines()[-1]) == table.raw_codes.tolist()


def test_the_bundle_is_a_model_folder_without_local_paths(world) -> None:
    folder = world["bundle"]
    bundle = load_bundle(folder)
    assert bundle.table.tokenizer_sha256 == bundle.tokenizer.sha256()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mmsid") and f"version {bundle.version}" in card and "perplexity per level" in card
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert str(world["folder"]) not in (folder / "manifest.json").read_text()
    catalog = world["catalog"]
    grown = assign.AssignConfig(out=world["folder"] / "grown", tokenizer=folder, catalog=catalog, append=folder / "sids", collisions="none")
    assert np.array_equal(SidTable.load(assign.run(grown)).codes, bundle.table.codes)
    assert set(read_manifest(grown.out)["inputs"]) >= {"tokenizer", "append"}


def test_mismatched_parts_are_refused(world, tmp_path) -> None:
    other, other_sids = published(world, "mismatched", seed=5)
    with pytest.raises(ArtifactError, match="was made by tokenizer"):
        write_bundle(world["tokenizer"], other_sids, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    mixed = shutil.copytree(world["bundle"], tmp_path / "mixed")
    shutil.copyfile(other_sids / "sids.parquet", mixed / "sids" / "sids.parquet")
    with pytest.raises(ArtifactError, match=r"sids/sids\.parquet is another file"):
        load_bundle(mixed)
    torn = shutil.copytree(world["bundle"], tmp_path / "torn")
    (torn / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors is missing"):
        load_bundle(torn)
    with pytest.raises(ArtifactError, match="expected 'bundle'"):
        load_bundle(other)
