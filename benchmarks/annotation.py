"""Overhead of the annotation job, and equality of its rows across engines. Demo ads, the shipped demo model, one thread.

    python benchmarks/annotation.py --out benchmarks/results/annotation.json

The parts are `overhead`, `naive`, `server`, `ray` and `faults`, see the methods of `Bench`. Ratios come from a single run.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from mmsid.annotate.caption import CaptionConfig, picture_loader, run
from mmsid.annotate.generator import Answer, Request
from mmsid.annotate.huggingface import HuggingFaceGenerator
from mmsid.annotate.job import annotate
from mmsid.annotate.job_inputs import JobInput, Task
from mmsid.annotate.prompts import load_prompt
from mmsid.annotate.readers import read_rows
from mmsid.annotate.records import Caption, parse_caption
from mmsid.artifacts import read_json, sha256, write_json, writing
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.catalog.demo import write_demo_catalog

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from chat_server import FAULTS, Batching, ChatServer

COMPARED = ("item_id", "creative", "caption", "status", "reason", "flags", "attempts")
BATCH, TOKENS = 16, 96
PARTS = ("overhead", "naive", "server", "ray", "faults")


class TimedModel(HuggingFaceGenerator):
    """The demo model with a record of its input batches and the seconds of its `generate` calls."""

    def __init__(self) -> None:
        super().__init__("demo", max_new_tokens=TOKENS)
        self.batches: list[tuple[dict[str, torch.Tensor], list[Request]]] = []
        self.seconds = 0.0

    def decode(self, inputs: dict[str, torch.Tensor], requests: list[Request]) -> list[Answer]:
        started = time.perf_counter()
        answers = super().decode(inputs, requests)
        self.seconds += time.perf_counter() - started
        self.batches.append((inputs, requests))
        return answers


def main() -> None:
    """Run the parts given on the command line and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ads", type=int, default=500)
    parser.add_argument("--naive-ads", type=int, default=60, help="ads of the sequential loop")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/annotation.json"))
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), parsed.ads)
        results: dict[str, Any] = {"ads": parsed.ads, "pictures": len(bench.inputs), "threads": 1}
        if parsed.out.is_file() and (earlier := read_json(parsed.out))["ads"] == parsed.ads:
            results = earlier  # parts may be run in separate calls
        if "overhead" in parsed.parts or "naive" in parsed.parts:
            results["overhead"] = bench.overhead()
        if "naive" in parsed.parts:
            results["naive"] = bench.naive(parsed.naive_ads, results["overhead"]["job_seconds"] / len(bench.inputs))
        if "server" in parsed.parts:
            with ChatServer(Batching(HuggingFaceGenerator("demo", max_new_tokens=TOKENS), BATCH)) as server:
                options = {"base_url": server.url, "concurrency": 2 * BATCH}
                results["server"] = bench.compare_with_local(generator="openai", server=options)
        if "ray" in parsed.parts:
            results["ray"] = bench.compare_with_local(engine="ray", ray={"actors": 2, "cpus_per_actor": 0.5, "rows_per_task": 64})
        if "faults" in parsed.parts:
            results["faults"] = bench.faults()
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(parsed.out, results)
    print(json.dumps(results, indent=1))


