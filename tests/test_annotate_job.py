"""The annotation job runner: counts, retries, cache, duplicates, the error-rate gate, and resuming after SIGKILL."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time

import pytest
from annotate_stub import StubGenerator, caption_config, rows_of, write_catalog
from PIL import Image

from mmsid.annotate.caption import run
from mmsid.annotate.generator import GenerationFailure
from mmsid.annotate.readers import read_captions
from mmsid.artifacts import is_complete, read_manifest
from mmsid.catalog import load_picture
from mmsid.errors import AnnotationError, ArtifactError


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return write_catalog(tmp_path_factory.mktemp("catalog"))


@pytest.fixture(scope="module")
def undisturbed(catalog, tmp_path_factory):
    return rows_of(run(caption_config(catalog, tmp_path_factory.mktemp("clean") / "caption"), StubGenerator()))


def test_every_creative_gets_one_row_with_its_provenance(catalog, undisturbed, tmp_path):
    out = run(caption_config(catalog, tmp_path / "caption"), StubGenerator())
    rows = rows_of(out)
    assert rows == undisturbed
    assert len(rows) == 28
    assert len({(row["item_id"], row["creative"]) for row in rows}) == 28
    assert all(row["status"] == "ok" and row["reason"] is None and row["attempts"] == ["ok"] for row in rows)
    assert all(len(row["prompt_sha256"]) == len(row["input_sha256"]) == 64 and row["model_id"] == "stub@0" for row in rows)
    assert read_manifest(out, "caption")["counts"] == {"in": 28, "ok": 28, "quarantined": 0}
    captions = read_captions(out)
    assert len(captions) == 24
    assert captions["i4"].count(" ; ") == 1


def test_rows_do_not_depend_on_batch_and_shard_size(catalog, undisturbed, tmp_path):
    config = caption_config(catalog, tmp_path / "caption", batch_size=3, shard_rows=1000)
    assert rows_of(run(config, StubGenerator())) == undisturbed


def test_a_malformed_answer_is_sampled_once_more_and_both_attempts_are_recorded(catalog, tmp_path):
    generator = StubGenerator(broken=lambda colour, sampled: '{"caption": "cut off' if colour[0] % 2 and not sampled else None)
    out = run(caption_config(catalog, tmp_path / "caption"), generator)
    rows = rows_of(out)
    retried = [row for row in rows if row["attempts"] == ["truncated", "ok"]]
    assert retried
    assert all("sampled" in row["caption"] for row in retried)
    assert all(row["status"] == "ok" for row in rows)
    assert {request.temperature for call in generator.calls for request in call} == {0.0, 0.7}
    # sampling is seeded by the input, so a second run gives the same rows
    again = StubGenerator(broken=generator.broken)
    assert rows_of(run(caption_config(catalog, tmp_path / "again"), again)) == rows


@pytest.mark.parametrize("share, passes", [(0.01, True), (0.5, False)])
def test_injected_failures_are_quarantined_counted_and_stopped_by_the_gate(tmp_path, share, passes):
    catalog = write_catalog(tmp_path / "catalog", items=100)
    bad = round(share * 120)

    def broken(colour, sampled):
        return "I'm sorry, I cannot help with that." if colour[2] == 0 and (colour[0] * 183) % 256 < bad else None

    config = caption_config(catalog, tmp_path / "caption", shard_rows=50)
    if passes:
        counts = read_manifest(run(config, StubGenerator(broken)))["counts"]
        assert 0 < counts["quarantined"] <= 3
    else:
        with pytest.raises(
            AnnotationError, match=r"of 120 attempted rows were quarantined .* refusal \d+.*kept in .*\.caption\.draft"
        ) as raised:
            run(config, StubGenerator(broken))
        assert raised.value.reason == "gate"
        assert not is_complete(config.out)
        report = json.loads((tmp_path / ".caption.draft" / "gate.json").read_text())
        counts = report["counts"]
        assert report["reasons"] == {"refusal": counts["quarantined"]}
        assert counts["quarantined"] > 40
    assert counts["in"] == 120 == counts["ok"] + counts["quarantined"]


def test_after_a_failed_gate_only_the_quarantined_rows_are_tried_again(catalog, undisturbed, tmp_path):
    config = caption_config(catalog, tmp_path / "caption")
    with pytest.raises(AnnotationError, match="8 of 28"):
        run(config, StubGenerator(broken=lambda colour, sampled: GenerationFailure("timeout") if colour[0] < 49 else None))
    cleaned = StubGenerator()
    assert rows_of(run(config, cleaned)) == undisturbed
    assert cleaned.num_requests == 8


def test_a_quarantined_row_keeps_only_the_start_of_the_rejected_answer(catalog, tmp_path):
    config = caption_config(catalog, tmp_path / "caption", max_quarantined=1.0)
    rows = rows_of(run(config, StubGenerator(broken=lambda colour, sampled: "no JSON \x1b[31mat all")))
    assert all(row["caption"] is None and row["reason"] == "invalid_json" for row in rows)
    assert all(row["attempts"] == ["invalid_json", "invalid_json"] and row["rejected"] == "no JSON  [31mat all" for row in rows)
    assert read_captions(config.out) == {}


def test_missing_truncated_corrupt_and_absent_pictures_have_their_own_reasons(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=3)
    folder = catalog.items.parent
    noise = Image.effect_noise((64, 64), 90)
    noise.save(folder / "images" / "corrupt.png")
    (folder / "images" / "truncated.png").write_bytes((folder / "images" / "corrupt.png").read_bytes()[:1000])
    data = bytearray((folder / "images" / "corrupt.png").read_bytes())
    data[400:900] = bytes(500)  # header and end marker are intact, pixels are not: only decoding finds the damage
    (folder / "images" / "corrupt.png").write_bytes(data)
    extra = [
        ("missing", ["images/nowhere.png", "images/1_0.png"]),
        ("truncated", ["images/truncated.png"]),
        ("corrupt", ["images/corrupt.png"]),
        ("none", []),
    ]
    with open(catalog.items, "a") as handle:
        handle.writelines(json.dumps({"item_id": name, "title": name, "image": images}) + "\n" for name, images in extra)
    config = caption_config(catalog, tmp_path / "caption", max_quarantined=0.5)
    rows = {(row["item_id"], row["creative"]): (row["status"], row["reason"]) for row in rows_of(run(config, StubGenerator()))}
    assert rows[("missing", 0)] == ("ok", None)
    assert rows[("missing", 1)] == ("quarantined", "picture_missing")
    assert rows[("truncated", 0)] == ("quarantined", "picture_truncated")
    assert rows[("corrupt", 0)] == ("quarantined", "picture_corrupt")
    assert rows[("none", 0)] == ("quarantined", "no_picture")
    gate = read_manifest(config.out)["extra"]["gate"]
    damaged_inside = int(rows[("corrupt", 0)] == ("quarantined", "picture_corrupt"))  # the catalogue reads headers, not pixels
    assert (gate["attempted"], gate["failed"], gate["not_asked"]) == (len(rows) - 3, damaged_inside, 3)


def test_a_second_run_takes_every_row_from_the_cache(catalog, undisturbed, tmp_path):
    cache = tmp_path / "annotations.sqlite"
    run(caption_config(catalog, tmp_path / "first", cache=cache), StubGenerator())
    second = StubGenerator()
    assert rows_of(run(caption_config(catalog, tmp_path / "second", cache=cache), second)) == undisturbed
    assert second.num_requests == 0
    other = StubGenerator()
    other.model_id = "stub@1"  # other weights: no cache entry matches
    run(caption_config(catalog, tmp_path / "third", cache=cache), other)
    assert other.num_requests == 28


def test_a_cache_file_that_is_not_a_database_raises_an_error_with_a_remedy(catalog, tmp_path):
    (tmp_path / "annotations.sqlite").write_text("not a database, but long enough to be mistaken for one" * 10)
    with pytest.raises(AnnotationError, match=r"annotations\.sqlite.*delete the file"):
        run(caption_config(catalog, tmp_path / "caption", cache=tmp_path / "annotations.sqlite"), StubGenerator())


def test_exact_duplicates_are_generated_once_even_across_shards(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=1)
    folder = catalog.items.parent
    lines = [json.dumps({"item_id": f"copy{at}", "title": f"t{at}", "image": ["images/0_0.png"]}) for at in range(40)]
    catalog.items.write_text("\n".join(lines))
    generator = StubGenerator()
    rows = rows_of(run(caption_config(catalog, tmp_path / "caption"), generator))
    assert (len(rows), generator.num_requests, folder.is_dir()) == (40, 1, True)
    failing = StubGenerator(broken=lambda colour, sampled: "nonsense")
    rows = rows_of(run(caption_config(catalog, tmp_path / "failing", max_quarantined=1.0), failing))
    assert failing.num_requests == 2  # one greedy, one sampled
    assert {row["reason"] for row in rows} == {"invalid_json"}


def test_a_changed_picture_is_captioned_again_on_resume(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=10)
    config = caption_config(catalog, tmp_path / "caption")
    with pytest.raises(AnnotationError):
        run(config, StubGenerator(broken=lambda colour, sampled: "x" if colour[0] > 40 else None))
    Image.new("RGB", (9, 9), (1, 2, 3)).save(catalog.items.parent / "images" / "0_0.png")
    run(config, StubGenerator())
    assert read_captions(config.out)["i0"] == "a plain card of colour (1, 2, 3)"


def test_an_unfinished_folder_is_refused(tmp_path):
    (tmp_path / "caption").mkdir()
    with pytest.raises(ArtifactError, match="unfinished"):
        read_captions(tmp_path / "caption")


def test_the_next_pictures_are_read_while_the_model_works(catalog, undisturbed, tmp_path, monkeypatch):
    from mmsid.annotate import caption

    read, read_ahead = [], threading.Event()

    def load(*arguments, **options):
        read.append(arguments[0])
        if len(read) > 4:  # more than the current batch
            read_ahead.set()
        return load_picture(*arguments, **options)

    class Waiting(StubGenerator):
        def generate(self, requests):
            assert read_ahead.wait(timeout=60), "no picture is read while the model works"
            return super().generate(requests)

    monkeypatch.setattr(caption, "load_picture", load)
    assert rows_of(run(caption_config(catalog, tmp_path / "caption"), Waiting())) == undisturbed


def test_two_concurrent_calls_are_in_flight_at_once(catalog, undisturbed, tmp_path):
    class Concurrent(StubGenerator):
        max_concurrent_calls = 2
        both_started, calls_made = threading.Barrier(2, timeout=60), itertools.count()

        def generate(self, requests):
            if next(self.calls_made) < 2:
                self.both_started.wait()  # passes only when both calls are in flight
            return super().generate(requests)

    assert rows_of(run(caption_config(catalog, tmp_path / "caption", shard_rows=100), Concurrent())) == undisturbed


# SIGKILL at random moments


def _killed_run(config, moment: float) -> bool:
    """Run the job in a child process and kill it after `moment` seconds; True if the kill came before the end of the job.

    The generator sleeps long enough for an undisturbed run to take longer than the latest first kill on any machine.
    """
    job = multiprocessing.get_context("fork").Process(target=run, args=(config, StubGenerator(sleep=0.06)))
    job.start()
    time.sleep(moment)
    if job.is_alive():
        os.kill(job.pid, signal.SIGKILL)
    job.join()
    return job.exitcode == -signal.SIGKILL


def _kills(catalog, undisturbed, tmp_path, moments, cache):
    killed = 0
    for at, moment in enumerate(moments):
        config = caption_config(catalog, tmp_path / f"run{at}" / "caption", cache=tmp_path / "cache.sqlite" if cache else None)
        for part in (moment, moment / 2):  # killed twice, then run to the end
            if not is_complete(config.out):
                killed += _killed_run(config, part)
        if not is_complete(config.out):
            run(config, StubGenerator())
        assert rows_of(config.out) == undisturbed
        assert not [path for path in config.out.rglob("*") if path.name.endswith(".tmp")]
        (tmp_path / "cache.sqlite").unlink(missing_ok=True)
        shutil.rmtree(tmp_path / f"run{at}")
    return killed


def test_killed_at_three_random_moments_the_job_ends_with_the_same_rows(catalog, undisturbed, tmp_path):
    rng = random.Random(1)
    assert _kills(catalog, undisturbed, tmp_path, [rng.uniform(0.02, 0.3) for _ in range(3)], cache=True) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("cache", [False, True])
def test_killed_at_twenty_random_moments(catalog, undisturbed, tmp_path, cache):
    rng = random.Random(2 + cache)
    assert _kills(catalog, undisturbed, tmp_path, [rng.uniform(0.01, 0.5) for _ in range(20)], cache) >= 10
