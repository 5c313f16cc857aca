"""Finished stages stay valid when nothing that decides their result changes, and are replaced only by complete ones."""

import functools
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from annotate_stub import StubGenerator, caption_config
from annotate_stub import write_catalog as write_pictures
from tiny_catalog import write_catalog

import mmsid
from mmsid.annotate import caption
from mmsid.artifacts import MANIFEST, is_complete, read_manifest, restore, rewriting, writing
from mmsid.config import StageConfig, load_yaml
from mmsid.errors import AnnotationError, ArtifactError
from mmsid.stages import run_stages, stage_configs

RUN = {
    "name": "one",
    "runs": "runs",
    "catalog": {"items": "shop/items.parquet", "sequences": "shop/sequences.parquet", "vectors": "shop/vectors.parquet"},
    "train_tokenizer": {"backbone": {"kind": "vectors"}, "steps": 1, "num_levels": 2, "codebook_size": 16, "batch_size": 8},
    "assign": {},
    "baselines": {"methods": ["random"], "num_levels": 2, "codebook_size": 16},
    "train_recommender": {"recommender": False, "classical_baselines": False, "schedule": {"epochs": 1}, "model": {"d_model": 16}},
    "report": {},
}
STAGES = ["train_tokenizer", "assign", "baselines", "train_recommender", "report"]  # after `ingest`, which reads a moved catalogue again


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a catalogue, a configuration of relative paths, and its finished run."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "shop").mkdir()
    config = write_catalog(folder / "shop", items=48, users=30)
    ids = pq.read_table(config.items)["item_id"]
    vectors = np.random.default_rng(0).normal(size=(len(ids), 8)).astype(np.float32)
    pq.write_table(pa.table({"item_id": ids, "vector": list(vectors)}), folder / "shop" / "vectors.parquet")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run()
    return folder


