"""Artefact folders are published whole or not at all, and nothing unfinished, foreign or pickled is ever read."""

import pickle

import pytest
import torch

from mmsid import artifacts
from mmsid.errors import ArtifactError


def publish(out, config=None, **options):
    with artifacts.writing(out, stage="test", config=config or {"seed": 3}, **options) as draft:
        artifacts.write_json(draft.path / "a.json", {"x": 1})
        draft.counts.update({"in": 3, "ok": 2, "quarantined": 1})


def test_a_finished_folder_has_its_manifest_and_no_draft(tmp_path):
    publish(tmp_path / "out")
    manifest = artifacts.read_manifest(tmp_path / "out", "test")
    assert manifest["counts"] == {"in": 3, "ok": 2, "quarantined": 1} and manifest["seed"] == 3
    assert not (tmp_path / ".out.draft").exists()


def test_a_failure_publishes_nothing_and_resume_keeps_the_work(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), artifacts.writing(out, stage="test", config={"a": 1}) as draft:
        artifacts.write_json(draft.path / "half.json", {})
        raise RuntimeError
    assert not out.exists()
    with pytest.raises(ArtifactError, match="does not exist"):
        artifacts.read_manifest(out)
    with artifacts.writing(out, stage="test", config={"a": 1}, resume=True) as draft:
        assert (draft.path / "half.json").exists()


@pytest.mark.parametrize("options", [{"config": {"a": 2}, "resume": True}, {"config": {"a": 1}, "resume": False}])
def test_a_draft_of_another_configuration_or_without_resume_is_wiped(tmp_path, options):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), artifacts.writing(out, stage="test", config={"a": 1}) as draft:
        artifacts.write_json(draft.path / "half.json", {})
        raise RuntimeError
    with artifacts.writing(out, stage="test", **options) as draft:
        assert not (draft.path / "half.json").exists()


def test_rows_must_add_up(tmp_path):
    with pytest.raises(ArtifactError, match="in 3 != ok 1"), artifacts.writing(tmp_path / "out", stage="test", config={}) as draft:
        draft.counts.update({"in": 3, "ok": 1, "quarantined": 1})
    assert not (tmp_path / "out").exists()


def test_finished_foreign_and_busy_folders_are_refused(tmp_path):
    publish(tmp_path / "out")
    with pytest.raises(ArtifactError, match="finished already"):
        publish(tmp_path / "out")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.doc").write_text("mine")
    with pytest.raises(ArtifactError, match="did not write it"):
        publish(tmp_path / "foreign")
    with artifacts.writing(tmp_path / "busy", stage="test", config={}), pytest.raises(ArtifactError, match="another job"):
        publish(tmp_path / "busy")


def test_manifest_of_another_version_or_stage_is_refused(tmp_path):
    publish(tmp_path / "out")
    with pytest.raises(ArtifactError, match="expected 'other'"):
        artifacts.read_manifest(tmp_path / "out", "other")
    path = tmp_path / "out" / "manifest.json"
    artifacts.write_json(path, artifacts.read_json(path) | {"schema_version": 99})
    with pytest.raises(ArtifactError, match="99"):
        artifacts.read_manifest(tmp_path / "out")


def test_inputs_are_hashed_and_must_exist(tmp_path):
    publish(tmp_path / "first")
    source = tmp_path / "items.csv"
    source.write_text("a")
    publish(tmp_path / "second", inputs={"first": tmp_path / "first", "items": source, "none": None})
    before = artifacts.read_manifest(tmp_path / "second")["inputs"]
    source.write_text("b")
    after = artifacts.input_hashes({"first": tmp_path / "first", "items": source})
    assert before["first"] == after["first"] and before["items"] != after["items"]
    with pytest.raises(ArtifactError, match="run the stage"):
        artifacts.input_hashes({"gone": tmp_path / "gone"})


def test_tensors_round_trip_and_pickles_are_refused(tmp_path):
    artifacts.write_tensors(tmp_path / "t.safetensors", {"x": torch.arange(3)})
    assert artifacts.read_tensors(tmp_path / "t.safetensors")["x"].tolist() == [0, 1, 2]
    (tmp_path / "p.safetensors").write_bytes(pickle.dumps({"x": 1}))
    (tmp_path / "p.pt").write_bytes(pickle.dumps({"x": 1}))
    for name in ("p.safetensors", "p.pt", "none.safetensors"):
        with pytest.raises(ArtifactError):
            artifacts.read_tensors(tmp_path / name)


def test_torn_json_and_parquet_are_told(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1')
    (tmp_path / "a.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ArtifactError, match=r"a\.json"):
        artifacts.read_json(tmp_path / "a.json")
    with pytest.raises(ArtifactError, match=r"a\.parquet"):
        artifacts.read_table(tmp_path / "a.parquet")


def test_table_metadata_round_trip(tmp_path):
    artifacts.write_table(tmp_path / "t.parquet", [{"a": 1}], metadata={"num_levels": 3})
    table = artifacts.read_table(tmp_path / "t.parquet")
    assert table.schema.metadata[b"num_levels"] == b"3" and table.to_pylist() == [{"a": 1}]
