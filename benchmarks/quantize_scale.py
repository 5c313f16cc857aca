"""Time and memory of `mmsid quantize` by the number of vectors, with generated vectors in a memory-mapped file.

    python benchmarks/quantize_scale.py --items 100000 1000000 10000000 --out benchmarks/results/quantize_scale.json

Each size runs in its own process, step by step as the stage does. Codebook size and levels are those that the stage proposes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from assignment import PeakRam, synthetic

from mmsid.artifacts import read_json, write_json, writing
from mmsid.catalog.vector_files import open_vectors
from mmsid.quantize.sizes import propose
from mmsid.sids import SidTable, Trie, write_sid_folder
from mmsid.tokenizer.quantize_vectors import QuantizeConfig, assign_codes, fit, measure, resolve_codes, sid_table
from mmsid.tokenizer.vector_space import EMBEDDINGS, write_space

STEPS = ("read", "fit", "assign", "relocate", "table", "metrics", "trie", "write", "load")
BLOCK = 500_000


def main() -> None:
    """Measure every size and write one JSON file; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--method", default="balanced_rq")
    parser.add_argument("--codebook-size", type=int, help="default: as proposed")
    parser.add_argument("--num-levels", type=int, help="default: as proposed")
    parser.add_argument("--scratch", type=Path, help="folder for the generated vectors; default: the system's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantize_scale.json"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # folder of the vectors; used by the child process
    parsed = parser.parse_args()
    if parsed.one is not None:
        print(json.dumps(one_size(parsed.one, parsed.method, parsed.codebook_size, parsed.num_levels)))
        return
    records = read_json(parsed.out)["sizes"] if parsed.out.is_file() else []
    for items in parsed.items:
        with tempfile.TemporaryDirectory(dir=parsed.scratch) as folder:
            draw(Path(folder) / "vectors.npy", items, parsed.dim)
            command = [sys.executable, __file__, "--one", folder, "--method", parsed.method]
            for name in ("codebook_size", "num_levels"):
                if getattr(parsed, name) is not None:
                    command += [f"--{name.replace('_', '-')}", str(getattr(parsed, name))]
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        record = json.loads(finished.stdout.splitlines()[-1])
        keys = ("items", "dim", "method", "codebook_size", "num_levels")
        records = [other for other in records if any(other[key] != record[key] for key in keys)] + [record]
        records.sort(key=lambda one: [one[key] for key in keys])
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(parsed.out, {"sizes": records})
        print(table(records))


def draw(path: Path, items: int, dim: int) -> None:
    """Write clustered vectors, one cluster per ten items."""
    vectors = np.lib.format.open_memmap(path, "w+", np.float32, (items, dim))
    for start in range(0, items, BLOCK):
        vectors[start : start + BLOCK] = synthetic(min(BLOCK, items - start), dim, 10 + start, max(items // 10, 64))
    vectors.flush()


def one_size(folder: Path, method: str, codebook_size: int | None, num_levels: int | None) -> dict[str, Any]:
    """Wall and CPU seconds of each step, and the growth of anonymous resident memory at its peak in MB, without mapped files.

    `table` makes the SID table with its ids; `write` includes the trie once more, exports and checksums; `load` reads the table back.
    `peak_rss_mb` is the largest resident memory of the process, mapped pages of the vectors included.
    """
    config = QuantizeConfig(out=folder / "sids", vectors=(folder / "vectors.npy",), method=method, seed=0)
    files = open_vectors(config.vectors)
    sizes = propose(len(files), codebook_size, num_levels)
    record: dict[str, Any] = {"items": len(files), "dim": files.dim, "method": method, "codebook_size": sizes.codebook_size}
    record |= {"num_levels": sizes.num_levels, "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))}

    def measured(step: str, work: Callable[[], Any]) -> Any:
        with PeakRam() as peak:
            started, cpu = time.perf_counter(), time.process_time()
            result = work()
            record[f"{step}_cpu_seconds"] = round(time.process_time() - cpu, 2)
            record[f"{step}_wall_seconds"] = round(time.perf_counter() - started, 2)
        record[f"{step}_mb"] = round(peak.grown / 2**20)
        record[f"{step}_total_mb"] = round((peak.start + peak.grown) / 2**20)
        print(step, record[f"{step}_wall_seconds"], record[f"{step}_total_mb"], file=sys.stderr, flush=True)
        return result

    with writing(config.out, stage="quantize", config=config) as draft:
        draft.scratch.add("latents")
        space = measured("read", lambda: write_space(files, draft.path / EMBEDDINGS))
        quantizer, rows = measured("fit", lambda: fit(config, sizes, space))
        raw = measured("assign", lambda: assign_codes(quantizer, space, rows, draft.path / "latents"))
        resolution = measured("relocate", lambda: resolve_codes(config, sizes, space, raw))
        sids = measured("table", lambda: sid_table(config, sizes, files, space, raw, resolution))
        metrics = measured("metrics", lambda: measure(config, sids, space, quantizer, raw, resolution))
        record["nodes"] = measured("trie", lambda: Trie.from_table(sids).num_nodes(sizes.num_levels))
        measured("write", lambda: write_sid_folder(draft.path, sids, metrics))
    measured("load", lambda: len(SidTable.load(config.out)))
    record["raw_colliding_share"] = round(metrics["raw"]["colliding_share"], 4)
    record["lost_after"] = metrics["published"]["items_lost"]
    record |= {name: metrics["collisions"][name] for name in ("moved", "spilled")}
    record["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return record


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table with one row per size: wall seconds (CPU seconds; peak anonymous memory of the process in MB) of each step."""
    lines = ["| items | K x L | moved | spilled | " + " | ".join(STEPS) + " |", "|" + "---|" * (len(STEPS) + 4)]
    for record in records:
        cells = [
            f"{record[f'{step}_wall_seconds']:.1f} ({record[f'{step}_cpu_seconds']:.1f}; {record[f'{step}_total_mb']:,})" for step in STEPS
        ]
        sizes = f"{record['codebook_size']} x {record['num_levels']}"
        lines.append(f"| {record['items']:,} | {sizes} | {record['moved']:,} | {record['spilled']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