@pytest.fixture
def work(finished, tmp_path, monkeypatch):
    """A copy of the finished run in the working folder."""
    shutil.copytree(finished, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def run(*overrides: str, redo: tuple[str, ...] = ()) -> None:
    run_stages(stage_configs(load_yaml("run.yaml", overrides), source="run.yaml"), redo=redo)


def stamps(runs: Path) -> dict[str, int]:
    return {stage: (runs / stage / MANIFEST).stat().st_mtime_ns for stage in STAGES}


def test_a_second_run_keeps_every_stage(work):
    before = stamps(Path("runs/one"))
    run()
    assert stamps(Path("runs/one")) == before
    ingested = (Path("runs/one/ingest") / MANIFEST).stat().st_mtime_ns
    run()
    assert (Path("runs/one/ingest") / MANIFEST).stat().st_mtime_ns == ingested


def test_a_renamed_runs_folder_keeps_every_stage(work):
    before = stamps(Path("runs/one"))
    Path("runs").rename("elsewhere")
    Path("elsewhere/one").rename("elsewhere/two")
    run("runs=elsewhere", "name=two")
    assert stamps(Path("elsewhere/two")) == before


@pytest.mark.parametrize("place", ["moved", "absolute"])
def test_a_catalogue_in_another_place_keeps_every_later_stage(work, place):
    before = stamps(Path("runs/one"))
    folder = Path("shop").absolute()
    if place == "moved":
        folder = Path("shop").rename(work / "other shop").absolute()
    names = ("items", "sequences", "vectors")
    run(*(f"catalog.{name}={(folder / name).with_suffix('.parquet')}" for name in names))
    assert stamps(Path("runs/one")) == before


def test_execution_keys_keep_every_stage(work):
    before = stamps(Path("runs/one"))
    run("train_tokenizer.checkpoint_every=7", "assign.batch_size=5", "ingest.max_problems=0.3")
    assert stamps(Path("runs/one")) == before


def test_a_change_names_the_nested_key_and_both_values(work):
    with pytest.raises(ArtifactError) as caught:
        run("train_tokenizer.backbone.max_length=64")
    message = str(caught.value)
    assert "configuration: backbone.max_length was 96, is 64. --redo train_tokenizer" in message and "{" not in message
    with pytest.raises(ArtifactError, match=r"catalog\.split\.seed was 0, is 3\. --redo"):
        run("catalog.split.seed=3")


def test_another_content_is_refused_and_its_cause_is_named(work):
    with pytest.raises(ArtifactError, match=r"its input catalog \(runs/one/ingest\) has changed \(catalog\.max_items was None, is 40\)"):
        run("catalog.max_items=40")
    run()  # the catalogue is as before
    rows = pq.read_table("shop/items.parquet").to_pylist()
    rows[0]["title"] = "another title"
    pq.write_table(pa.Table.from_pylist(rows), "shop/items.parquet")
    with pytest.raises(ArtifactError, match=r"its input catalog \(runs/one/ingest\) has changed\. --redo train_tokenizer"):
        run()


def test_limits_on_pictures_that_change_no_item_keep_later_stages(work):
    before = stamps(Path("runs/one"))
    run("catalog.pictures.max_bytes=1000")
    assert stamps(Path("runs/one")) == before


def test_an_input_that_is_added_or_left_out_is_named(work):
    path = Path("runs/one/report") / MANIFEST
    shutil.copytree("runs/one/assign", "runs/one/refine")  # the report would read it, and has not
    with pytest.raises(ArtifactError, match="its input refine is new"):
        run()
    shutil.rmtree("runs/one/refine")
    shutil.rmtree("runs/one/baselines")
    with pytest.raises(ArtifactError, match=r"variants\.random was 'runs/one/baselines/random', is None"):
        run("train_recommender.variants={ours: runs/one/assign}")
    assert path.is_file()


def test_stages_called_with_sources_accept_an_ingested_catalogue_of_the_same_content(work):
    keys = {**RUN["catalog"], "items": str(Path("shop/items.parquet").absolute())}
    settings = {"methods": ["random"], "num_levels": 2, "codebook_size": 16}
    out = mmsid.baselines("direct", keys, **settings)
    first = (out / MANIFEST).stat().st_mtime_ns
    assert "items" in read_manifest(out)["inputs"]
    mmsid.baselines(out, RUN["catalog"], **settings)  # relative
    folder = mmsid.ingest("ingested", RUN["catalog"])
    mmsid.baselines(out, folder, **settings)
    mmsid.baselines("runs/one/baselines", RUN["catalog"], **settings)  # finished with an ingested catalogue
    assert (out / MANIFEST).stat().st_mtime_ns == first
    with pytest.raises(ArtifactError, match=r"catalog\.clean_text was False, is True"):
        mmsid.baselines(out, {**RUN["catalog"], "clean_text": True}, **settings)
    with pytest.raises(ArtifactError, match=r"its input catalog \(read from its sources\) has changed"):
        mmsid.baselines("runs/one/baselines", {**RUN["catalog"], "max_items": 9}, **settings)


def test_the_image_root_is_compared_as_seen_from_the_table(tmp_path):
    catalog = write_pictures(tmp_path / "a", items=6).model_copy(update={"image_root": tmp_path / "a"})
    config = caption_config(catalog, tmp_path / "out")
    caption.run(config, StubGenerator())
    (tmp_path / "a").rename(tmp_path / "b")
    from mmsid.unchanged import changes

    moved = catalog.model_copy(update={"items": tmp_path / "b" / "items.jsonl", "image_root": tmp_path / "b"})
    assert not changes("caption", config.model_copy(update={"catalog": moved, "batch_size": 1, "max_quarantined": 0.9}))
    (tmp_path / "b" / "images").rename(tmp_path / "images")
    other = moved.model_copy(update={"image_root": tmp_path})
    assert changes("caption", config.model_copy(update={"catalog": other})) == [
        f"catalog.image_root was '{tmp_path / 'a'}', is '{tmp_path}'"
    ]
    limits = moved.pictures.model_copy(update={"max_bytes": 1, "connections": 2, "isolate": True})
    found = changes("caption", config.model_copy(update={"catalog": moved.model_copy(update={"pictures": limits})}))
    assert found == ["catalog.pictures.max_bytes was 20000000, is 1"]


def test_a_draft_survives_other_execution_keys_and_another_place(tmp_path):
    catalog = write_pictures(tmp_path / "a", items=12)
    broken = StubGenerator(broken=lambda colour, sampled: "no json" if colour[0] > 40 else None)
    with pytest.raises(AnnotationError):
        caption.run(caption_config(catalog, tmp_path / "out"), broken)
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / ".out.draft").rename(tmp_path / ".new.draft")
    moved = catalog.model_copy(update={"items": tmp_path / "b" / "items.jsonl"})
    generator = StubGenerator()
    caption.run(caption_config(moved, tmp_path / "new", batch_size=1, max_quarantined=0.5), generator)
    assert 0 < generator.num_requests < 12, "rows that were finished are not asked for again"


