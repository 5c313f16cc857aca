"""Speed and scaling of code assignment on one thread: encoders for given codebooks, and encoding, relocation and trie by catalogue size.

    python benchmarks/assignment.py --out benchmarks/results/assignment.json

Times are CPU seconds of the thread. Prints Markdown and writes the results as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from threadpoolctl import threadpool_limits

from mmsid.artifacts import sha256, write_json
from mmsid.quantize import CodebookScores, ResidualCodebooks, balanced_residual_kmeans, rq_kmeans
from mmsid.sids import Trie, relocate

LEVELS, SIZE = 3, 256
BLOCK = 50_000


def main() -> None:
    """Run both parts, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="vectors of part 1")
    parser.add_argument("--dim", type=int, default=384, help="dimensions of part 1")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6], help="items of part 2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/assignment.json"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # process of part 2: folder of vectors and codebooks
    parsed = parser.parse_args()
    threadpool_limits(1)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if parsed.one is not None:
        print(json.dumps(measure_size(parsed.one)))
        return
    results = {
        "threads": 1,
        "encode": compare_encoders(parsed.rows, parsed.dim, parsed.repeats),
        "scale": [measure_in_new_process(size) for size in parsed.sizes],
    }
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(parsed.out, results)
    print(table(results))


def synthetic(rows: int, dim: int, seed: int, clusters: int = 4096) -> np.ndarray:
    """Unit vectors (rows, dim) float32 around two levels of cluster centres, with cluster sizes proportional to 1 / rank^0.7.

    Codes of such vectors collide, prefix groups overflow, and items are relocated.
    """
    centres = np.random.default_rng(0)
    coarse, fine = centres.normal(size=(64, dim)), centres.normal(size=(clusters, dim)) * 0.7
    share = np.arange(1, clusters + 1) ** -0.7
    rng = np.random.default_rng([1, seed])
    chosen = rng.choice(clusters, rows, p=share / share.sum())
    x = (coarse[chosen % 64] + fine[chosen] + rng.normal(size=(rows, dim)) * 0.6).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def compare_encoders(rows: int, dim: int, repeats: int) -> list[dict[str, Any]]:
    """Part 1: codes for given codebooks by `ResidualCodebooks.encode`, faiss and, if installed, `semantic-id` and `rectokens`.

    Runs are interleaved, and the fastest of each encoder counts.

    Returns:
        One record per encoder: seconds, speed relative to faiss, mean squared distance to the decoded vectors, share of codes equal to
        those of faiss.
    """
    x = synthetic(rows, dim, seed=0)
    codebooks = rq_kmeans(synthetic(20_000, dim, seed=1), LEVELS, SIZE, 0, iterations=10)
    encoders = {"mmsid": lambda: codebooks.encode(x).numpy(), "faiss": faiss_encoder(codebooks, x)}
    for name, build in (("semantic-id", semantic_id_encoder), ("rectokens", rectokens_encoder)):
        try:
            encoders[name] = build(codebooks, x)
        except ImportError as error:
            print(f"{name} is skipped: {error}", file=sys.stderr)
    seconds, codes = dict.fromkeys(encoders, np.inf), {}
    for _ in range(repeats):
        for name, encode in encoders.items():
            started = time.thread_time()
            codes[name] = encode()
            seconds[name] = min(seconds[name], time.thread_time() - started)
    return [
        {
            "encoder": name,
            "rows": rows,
            "dim": dim,
            "seconds": round(seconds[name], 3),
            "speed_over_faiss": round(seconds["faiss"] / seconds[name], 2),
            "mse": float((torch.from_numpy(x) - codebooks.decode(codes[name])).double().square().sum(1).mean()),
            "codes_equal_to_faiss": float((codes[name] == codes["faiss"]).mean()),
        }
        for name in encoders
    ]


def faiss_encoder(codebooks: ResidualCodebooks, x: np.ndarray) -> Callable[[], np.ndarray]:
    """Greedy residual quantizer of faiss with the given codebooks. With 256 codes per level, one byte of its packed codes is one code."""
    quantizer = faiss.ResidualQuantizer(codebooks.dim, LEVELS, 8)
    quantizer.max_beam_size = 1
    faiss.copy_array_to_vector(codebooks.vectors.numpy().ravel(), quantizer.codebooks)
    quantizer.is_trained = True
    return lambda: quantizer.compute_codes(x).astype(np.int64)


def semantic_id_encoder(codebooks: ResidualCodebooks, x: np.ndarray) -> Callable[[], np.ndarray]:
    """RQKMeans of `semantic-id` with the given codebooks."""
    from semantic_id.algorithms.rq_kmeans import RQKMeans

    encoder = RQKMeans(n_levels=LEVELS, n_clusters=SIZE)
    encoder.codebooks_ = [level.numpy() for level in codebooks.vectors]
    encoder.D_ = codebooks.dim
    return lambda: encoder.encode(x).astype(np.int64)


