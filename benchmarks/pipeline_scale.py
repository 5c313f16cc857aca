"""Wall time, processor time and peak memory of every stage, by the number of items.

    OMP_NUM_THREADS=1 python benchmarks/pipeline_scale.py --items 10000 100000 1000000

The catalogue is generated: titles, brands, categories, one small picture per item up to `--pictures`, and ten events per item. The
backbone is tiny and the captioner returns a constant, so that the figures are those of the pipeline and not of a model. Every stage
runs in a process of its own. Writes benchmarks/results/pipeline_scale.json; sizes that are finished are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tokenizer_scale import write_encoder

from mmsid.artifacts import is_complete, read_json, write_json

RESULTS = Path(__file__).parent / "results" / "pipeline_scale.json"
EVENTS_PER_ITEM = 10
BATCH = 100_000
STAGES = ("ingest", "train_tokenizer", "assign", "baselines", "train_recommender", "recommend")
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
WORDS = np.unique(["".join(row[:length]) for row, length in zip(np.random.default_rng(1).choice(LETTERS, (2000, 9)), [3, 5, 7, 9] * 500)])
KINDS = [("home", "lamp"), ("home", "chair"), ("wear", "shoe"), ("wear", "bag"), ("food", "tea")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--pictures", type=int, default=100_000, help="at most this many items have a picture")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--work", type=Path, default=Path("runs") / "pipeline_scale")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=3, metavar=("STAGE", "CONFIG", "REPORT"), help="run one stage and report on it")
    parsed = parser.parse_args()
    if parsed.child:
        child(*parsed.child)
        return
    results = read_json(parsed.results) if parsed.results.is_file() else {}
    for items in parsed.items:
        folder = parsed.work / str(items)
        write_catalogue(folder / "catalogue", items, min(items, parsed.pictures))
        if not (folder / "encoder").is_dir():
            write_encoder(folder / "encoder", WORDS.tolist())
        config = folder / "run.yaml"
        config.write_text(json.dumps(run_config(folder)), encoding="utf-8")  # JSON is YAML
        for stage in parsed.stages:
            if is_complete(folder / "runs" / "scale" / stage) and stage in results.get(str(items), {}):
                continue
            report = folder / f"{stage}.json"
            report.unlink(missing_ok=True)
            command = [sys.executable, __file__, "--child", stage, str(config), str(report)]
            code = subprocess.run(command).returncode
            found = read_json(report) if report.is_file() else {"failed": code}
            results.setdefault(str(items), {})[stage] = found
            write_json(parsed.results, results)
            print(items, stage, found, flush=True)


def run_config(folder: Path) -> dict[str, Any]:
    source = folder / "catalogue"
    return {
        "name": "scale",
        "runs": str(folder / "runs"),
        "catalog": {
            "items": str(source / "items.parquet"),
            "events": str(source / "events.parquet"),
            "fields": {"attributes": ["brand"]},
        },
        "train_tokenizer": {
            "backbone": {"path": str(folder / "encoder"), "max_length": 24},
            "reconstruct": "off",
            "steps": 20,
            "codebook_size": 256,
        },
        "assign": {},
        "baselines": {"methods": ["balanced_rq"], "codebook_size": 256},
        "train_recommender": {"schedule": {"epochs": 1}, "model": {"d_model": 32, "heads": 2}, "classical_baselines": False},
        "recommend": {"k": 10},
    }


def child(stage: str, config: str, report: str) -> None:
    """Run one stage and write seconds and memory of this process, and the part of them that opening the catalogue takes."""
    from mmsid.catalog import catalog
    from mmsid.cli import main_stage

    reading = [0.0]
    opened = catalog.read_catalog

    def timed(config: Any) -> Any:
        start = time.perf_counter()
        found = opened(config)
        reading[0] += time.perf_counter() - start
        return found

    for module in [module for name, module in list(sys.modules.items()) if name.startswith("mmsid")]:
        if getattr(module, "read_catalog", None) is opened:
            module.read_catalog = timed
    before, used, start = memory(), cpu_seconds(), time.perf_counter()
    main_stage(stage, ["--config", config])
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found = {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(cpu_seconds() - used, 2),
        "opening_seconds": round(reading[0], 3),
        "memory_before_mb": round(before / 1e6),
        "peak_memory_mb": round(max(each.ru_maxrss for each in usage) * 1024 / 1e6),
    }
    write_json(Path(report), found)


def cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write_catalogue(folder: Path, items: int, pictures: int) -> None:
    if (folder / "events.parquet").is_file():
        return
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(pictures):
        path = folder / "pictures" / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    writer = None
    for start in range(0, items, BATCH):
        numbers = np.arange(start, min(start + BATCH, items))
        words = WORDS[rng.integers(0, len(WORDS), (len(numbers), 8))]
        kinds = [KINDS[number] for number in rng.integers(0, len(KINDS), len(numbers))]
        table = pa.table(
            {
                "item_id": [f"item{number}" for number in numbers],
                "title": [" ".join(row[:6]) for row in words],
                "brand": [row[6] for row in words],
                "categories": [[*kind, row[7]] for kind, row in zip(kinds, words)],
                "image": [f"pictures/{number}.png" if number < pictures else None for number in numbers],
            }
        )
        writer = writer or pq.ParquetWriter(folder / "items.parquet", table.schema)
        writer.write_table(table)
    writer.close()
    events, users = items * EVENTS_PER_ITEM, max(items, 1)
    table = pa.table(
        {
            "user_id": rng.integers(0, users, events),
            "item_id": pa.array(np.char.add("item", (items * rng.random(events) ** 2).astype(np.int64).astype(str))),
            "timestamp": rng.integers(1_600_000_000, 1_700_000_000, events),
        }
    )
    pq.write_table(table, folder / ".events.parquet")
    os.replace(folder / ".events.parquet", folder / "events.parquet")


if __name__ == "__main__":
    main()