def test_redo_keeps_the_old_folder_until_the_new_one_is_complete(work, monkeypatch):
    from mmsid.tokenizer import assign

    before, codes = stamps(Path("runs/one")), Path("runs/one/assign/sids.parquet").read_bytes()

    def fails(*args, **options):
        assert Path("runs/one/assign/sids.parquet").read_bytes() == codes
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(assign, "publish", fails)  # the last step
        with pytest.raises(RuntimeError, match="crash"):
            run(redo=("assign",))
    assert stamps(Path("runs/one")) == before
    run()  # nothing was lost, and nothing is done
    assert stamps(Path("runs/one")) == before
    run("assign.collisions=suffix", redo=("assign",))
    after = stamps(Path("runs/one"))
    changed = {stage for stage in STAGES if after[stage] != before[stage]}
    assert changed == {"assign", "baselines", "train_recommender", "report"}
    assert not list(Path("runs/one").glob(".*.earlier")) and not list(Path("runs/one").glob(".*.draft"))


@pytest.mark.slow
def test_redo_of_ingest_reads_everything_again(work):
    run()
    before, ingested = stamps(Path("runs/one")), (Path("runs/one/ingest") / MANIFEST).stat().st_mtime_ns
    run(redo=("ingest",))
    after = stamps(Path("runs/one"))
    assert all(after[stage] != before[stage] for stage in STAGES)
    assert (Path("runs/one/ingest") / MANIFEST).stat().st_mtime_ns != ingested


class Small(StageConfig):
    size: int = 1


def write(config: Small) -> None:
    with writing(config.out, stage="small", config=config) as draft:
        (draft.path / "size").write_text(str(config.size))


def test_a_folder_is_restored_after_a_crash_between_the_renames(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(Small(out=out, size=1))
    with pytest.raises(ArtifactError, match="is finished already"):
        write(Small(out=out, size=2))
    renames, rename = [], os.replace

    def crash(source, target):
        if Path(target) == out:
            raise KeyboardInterrupt
        renames.append(target)
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), rewriting(out):
        patch.setattr(os, "replace", crash)
        write(Small(out=out, size=2))
    assert not out.exists() and (tmp_path / ".out.earlier") in renames
    restore(out)
    assert is_complete(out) and (out / "size").read_text() == "1"
    with rewriting(out):
        write(Small(out=out, size=2))
    assert (out / "size").read_text() == "2" and sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


@pytest.mark.parametrize("crash_at", ["draft.json", "checkpoint", ".out.earlier"])
def test_what_a_crash_after_the_renames_left_is_removed(tmp_path, monkeypatch, crash_at):
    out = tmp_path / "out"
    write(Small(out=out, size=1))
    expected = sorted(path.name for path in out.iterdir())
    unlink, remove_tree, crashed = Path.unlink, shutil.rmtree, []

    def crash(path, *arguments, remove, **options):
        if Path(path).name == crash_at and is_complete(out) and (out / "size").read_text() == "2":
            crashed.append(path)
            raise KeyboardInterrupt
        remove(path, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), rewriting(out):
        patch.setattr(Path, "unlink", functools.partialmethod(crash, remove=unlink))
        patch.setattr(shutil, "rmtree", functools.partial(crash, remove=remove_tree))
        with writing(out, stage="small", config=Small(out=out, size=2)) as draft:
            (draft.path / "size").write_text("2")
            (draft.path / "checkpoint").write_text("large")
            draft.scratch.add("checkpoint")
    assert crashed and (out / "draft.json").exists()
    restore(out)
    assert sorted(path.name for path in out.iterdir()) == expected
    assert (out / "size").read_text() == "2" and sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def test_foreign_files_are_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds files but no manifest"), rewriting(tmp_path / "out"):
        write(Small(out=tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.txt").is_file()
