"""Interrupted stages: kills at every step of publishing, full and read-only disks, second jobs, damaged files, clocks set back.

Each ends in a message with a remedy. No finished work is lost.
"""

import errno
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from annotate_stub import StubGenerator, caption_config, rows_of, write_catalog

from mmsid import artifacts, disk
from mmsid.annotate.cache import AnnotationCache
from mmsid.annotate.caption import run as caption
from mmsid.annotate.readers import read_captions
from mmsid.errors import AnnotationError, ArtifactError, MmsidError

PARTS = 3


def write_in_parts(out: Path, log: Path | None = None) -> None:
    """A stage of three parts. It keeps parts that an earlier run finished, and appends the parts that it makes to `log`."""
    with artifacts.writing(out, stage="parts", config={"seed": 0}, resume=True) as draft:
        for part in range(PARTS):
            path = draft.path / f"part{part}.json"
            if not path.exists():
                artifacts.write_json(path, {"part": part})
                if log is not None:
                    with open(log, "a") as file:
                        file.write(f"{part}\n")
        draft.counts.update(parts=PARTS)


def in_a_child(work) -> int:
    """Runs `work` in a forked process. Returns its exit code, negative after a signal."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    return child.exitcode


def killed_at(step: int, work):
    """A function that runs `work` and sends SIGKILL before the `step`-th call of fsync, replace, unlink or rmdir."""
    calls = itertools.count()

    def deadly(real):
        def call(*args, **options):
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    def run() -> None:
        for name in ("fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        work()

    return run


# SIGKILL


def test_a_kill_before_any_step_of_publishing_loses_nothing_and_publishes_no_partial_folder(tmp_path):
    write_in_parts(tmp_path / "undisturbed")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir() if path.name != artifacts.MANIFEST}
    for step in itertools.count():
        out, log = tmp_path / f"{step}" / "out", tmp_path / f"log{step}"
        code = in_a_child(killed_at(step, lambda out=out, log=log: write_in_parts(out, log)))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if artifacts.is_complete(out):
            artifacts.verify_folder(out)
        else:
            assert not out.exists()
            finished = {path.name for path in (out.parent / ".out.draft").glob("part*.json")}
            before = {name: (out.parent / ".out.draft" / name).stat().st_mtime_ns for name in finished}
            write_in_parts(out, log)
            assert {name: (out / name).stat().st_mtime_ns for name in finished} == before, "finished parts were made again"
        left = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in (artifacts.MANIFEST, artifacts.MARKER)}
        assert left == expected
    assert step > 12


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train_tokenizer", "assign"])
def test_tokenizer_and_assignment_killed_at_every_step_give_the_files_of_an_undisturbed_run(tmp_path, stage):
    from test_tokenizer_train import settings, write_annotations
    from tiny_backbones import tiny_bert
    from tiny_catalog import write_catalog as write_texts

    from mmsid.tokenizer import assign, train

    catalog = write_texts(tmp_path, items=32, users=4)
    captions, interests = write_annotations(tmp_path, catalog)
    world = {"catalog": catalog, "captions": captions, "interests": interests, "bert": tiny_bert(tmp_path / "bert")}
    training = settings(world, tmp_path / "tokenizer", steps=2, checkpoint_every=1, codebook_size=4, reconstruct="off")
    tokenizer = train.run(training)
    if stage == "train_tokenizer":
        config, run, compared = training, train.run, "model.safetensors"
    else:
        config = assign.AssignConfig(out=tmp_path / "none", tokenizer=tokenizer, catalog=catalog, captions=captions, interests=interests)
        run, compared = assign.run, "sids.parquet"
    whole = run(config.model_copy(update={"out": tmp_path / "whole"}))
    steps = 0
    for step in itertools.count():
        again = config.model_copy(update={"out": tmp_path / f"{step}" / "out"})
        code = in_a_child(killed_at(step, lambda again=again: run(again)))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if not artifacts.is_complete(again.out):
            run(again)
        assert (again.out / compared).read_bytes() == (whole / compared).read_bytes()
        artifacts.verify_folder(again.out)
        shutil.rmtree(again.out.parent)
        steps += 1
    assert steps > 12


# Full and read-only disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB. The test is skipped where this user may not mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def writers() -> dict:
    return {
        "a.json": lambda path: artifacts.write_json(path, {"x": 1}),
        "a.txt": lambda path: artifacts.write_text(path, "x"),
        "a.parquet": lambda path: artifacts.write_table(path, [{"x": 1}]),
    }


@pytest.mark.parametrize("name", writers())
def test_a_write_to_a_full_disk_fails_with_a_remedy_and_keeps_the_old_file(tmp_path, name):
    out, write = tmp_path / "out", writers()[name]
    with (
        pytest.raises(ArtifactError, match=r"the disk is full.*bytes are left.*run again.*kept in .*\.out\.draft"),
        artifacts.writing(out, stage="test", config={}, resume=True) as draft,
    ):
        write(draft.path / name)
        before = (draft.path / name).read_bytes()
        # the temporary file links to the device that is always full, so that the kernel raises ENOSPC
        (draft.path / f".{name}.{os.getpid()}.tmp").symlink_to("/dev/full")
        write(draft.path / name)
    assert not out.exists()
    assert [path.name for path in (tmp_path / ".out.draft").iterdir() if path.name != artifacts.MARKER] == [name]
    assert (tmp_path / ".out.draft" / name).read_bytes() == before


def test_a_job_that_filled_the_disk_continues_when_space_is_free(tmp_path, small_disk):
    catalog = write_catalog(tmp_path / "catalog")
    undisturbed = rows_of(caption(caption_config(catalog, tmp_path / "caption"), StubGenerator()))
    config = caption_config(catalog, small_disk / "caption")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(256 * 1024 - 24_576))  # enough for some of the four shards
    with pytest.raises(ArtifactError, match="the disk is full"):
        caption(config, StubGenerator())
    finished = len(list((small_disk / ".caption.draft" / "shards").glob("part-*.parquet")))
    assert 0 < finished < 4
    ballast.unlink()
    generator = StubGenerator()
    assert rows_of(caption(config, generator)) == undisturbed
    assert generator.num_requests <= 28 - 7 * finished


def test_weights_that_do_not_fit_on_the_disk_fail_with_a_message(small_disk):
    with (
        pytest.raises(ArtifactError, match=r"the disk is full.*Nothing was published"),
        artifacts.writing(small_disk / "out", stage="test", config={}) as draft,
    ):
        artifacts.write_tensors(draft.path / "model.safetensors", {"x": torch.ones(100_000)})


def test_memory_mapped_files_and_the_cache_detect_a_full_disk(small_disk):
    with pytest.raises(OSError) as caught:
        disk.reserve(small_disk / "scores.f32", 1_000_000)
    assert caught.value.errno == errno.ENOSPC
    (small_disk / "scores.f32").unlink()
    with AnnotationCache(small_disk / "cache.sqlite") as cache:
        cache.put({"a": {"record": {}}})
        with pytest.raises(AnnotationError, match="the disk is full") as full:
            cache.put({"b": {"text": "x" * 400_000}})
        assert full.value.reason == "cache_full" and "delete" not in str(full.value)
        assert set(cache.get(["a", "b"])) == {"a"}


def test_a_read_only_file_system_fails_with_a_remedy(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(ArtifactError, match=r"file system is read-only.*name another folder"):
        write_in_parts(small_disk / "out")


def test_a_folder_without_write_permission_fails_with_a_remedy():
    folder = Path(tempfile.mkdtemp())  # other users cannot open the parents of tmp_path
    try:
        folder.chmod(0o555)
        reader, writer = os.pipe()

        def attempt() -> None:
            if os.geteuid() == 0:
                os.setresuid(65534, 65534, 65534)  # root ignores permissions
            try:
                write_in_parts(folder / "out")
            except MmsidError as error:
                os.write(writer, pickle.dumps(str(error)))

        assert in_a_child(attempt) == 0
        os.close(writer)
        message = pickle.loads(os.read(reader, 10_000))
        assert "permission denied" in message and str(folder) in message and "make the folder writable" in message
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


# Two jobs on one folder, and a job that was killed


def test_a_second_job_fails_with_the_process_that_holds_the_folder_and_a_killed_job_holds_no_lock(tmp_path):
    out = tmp_path / "out"
    held = multiprocessing.get_context("fork").Event()

    def hold() -> None:
        with artifacts.writing(out, stage="parts", config={"seed": 0}, resume=True):
            held.set()
            time.sleep(600)

    holder = multiprocessing.get_context("fork").Process(target=hold)
    holder.start()
    assert held.wait(60)
    with pytest.raises(ArtifactError, match=rf"another job is writing {out} .*held by 'process {holder.pid} on .*wait for it"):
        write_in_parts(out)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert f"process {holder.pid} on" in (tmp_path / ".out.lock").read_text()
    write_in_parts(out)
    assert artifacts.is_complete(out)


def test_a_lock_file_may_have_any_content(tmp_path):
    (tmp_path / ".out.lock").write_bytes(b"\xff foreign")
    with artifacts.writing(tmp_path / "out", stage="test", config={}):
        pass
    (tmp_path / ".other.lock").write_bytes(b"")
    with artifacts.writing(tmp_path / "other", stage="test", config={}):
        (tmp_path / ".other.lock").write_bytes(b"\xff\x1b[2J")
        with pytest.raises(ArtifactError, match=r"another job is writing .*held by '.*x1b"):
            write_in_parts(tmp_path / "other")


# Damaged files


@pytest.fixture
def captioned(tmp_path):
    return caption(caption_config(write_catalog(tmp_path / "catalog"), tmp_path / "caption"), StubGenerator())


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3 if at is None else at] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_and_a_missing_shard_are_reported_with_a_remedy(captioned, tmp_path):
    assert len(read_captions(captioned)) == 24
    shard = captioned / "shards" / "part-00001.parquet"
    whole = shard.read_bytes()
    flip(shard)
    for reads in (read_captions, lambda folder: artifacts.input_hashes({"captions": folder})):
        with pytest.raises(ArtifactError, match=r"part-00001\.parquet has sha256 .*Copy it again.*`mmsid caption --redo`"):
            reads(captioned)
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"part-00001\.parquet is missing"):
        read_captions(captioned)
    shard.write_bytes(whole)
    assert len(read_captions(captioned)) == 24


def test_sha256sum_accepts_the_checksums(captioned):
    checked = subprocess.run(["sha256sum", "-c", artifacts.CHECKSUMS], cwd=captioned, capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count(": OK") == 4


def test_a_shard_that_was_damaged_in_the_draft_is_made_again(tmp_path):
    catalog = write_catalog(tmp_path / "catalog")
    undisturbed = rows_of(caption(caption_config(catalog, tmp_path / "other"), StubGenerator()))
    config = caption_config(catalog, tmp_path / "caption")
    with pytest.raises(AnnotationError, match="quarantined"):
        caption(config, StubGenerator(broken=lambda colour, drawn: "x" if colour[0] < 49 else None))
    shard = tmp_path / ".caption.draft" / "shards" / "part-00003.parquet"
    column = pq.ParquetFile(shard).metadata.row_group(0).column(2)
    flip(shard, column.data_page_offset + column.total_compressed_size // 2)  # inside a data page, which parquet reads without a checksum
    assert rows_of(caption(config, StubGenerator())) == undisturbed


def test_a_sid_table_in_a_subfolder_is_verified(tmp_path):
    from mmsid.sids import SidTable

    with artifacts.writing(tmp_path / "refine", stage="refine", config={}) as draft:
        (draft.path / "sids").mkdir()
        SidTable.from_codes(["a", "b"], torch.tensor([[0], [1]]).numpy(), (2,)).save(draft.path / "sids" / "sids.parquet")
    assert len(SidTable.load(tmp_path / "refine" / "sids")) == 2
    SidTable.from_codes(["a", "b"], torch.tensor([[1], [0]]).numpy(), (2,)).save(tmp_path / "refine" / "sids" / "sids.parquet")
    with pytest.raises(ArtifactError, match=r"sids\.parquet has sha256 .*mmsid refine --redo"):
        SidTable.load(tmp_path / "refine" / "sids")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, "schema version 2, this mmsid reads 1"),
        ({"schema_version": None}, "schema version None, this mmsid reads 1"),
        ({"config": ...}, "key 'config' is missing"),
    ],
)
def test_a_manifest_of_another_version_is_refused_with_both_values(captioned, change, words):
    path = captioned / artifacts.MANIFEST
    manifest = artifacts.read_json(path) | change
    artifacts.write_json(path, {key: value for key, value in manifest.items() if value is not ...})
    with pytest.raises(ArtifactError, match=f"{words}.*write the folder again"):
        read_captions(captioned)
    artifacts.write_json(path, [])
    with pytest.raises(ArtifactError, match="schema version None"):
        read_captions(captioned)


# Clock


def test_a_clock_that_is_set_back_does_not_change_the_output(tmp_path, monkeypatch):
    catalog = write_catalog(tmp_path / "catalog")
    undisturbed = rows_of(caption(caption_config(catalog, tmp_path / "other"), StubGenerator()))
    seconds = itertools.count(start=2_000_000_000, step=-86_400)
    monkeypatch.setattr(time, "time", lambda: next(seconds))
    monkeypatch.setattr(time, "time_ns", lambda: next(seconds) * 10**9)
    out = caption(caption_config(catalog, tmp_path / "caption", cache=tmp_path / "cache.sqlite"), StubGenerator())
    assert rows_of(out) == undisturbed
    assert artifacts.read_manifest(out)["wall_seconds"] >= 0
