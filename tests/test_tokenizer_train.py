"""The stages `train_tokenizer`, `assign` and `baselines` end to end on a tiny encoder; resumed and two-process training."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_backbones import tiny_bert
from tiny_catalog import write_annotations, write_catalog

from mmsid.artifacts import read_json, read_manifest, read_tensors
from mmsid.backbone.lora import LoraSettings
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.errors import ConfigError
from mmsid.sids import SidTable
from mmsid.tokenizer import assign, baselines, sid_methods, train
from mmsid.tokenizer.model import BackboneSettings, ItemTokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("world")
    catalog = write_catalog(folder)
    captions, interests = write_annotations(folder, catalog)
    return {"catalog": catalog, "captions": captions, "interests": interests, "bert": tiny_bert(folder / "bert")}


def settings(world: dict, out: Path, **changes) -> train.TrainTokenizerConfig:
    backbone = BackboneSettings(path=world["bert"], max_length=40, lora=LoraSettings(r=2))
    chosen = {"codebook_size": 8, "steps": 6, "batch_size": 8, "decoder_steps": 10, "checkpoint_every": 2, "backbone": backbone}
    folders = {name: world[name] for name in ("catalog", "captions", "interests")}
    return train.TrainTokenizerConfig(out=out, **(folders | chosen | changes))


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    return train.run(settings(world, tmp_path_factory.mktemp("runs") / "tokenizer"))


def test_folder_and_losses(world, trained: Path) -> None:
    manifest = read_manifest(trained, "train_tokenizer")
    assert manifest["counts"] == {"items": 64, "steps": 6, "processes": 1}
    history = read_json(trained / "training.json")["history"]
    assert set(history[0]) == {"loss", "codes", "regression", "contrast", "embedding", "reconstruction"}
    assert all(np.isfinite(list(row.values())).all() for row in history)
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "model.safetensors", "adapter", "decoder", "README.md"} <= names
    assert {"reconstruction.safetensors", "start.safetensors"} <= names
    assert "checkpoint.safetensors" not in names
    assert "agreement with the balanced target codes" in (trained / "README.md").read_text()
    started = read_tensors(trained / "start.safetensors")
    assert started["fused"].shape == (64, 32 + 64 + 3) and torch.bincount(started["codes"][:, 0], minlength=8).max() <= 14
    assert "interests" in ItemTokenizer.from_pretrained(trained).settings.use


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(world, trained: Path, tmp_path) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, losses: dict) -> None:
        if step == 3:
            raise Killed

    config = settings(world, tmp_path / "tokenizer")
    undisturbed = train.run(config.model_copy(update={"out": tmp_path / "other"}))
    with pytest.raises(Killed):
        train.run(config, on_step=kill)
    assert not config.out.exists()
    seen = []
    train.run(config, on_step=lambda step, losses: seen.append(step))
    assert seen == [4, 5], "resumed from the last checkpoint"
    a, b = (read_json(path / "training.json")["history"] for path in (config.out, undisturbed))
    assert a == b
    left, right = (read_tensors(path / "model.safetensors") for path in (config.out, undisturbed))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("changes", [{"loss": "unisid"}, {"head": "parallel", "reconstruct_from": "codes", "reconstruct": "attributes"}])
def test_other_losses_and_heads(world, tmp_path, changes: dict) -> None:
    out = train.run(settings(world, tmp_path / "out", steps=2, accumulate=2, **changes))
    tokenizer = ItemTokenizer.from_pretrained(out)
    assert tokenizer.settings.head == "parallel"
    history = read_json(out / "training.json")["history"]
    assert ("codes" in history[0]) == (changes.get("loss") != "unisid")


def test_without_sequences_annotations_or_text(world, tmp_path) -> None:
    """A catalogue of pictures with captions and nothing else."""
    catalog = write_catalog(tmp_path, items=24, sequences=False)
    captions, _ = write_annotations(tmp_path, catalog)
    rows = pq.read_table(catalog.items).select(["item_id"])
    Image.new("RGB", (8, 8)).save(tmp_path / "ad.png")
    pq.write_table(rows.append_column("image", pa.array(["ad.png"] * rows.num_rows)), tmp_path / "bare.parquet")
    bare = CatalogConfig(items=tmp_path / "bare.parquet")
    out = train.run(settings(world, tmp_path / "out", catalog=bare, captions=captions, interests=None, steps=2))
    assert read_json(out / "training.json")["reconstruct"] == "off"
    assert read_tensors(out / "start.safetensors")["fused"].shape == (24, 32 + 3)
    assert settings(world, tmp_path, reconstruct=False).reconstruct == "off", "YAML reads a bare off as false"
    with pytest.raises(ConfigError, match="no item has such a text"):
        train.run(settings(world, tmp_path / "other", catalog=bare, captions=captions, interests=None, reconstruct="summary"))


def test_assign_policies(world, trained: Path, tmp_path) -> None:
    common = {"tokenizer": trained, **{name: world[name] for name in ("catalog", "captions", "interests")}}
    tables = {}
    for policy in ("relocate", "suffix", "none"):
        out = assign.run(assign.AssignConfig(out=tmp_path / policy, collisions=policy, **common))
        tables[policy] = SidTable.load(out)
        names = {path.name for path in out.iterdir()}
        assert {"index.json", "trie.safetensors", "intrinsic.json", "embeddings.safetensors"} <= names
        assert "scores.f32" not in names
    assert len(np.unique(tables["relocate"].codes, axis=0)) == 64
    assert np.array_equal(tables["none"].codes, tables["relocate"].raw_codes)
    assert len(np.unique(tables["suffix"].full_codes(), axis=0)) == 64
    assert tables["none"].tokenizer_sha256 == read_json(trained / "config.json")["tokenizer_sha256"]
    metrics = read_json(tmp_path / "relocate" / "intrinsic.json")
    assert metrics["coengagement"]["pairs"] > 0 and len(metrics["fidelity"]) == 3 and "retrieval" in metrics


def test_sids_do_not_depend_on_row_order_and_item_ids(world, tmp_path) -> None:
    """From training to SIDs with permuted rows and renamed ids: every item gets the same codes."""
    rng = np.random.default_rng(0)
    items = pq.read_table(world["catalog"].items).to_pylist()
    sequences = pq.read_table(world["catalog"].sequences).to_pylist()
    renamed = {row["item_id"]: f"x{number}" for row, number in zip(items, rng.permutation(len(items)))}
    mixed = [items[i] | {"item_id": renamed[items[i]["item_id"]]} for i in rng.permutation(len(items))]
    users = [
        {"user_id": f"w{n}", "items": [renamed[i] for i in sequences[u]["items"]]} for n, u in enumerate(rng.permutation(len(sequences)))
    ]
    pq.write_table(pa.Table.from_pylist(mixed), tmp_path / "items.parquet")
    pq.write_table(pa.Table.from_pylist(users), tmp_path / "sequences.parquet")
    other = CatalogConfig(items=tmp_path / "items.parquet", sequences=tmp_path / "sequences.parquet", split=world["catalog"].split)
    tables = []
    for name, catalog in (("a", world["catalog"]), ("b", other)):
        tokenizer = train.run(settings(world, tmp_path / f"t{name}", catalog=catalog, captions=None, interests=None, steps=3))
        out = assign.run(assign.AssignConfig(out=tmp_path / name, tokenizer=tokenizer, catalog=catalog))
        table = SidTable.load(out)
        tables.append(dict(zip(table.item_ids, map(tuple, table.codes.tolist()))))
    assert {renamed[item_id]: codes for item_id, codes in tables[0].items()} == tables[1]


def test_random_codes_are_unique_and_shared_by_duplicates() -> None:
    codes = sid_methods.random_codes(["a", "b", "a", "c"], 2, 2, seed=0)
    assert np.array_equal(codes[0], codes[2]) and len(np.unique(codes, axis=0)) == 3
    many = sid_methods.random_codes([str(n) for n in range(500)], 3, 256, seed=0)
    assert len(np.unique(many, axis=0)) == 500 and many.max() < 256
    with pytest.raises(ConfigError, match="raise codebook_size"):
        sid_methods.random_codes([str(n) for n in range(9)], 3, 2, seed=0)


def test_baselines_write_one_sid_folder_per_method(world, tmp_path) -> None:
    out = baselines.run(baselines.BaselinesConfig(out=tmp_path / "baselines", catalog=world["catalog"], codebook_size=8, max_length=16))
    for name in ("random", "rq_kmeans", "balanced_rq_text", "balanced_rq"):
        assert len(np.unique(SidTable.load(out / name).codes, axis=0)) == 64
    assert {"balanced_rq", "shared prefix"} <= set(re.findall("balanced_rq|shared prefix", (out / "intrinsic.md").read_text()))


RANK_SCRIPT = """
import json, sys, torch
from accelerate import PartialState
from mmsid.tokenizer import train
seen, finish = {}, train.Training.finish
def record(self):
    seen["processes"] = self.accelerator.num_processes
    seen["losses"] = [row["loss"] for row in self.history]
    seen["weights"] = {n: p.detach().double().sum().item() for n, p in self.objective.named_parameters() if p.requires_grad}
    finish(self)
train.Training.finish = record
config = train.TrainTokenizerConfig.model_validate_json(open(sys.argv[1]).read())
train.run(config)
json.dump(seen, open(f"{sys.argv[1]}.{PartialState().process_index}", "w"))
"""


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights(world, tmp_path) -> None:
    config = settings(world, tmp_path / "out", steps=4, batch_size=4)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "script.py").write_text(RANK_SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path / "config.json")], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"config.json.{rank}").read_text()) for rank in (0, 1))
    assert first["processes"] == second["processes"] == 2
    assert first["weights"] == second["weights"]
    assert first["losses"] != second["losses"], "each rank trains on other items"
    catalog = read_catalog(world["catalog"])
    assert read_manifest(config.out)["counts"] == {"items": len(catalog.items), "steps": 4, "processes": 2}