class Bench:
    """Demo ads and the parts of the benchmark."""

    def __init__(self, folder: Path, ads: int) -> None:
        self.folder = folder
        self.catalog = CatalogConfig(items=write_demo_catalog(folder / "ads", items=ads, users=0, seed=11) / "items.parquet")
        self.items = read_catalog(self.catalog).items
        self.inputs = [JobInput(item.item_id, at, (path,)) for item in self.items for at, path in enumerate(item.images)]
        self.prompt = load_prompt("caption_demo")
        self.runs = 0
        self.load = picture_loader(self.config())

    def config(self, **options: Any) -> CaptionConfig:
        """A caption job with its own output folder and without a cache."""
        self.runs += 1
        out = self.folder / f"run{self.runs}" / "caption"
        return CaptionConfig(**{"out": out, "catalog": self.catalog, "batch_size": BATCH, "max_new_tokens": TOKENS} | options)

    def overhead(self) -> dict[str, float]:
        """Wall time of the job relative to its own model calls, and to bare `model.generate` on the same prepared batches."""
        model = TimedModel()
        model.generate([Request(self.prompt.text, (self.load(self.inputs[0].pictures[0]),))])  # loads the model
        model.batches.clear()
        model.seconds = 0.0
        config = self.config()
        task = Task("caption", self.prompt, Caption, parse_caption, self.load)
        with writing(config.out, stage="caption", config=config, resume=True) as draft:
            job = timed(lambda: annotate(self.inputs, len(self.inputs), task, model, config, draft))
        in_model, batches = model.seconds, list(model.batches)
        bare = timed(lambda: [HuggingFaceGenerator.decode(model, *batch) for batch in batches])
        return {
            "job_seconds": round(job, 3),
            "own_model_calls_seconds": round(in_model, 3),
            "bare_generate_seconds": round(bare, 3),
            "job_over_own_model_calls": round(job / in_model, 4),
            "job_over_bare_generate": round(job / bare, 4),
        }

    def naive(self, ads: int, job_seconds_each: float) -> dict[str, float]:
        """Speed of the job relative to a loop that reads, prepares and generates one picture at a time."""
        model = HuggingFaceGenerator("demo", max_new_tokens=TOKENS)
        paths = [one.pictures[0] for one in self.inputs[:ads]]
        model.generate([Request(self.prompt.text, (self.load(paths[0]),))])
        each = timed(lambda: [model.generate([Request(self.prompt.text, (self.load(path),))]) for path in paths]) / len(paths)
        return {
            "seconds_each": round(each, 4),
            "job_seconds_each": round(job_seconds_each, 4),
            "speedup": round(each / job_seconds_each, 2),
        }

    @functools.cached_property
    def local(self) -> tuple[list[dict], float]:
        """Rows of a model in this process, and the seconds that the job took."""
        return self.captioned()

    def captioned(self, engine: Literal["local", "ray"] = "local", **options: Any) -> tuple[list[dict], float]:
        config = self.config(shard_rows=128, **options)
        seconds = timed(lambda: run(config, engine=engine))
        return [{name: row[name] for name in COMPARED} for row in read_rows(config.out, "caption")], seconds

    def compare_with_local(self, **options: Any) -> dict[str, Any]:
        """Rows of a server or of Ray that differ from the local rows in item, creative, text, status, reason, flags or attempts."""
        local, local_seconds = self.local
        rows, seconds = self.captioned(**options)
        ok = sum(row["status"] == "ok" for row in rows)
        found = {"rows": len(rows), "ok": ok, "differ_from_local": differing(local, rows)}
        return found | {"local_seconds": round(local_seconds, 1), "seconds": round(seconds, 1)}

    def faults(self) -> dict[str, Any]:
        """Wall time with a server that fails every fifth request in ten ways, relative to a healthy one (.25 s per answer)."""
        answers = {sha256(self.load(one.pictures[0]).tobytes()): json.dumps({"caption": f"ad {at}"}) for at, one in enumerate(self.inputs)}

        def answer(request: Request) -> str:
            return answers[sha256(request.pictures[0].tobytes())]

        found: dict[str, Any] = {}
        rows = {}
        for name, share in (("healthy", 0.0), ("faulty", 0.2)):
            with ChatServer(answer, share=share, delay=0.25, slow=1.0) as server:
                config = self.config(generator="openai", server={"base_url": server.url})
                found[f"{name}_seconds"] = round(timed(lambda config=config: run(config)), 2)
            rows[name] = list(read_rows(config.out, "caption"))
            found[f"{name}_requests"] = len(server.seen)
        ok = sum(row["status"] == "ok" for row in rows["faulty"])
        slowdown = round(found["faulty_seconds"] / found["healthy_seconds"], 3)
        return found | {"kinds": len(FAULTS), "ok": ok, "differs": differing(rows["healthy"], rows["faulty"]), "slowdown": slowdown}


def timed(work: Callable[[], Any]) -> float:
    """Wall time of `work` in seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def differing(expected: list[dict], found: list[dict]) -> int:
    """Number of rows that differ, including rows that only one list has."""
    return sum(a != b for a, b in zip(expected, found)) + abs(len(expected) - len(found))


if __name__ == "__main__":
    main()
