"""`assign --append` end to end on a tiny encoder: growing, shrinking and shuffled catalogues, and refused inputs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from tiny_backbones import tiny_bert
from tiny_catalog import write_catalog

from mmsid.artifacts import read_json, read_manifest, read_tensors
from mmsid.backbone.lora import LoraSettings
from mmsid.catalog import CatalogConfig
from mmsid.errors import ArtifactError, ConfigError
from mmsid.sids import SidTable
from mmsid.tokenizer import assign, train
from mmsid.tokenizer.model import BackboneSettings


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("append")
    catalog = write_catalog(folder)
    rows = pq.read_table(catalog.items).to_pylist()
    rows.append(rows[5] | {"item_id": "twin"})  # a new item with the content of a published one
    backbone = BackboneSettings(path=tiny_bert(folder / "bert"), max_length=40, lora=LoraSettings(r=2))
    settings = {"codebook_size": 6, "num_levels": 2, "steps": 2, "batch_size": 8, "backbone": backbone, "reconstruct": "off"}
    tokenizer = train.run(train.TrainTokenizerConfig(out=folder / "tokenizer", catalog=subset(folder, "train", rows[:24]), **settings))
    return {"folder": folder, "rows": rows, "tokenizer": tokenizer}


def subset(folder: Path, name: str, rows: list[dict]) -> CatalogConfig:
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return CatalogConfig(items=folder / f"{name}.parquet")


def assigned(world: dict, tmp_path: Path, name: str, rows: list[dict], **changes) -> Path:
    catalog = subset(tmp_path, name, rows)
    return assign.run(assign.AssignConfig(out=tmp_path / name, tokenizer=world["tokenizer"], catalog=catalog, **changes))


def by_id(table: SidTable, column: str = "codes") -> dict[str, tuple]:
    return dict(zip(table.item_ids, map(tuple, np.asarray(getattr(table, column)).reshape(len(table), -1).tolist())))


def test_new_items_are_added_and_published_codes_stay(world, tmp_path) -> None:
    rows = [*world["rows"][:33], world["rows"][-1]]  # 33 distinct items on 36 SIDs, so that prefixes overflow
    first = assigned(world, tmp_path, "first", rows[:20])
    grown = assigned(world, tmp_path, "grown", rows, append=first)
    scratch = assigned(world, tmp_path, "scratch", rows)
    old, new, whole = (SidTable.load(path) for path in (first, grown, scratch))
    assert read_manifest(grown)["counts"] == {"items": 34, "read": 14, "behaviour": 0}
    for column in ("codes", "raw_codes", "margin"):
        published = by_id(old, column)
        assert {name: by_id(new, column)[name] for name in published} == published
    assert np.array_equal(new.raw_codes, whole.raw_codes) and new.item_ids == whole.item_ids
    assert np.allclose(*(read_tensors(path / "embeddings.safetensors")["embeddings"] for path in (grown, scratch)), atol=1e-5)
    assert by_id(new)["twin"] == by_id(new)["i5"]
    assert len(np.unique(new.codes, axis=0)) == 33
    assert read_json(grown / "intrinsic.json")["published"]["items"] == 34

    mixed = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert by_id(SidTable.load(assigned(world, tmp_path, "mixed", mixed, append=first))) == by_id(new)
    half = assigned(world, tmp_path, "half", rows[:27], append=first)
    stepwise = SidTable.load(assigned(world, tmp_path, "stepwise", rows, append=half))
    assert np.array_equal(stepwise.raw_codes, new.raw_codes) and len(np.unique(stepwise.codes, axis=0)) == 33
    assert {name: by_id(stepwise)[name] for name in by_id(old)} == by_id(old)


def test_codes_of_removed_items_stay_reserved_for_them(world, tmp_path) -> None:
    rows = world["rows"][:36]
    first = assigned(world, tmp_path, "first", rows[:34])
    shrunk = assigned(world, tmp_path, "shrunk", rows[2:35], append=first)
    retired = by_id(SidTable.load(shrunk / "retired.parquet"))
    assert retired.keys() == {"i0", "i1"} and not set(retired.values()) & set(by_id(SidTable.load(shrunk)).values())
    back = assigned(world, tmp_path, "back", rows[1:], append=shrunk)
    assert by_id(SidTable.load(back))["i1"] == retired["i1"]
    assert by_id(SidTable.load(back / "retired.parquet")) == {"i0": retired["i0"]}


def test_refused_inputs(world, tmp_path) -> None:
    rows = world["rows"][:26]
    first = assigned(world, tmp_path, "first", rows[:24])
    with pytest.raises(ConfigError, match="published with collisions: relocate, now it is none"):
        assigned(world, tmp_path, "other", rows, append=first, collisions="none")
    table = SidTable.load(first)
    table.tokenizer_sha256 = "f" * 64
    table.save(first / "sids.parquet")
    (first / "SHA256SUMS").unlink()  # otherwise the folder is refused as damaged
    with pytest.raises(ArtifactError, match="was made by tokenizer ffffffffffff"):
        assigned(world, tmp_path, "other", rows, append=first)
    with pytest.raises(ValidationError, match="also the output folder"):
        assigned(world, tmp_path, "first", rows, append=first)