def rectokens_encoder(codebooks: ResidualCodebooks, x: np.ndarray) -> Callable[[], np.ndarray]:
    """Residual quantizer of `rectokens` with the given codebooks, without its torch.compile wrapper (which needs a compiler)."""
    from rectokens.quantizers.kmeans import KMeansQuantizer
    from rectokens.quantizers.residual import ResidualQuantizer

    torch.set_float32_matmul_precision("highest")  # the import lowers the precision for the whole process
    levels = [KMeansQuantizer(SIZE, codebooks.dim) for _ in range(LEVELS)]
    for quantizer, vectors in zip(levels, codebooks.vectors, strict=True):
        quantizer.codebook.update(torch.arange(SIZE), vectors)
        quantizer._fitted = True
    quantizer, rows = ResidualQuantizer(levels), torch.from_numpy(x)
    return lambda: quantizer.quantize(rows).codes.numpy()


def measure_in_new_process(items: int, dim: int = 64) -> dict[str, Any]:
    """Part 2: write vectors of one cluster per ten items and codebooks, and run `measure_size` in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        vectors = np.lib.format.open_memmap(Path(folder) / "x.npy", "w+", np.float32, (items, dim))
        for start in range(0, items, BLOCK):
            vectors[start : start + BLOCK] = synthetic(min(BLOCK, items - start), dim, 10 + start, items // 10)
        vectors.flush()
        sample = synthetic(20_000, dim, 1, items // 10)
        balanced_residual_kmeans(sample, LEVELS, SIZE, 0).codebooks.save(Path(folder) / "codebooks.safetensors")
        command = [sys.executable, __file__, "--one", folder]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def measure_size(folder: Path) -> dict[str, Any]:
    """CPU seconds and peak RAM of encoding, relocation and the trie; `codes_mb` is the size of the codes (8 bytes each)."""
    x = np.lib.format.open_memmap(folder / "x.npy", "r+")
    codebooks = ResidualCodebooks.load(folder / "codebooks.safetensors")
    hashes = [sha256(str(row)) for row in range(len(x))]
    codebooks.encode(x[:1000])  # loads libraries before the measurement
    record: dict[str, Any] = {"items": len(x), "dim": x.shape[1], "codes_mb": 8 * LEVELS * len(x) / 2**20}

    def measured(step: str, work: Callable[[], Any]) -> Any:
        with PeakRam() as ram:
            started = time.thread_time()
            result = work()
            record[f"{step}_seconds"] = round(time.thread_time() - started, 3)
        record[f"{step}_mb"] = round(ram.grown / 2**20, 1)
        return result

    raw = measured("encode", lambda: codebooks.encode(x).numpy())
    scores = CodebookScores(codebooks, x)
    codes = measured("relocate", lambda: relocate(raw, scores.last_scores, hashes, SIZE, scores.prefix_candidates))
    measured("trie", lambda: Trie.from_codes(codes, (SIZE,) * LEVELS))
    record["lost_before"] = len(raw) - len(np.unique(raw, axis=0))
    record["lost_after"] = len(codes) - len(np.unique(codes, axis=0))
    record["moved"] = int((codes != raw).any(axis=1).sum())
    record["spilled"] = int((codes[:, :-1] != raw[:, :-1]).any(axis=1).sum())
    return record


class PeakRam:
    """Growth of anonymous resident RAM (without the mapped vectors), in bytes, sampled every 5 ms by a thread."""

    def __enter__(self) -> PeakRam:
        self.start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.grown = max(self.peak, self._now()) - self.start

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024


def table(results: dict[str, Any]) -> str:
    """Results in Markdown."""
    lines = [
        "| encoder, given codebooks | seconds | speed over faiss | mean squared error | codes equal to faiss |",
        "|---|---|---|---|---|",
    ]
    for row in results["encode"]:
        lines.append(
            f"| {row['encoder']} | {row['seconds']:.2f} | {row['speed_over_faiss']:.2f} | {row['mse']:.6f} "
            f"| {row['codes_equal_to_faiss']:.6f} |"
        )
    steps = ("encode", "relocate", "trie")
    lines += ["", "| items | " + " | ".join(f"{step}, us per item" for step in steps) + " | moved | spilled | codes, MB | "]
    lines[-1] += " | ".join(f"{step}, MB" for step in steps) + " |"
    lines.append("|" + "---|" * 10)
    for row in results["scale"]:
        cells = [f"{1e6 * row[f'{step}_seconds'] / row['items']:.1f}" for step in steps]
        cells += [f"{row['moved']:,}", f"{row['spilled']:,}", f"{row['codes_mb']:.1f}", *[f"{row[f'{step}_mb']:.0f}" for step in steps]]
        lines.append(f"| {row['items']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
