"""Benchmarks that README names without a command still run, on sizes that measure nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(name: str, *arguments: str, out: Path) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=out.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_scale_interrupts_a_job_and_resumes_the_last_shard(tmp_path):
    (size,) = run("scale", "--rows", "1500", out=tmp_path / "scale.json")["sizes"]
    assert size["rows"] == 1500 and size["requests_on_resume"] == 1500 - 1024
    assert {f"{step}_{what}" for step in ("read", "job", "resume") for what in ("seconds", "mb")} <= size.keys()


@pytest.mark.slow
def test_annotation_finds_the_same_rows_without_ray(tmp_path):
    parts = ["overhead", "naive", "server"]
    found = run("annotation", "--ads", "6", "--naive-ads", "2", "--parts", *parts, out=tmp_path / "annotation.json")
    assert found["server"]["differ_from_local"] == 0 and found["server"]["ok"] == found["server"]["rows"] >= 6


@pytest.mark.slow
def test_constrained_decoding_gives_the_answers_of_bare_generate(tmp_path):
    found = run("constrained_decoding", "--ads", "20", out=tmp_path / "constrained_decoding.json")
    assert all(found[kind]["constrained_differ_from_bare"] == 0 and found[kind]["cut_short"] == 0 for kind in ("captions", "interests"))
    assert found["captions"]["valid"] == {"bare": 20, "free": 20, "constrained": 20}


@pytest.mark.slow
def test_a_refinement_step_beside_a_supervised_one(tmp_path):
    assert run("refine_step", "--items", "64", "--repeats", "1", out=tmp_path / "refine_step.json")


@pytest.mark.slow
def test_refinement_of_a_large_catalogue_is_measured(tmp_path):
    (size,) = run("refine_scale", "--items", "2000", "--rounds", "1", out=tmp_path / "refine_scale.json")["sizes"]
    assert size["items"] == 2000 and size["peak_gib"] > 0 and {"nearest_items", "reference", "round"} <= size["seconds"].keys()


@pytest.mark.slow
def test_words_in_drawn_ads(tmp_path):
    pytest.importorskip("rapidocr", reason="the extra `ocr` is not installed")
    found = run("picture_words", "--ads", "6", "--posters", "0", "--photos", "0", out=tmp_path / "words.json")["drawn ads"]
    assert found["prices read"] == found["exchanged facts flagged"] == 1 and found["true captions flagged"] == 0
