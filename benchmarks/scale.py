"""Time and memory of an annotation job by catalogue size, with tiny pictures and a generator of constant answers.

    python benchmarks/scale.py --rows 10000 100000 1000000 --out benchmarks/results/scale.json

Each size runs in its own process. `one_size` lists the steps and what is measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from assignment import PeakRam
from PIL import Image

from mmsid.annotate.caption import CaptionConfig, picture_loader
from mmsid.annotate.generator import Request
from mmsid.annotate.job import annotate
from mmsid.annotate.job_inputs import JobInput, Task
from mmsid.annotate.prompts import load_prompt
from mmsid.annotate.records import Caption, parse_caption
from mmsid.artifacts import write_json, writing
from mmsid.catalog import CatalogConfig, read_catalog


class Constant:
    """Generator of one caption for every picture. It raises KeyboardInterrupt after `limit` requests."""

    model_id, parameters = "constant@0", {}

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.num_requests = limit, 0

    def generate(self, requests: list[Request]) -> list[str]:
        if self.limit is not None and self.num_requests >= self.limit:
            raise KeyboardInterrupt
        self.num_requests += len(requests)
        return ['{"caption": "a tiny picture of one colour"}'] * len(requests)


def main() -> None:
    """Measure every size and write one JSON file; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale.json"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # folder of a catalogue; used by the child process
    parsed = parser.parse_args()
    if parsed.one is not None:
        print(json.dumps(one_size(parsed.one)))
        return
    records = []
    for rows in parsed.rows:
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder), rows)
            command = [sys.executable, __file__, "--one", folder]
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        records.append(json.loads(finished.stdout.splitlines()[-1]))
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(parsed.out, {"sizes": records})
        print(table(records))


def draw(folder: Path, rows: int) -> None:
    """Write `rows` items, each with a 4 x 4 picture of its own colour (about 80 bytes)."""
    for start in range(0, rows, 1_000):
        (folder / f"images/{start // 1_000}").mkdir(parents=True)
        for at in range(start, min(start + 1_000, rows)):
            Image.new("RGB", (4, 4), (at >> 16 & 255, at >> 8 & 255, at & 255)).save(folder / name_of(at))
    columns = {"item_id": [f"i{at}" for at in range(rows)], "title": [f"thing {at}" for at in range(rows)]}
    pq.write_table(pa.table(columns | {"image": [name_of(at) for at in range(rows)]}), folder / "items.parquet")


def name_of(at: int) -> str:
    """Path of a picture, relative to the catalogue's folder."""
    return f"images/{at // 1_000}/{at}.png"


def one_size(folder: Path) -> dict[str, Any]:
    """CPU seconds (all threads of the process), wall seconds and memory of three steps.

    `read`: the catalogue, which is held as a whole. `job`: all rows except those of the last shard, where the job is interrupted.
    `resume`: the remaining rows. Memory is the growth of anonymous resident memory during the step, at its peak, in MiB.
    """
    catalog = CatalogConfig(items=folder / "items.parquet")
    config = CaptionConfig(out=folder / "run" / "caption", catalog=catalog, cache=folder / "answers.sqlite", batch_size=64)
    task = Task("caption", load_prompt("caption_demo"), Caption, parse_caption, picture_loader(config))
    record: dict[str, Any] = {}

    def measured(step: str, work: Callable[[], Any]) -> Any:
        with PeakRam() as peak:
            started, cpu = time.perf_counter(), time.process_time()
            result = work()
            record[f"{step}_seconds"] = round(time.process_time() - cpu, 3)
            record[f"{step}_wall_seconds"] = round(time.perf_counter() - started, 3)
        record[f"{step}_mb"] = round(peak.grown / 2**20, 1)
        return result

    def job(generator: Constant) -> int:
        units = (JobInput(item.item_id, 0, item.images) for item in items)
        with writing(config.out, stage="caption", config=config, resume=True) as draft:
            annotate(units, len(items), task, generator, config, draft)
        return generator.num_requests

    def interrupted() -> None:
        try:
            job(Constant(limit=len(items) - len(items) % config.shard_rows))
        except KeyboardInterrupt:
            return
        raise SystemExit(f"{len(items)} rows are a multiple of 1,024, so no shard is left to resume; choose another number")

    import_libraries(folder, task)
    items = measured("read", lambda: read_catalog(catalog).items)
    record["rows"] = len(items)
    measured("job", interrupted)
    record["requests_on_resume"] = measured("resume", lambda: job(Constant()))
    return record


def import_libraries(folder: Path, task: Task) -> None:
    """Run a job of one row without a picture, so that no measured step includes imports."""
    config = CaptionConfig(out=folder / "warm" / "caption", catalog=CatalogConfig(items=folder / "items.parquet"))
    with writing(config.out, stage="caption", config=config) as draft:
        annotate([JobInput("none", reason="no_picture")], 1, task, Constant(), config, draft)


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table with one row per size."""
    lines = ["| rows | read, us per row | job, us per row | resume, s (wall) | read, MB | job, MB | resume, MB |", "|" + "---|" * 7]
    for record in records:
        each = [f"{1e6 * record[f'{step}_seconds'] / record['rows']:.0f}" for step in ("read", "job")]
        resume = f"{record['resume_seconds']:.1f} ({record['resume_wall_seconds']:.1f})"
        megabytes = [f"{record[f'{step}_mb']:.0f}" for step in ("read", "job", "resume")]
        lines.append(f"| {record['rows']:,} | " + " | ".join([*each, resume, *megabytes]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
