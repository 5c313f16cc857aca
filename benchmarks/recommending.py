"""Time and memory of the hybrid recommender by catalogue size: loading, recommending, adding items.

    python benchmarks/recommending.py --items 10000 100000 1000000 --out benchmarks/results/recommending.json

The catalogue is generated: Zipf-distributed words and neighbours, clustered embeddings, an untrained decoder and ranker. The
figures are those of time and memory only; the recommendations mean nothing. Each size is measured in a process of its own, on one thread.
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

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
import torch
from assignment import PeakRam
from scipy import sparse

from mmsid.artifacts import sha256, write_json
from mmsid.catalog.item import Item
from mmsid.recommend.coengagement_source import NEIGHBOURS, SCORES, CoEngagementSource
from mmsid.recommend.embedding_source import EmbeddingSource, fit_centroids, unit_rows
from mmsid.recommend.path_source import PathSource
from mmsid.recommend.paths import ItemPaths
from mmsid.recommend.ranker import RANKERS, Ranker
from mmsid.recommend.recommender import Recommender
from mmsid.recommend.recommender_files import RecommenderState
from mmsid.recommend.sid_transformer import SidTransformer, SidTransformerShape
from mmsid.recommend.sources import Sources, term_sources
from mmsid.recommend.words import Vectorizers, labels_vectorizer, words_vectorizer
from mmsid.sids.table import SidTable

SIZES = (256, 256, 256)
DIM = 448  # of the embeddings, the default of the tokenizer
WORDS = 60  # terms per item
VOCABULARY = 200_000
HISTORY = 20  # items per history
ADDED = 1000  # items of one addition
TOKENIZER = sha256("generated")


def main() -> None:
    """Measure every size and write one JSON file; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--users", type=int, default=640)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recommending.json"))
    parser.add_argument("--generate", type=Path, help=argparse.SUPPRESS)  # folder to write; used by a child process
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # folder to measure; used by a child process
    parsed = parser.parse_args()
    if parsed.generate is not None:
        Recommender(generate(parsed.items[0], np.random.default_rng(0))).save_pretrained(parsed.generate)
        return
    if parsed.measure is not None:
        print(json.dumps(measure(parsed.measure, parsed.users)))
        return
    records = []
    for items in parsed.items:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--items", str(items), "--users", str(parsed.users)]
            subprocess.run([*command, "--generate", f"{folder}/recommender"], check=True)
            finished = subprocess.run([*command, "--measure", f"{folder}/recommender"], stdout=subprocess.PIPE, text=True, check=True)
        records.append(json.loads(finished.stdout.splitlines()[-1]))
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(parsed.out, {"sizes": records})
    print(table(records))


def measure(path: Path, users: int) -> dict[str, Any]:
    """CPU seconds of one thread per step, and the growth of anonymous resident memory at its peak, in MiB.

    `load` includes the hashes of all files and all search structures. `recommend` is measured in batches of 64 users, after a
    first batch. `one` is a call with a single user. `resident_mb` is the peak of the process with its libraries and mapped files.
    """
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(0)
    record: dict[str, Any] = {"users": users}

    def measured(step: str, work: Callable[[], Any]) -> Any:
        with PeakRam() as peak:
            started = time.process_time()
            result = work()
            record[f"{step}_seconds"] = round(time.process_time() - started, 4)
        record[f"{step}_mb"] = round(peak.grown / 2**20, 1)
        return result

    record["folder_mb"] = round(sum(file.stat().st_size for file in path.iterdir()) / 2**20, 1)
    recommender = measured("load", lambda: Recommender.from_pretrained(path))
    num_items = record["items"] = len(recommender.item_ids)
    popular = zipf(rng, num_items, (users, HISTORY))
    histories = [[recommender.item_ids[row] for row in rows] for rows in popular]
    recommender.recommend(histories[:64])
    measured("recommend", lambda: recommender.recommend(histories))
    record["ms_per_user"] = round(1000 * record["recommend_seconds"] / users, 3)
    singles = histories[: min(users, 50)]
    measured("one", lambda: [recommender.recommend([history]) for history in singles])
    record["ms_of_one"] = round(1000 * record["one_seconds"] / len(singles), 3)
    items, sids, embeddings = new_items(recommender, rng)
    measured("add", lambda: recommender.add_items(items, sids, embeddings))
    record["resident_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    return record


def zipf(rng: np.random.Generator, size: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers below `size` with a heavy-tailed, log-uniform distribution, spread over the range by a fixed permutation."""
    drawn = np.exp(rng.random(shape) * np.log(size)).astype(np.int64) - 1
    return (drawn * 2_654_435_761) % size  # an odd multiplier: neighbouring numbers are far apart


def random_rows(rng: np.random.Generator, rows: int, columns: int, count: int) -> sparse.csr_matrix:
    """Sparse matrix with about `count` values per row in heavy-tailed columns."""
    lengths = np.minimum(rng.geometric(1 / count, rows), NEIGHBOURS)
    indices = zipf(rng, columns, (int(lengths.sum()),)).astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    matrix = sparse.csr_matrix((rng.random(len(indices), dtype=np.float32), indices, indptr), shape=(rows, columns))
    matrix.sum_duplicates()
    return matrix


def generate(num_items: int, rng: np.random.Generator) -> RecommenderState:
    """A recommender of random content, with the sparsity of a real one."""
    ids = [f"i{number}" for number in range(num_items)]
    codes = np.stack([rng.integers(size, size=num_items) for size in SIZES], 1)
    paths = ItemPaths(codes, SIZES)
    centres = rng.normal(size=(1000, DIM)).astype(np.float32)
    embeddings = centres[rng.integers(1000, size=num_items)] + rng.normal(size=(num_items, DIM)).astype(np.float32)
    embeddings = unit_rows(embeddings)
    words, labels = random_rows(rng, num_items, VOCABULARY, WORDS), random_rows(rng, num_items, 5000, 3)
    sources = Sources(
        path=PathSource(SidTransformer(paths, SidTransformerShape()), paths),
        coengagement=CoEngagementSource({name: random_rows(rng, num_items, num_items, 50) for name in SCORES}),
        embedding=EmbeddingSource(embeddings, fit_centroids(embeddings)),
        counts=rng.geometric(0.05, num_items) - 1,
        **term_sources(words, labels),
    )
    features = len(sources.feature_names())
    rankers = [Ranker(torch.zeros(features), torch.ones(features)).eval() for _ in range(RANKERS)]
    for ranker in rankers:
        torch.nn.init.normal_(ranker.linear.weight)
    vectorizers = Vectorizers(
        words_vectorizer(vocabulary={f"w{number}": number for number in range(VOCABULARY)}),
        labels_vectorizer(vocabulary={f"l{number}": number for number in range(5000)}),
    )
    vectorizers.words.idf_, vectorizers.labels.idf_ = np.ones(VOCABULARY, np.float32), np.ones(5000, np.float32)
    sids = SidTable.from_codes(ids, codes, SIZES, tokenizer_sha256=TOKENIZER)
    nothing = np.zeros(num_items, dtype=np.int64)
    return RecommenderState(sids, [sha256(name) for name in ids], nothing, nothing.astype(bool), sources, rankers, vectorizers)


def new_items(recommender: Recommender, rng: np.random.Generator) -> tuple[list[Item], SidTable, np.ndarray]:
    """Items to add, with their SIDs and embeddings."""
    ids = [f"n{number}" for number in range(ADDED)]
    texts = [" ".join(f"w{word}" for word in zipf(rng, VOCABULARY, (WORDS // 2,))) for _ in ids]
    items = [Item(name, text, "", (), (), {}, sha256(name), ()) for name, text in zip(ids, texts, strict=True)]
    codes = np.stack([rng.integers(size, size=ADDED) for size in SIZES], 1)
    return items, SidTable.from_codes(ids, codes, SIZES, tokenizer_sha256=TOKENIZER), rng.normal(size=(ADDED, DIM))


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table with one row per size. The last column compares the time per user with that of the first size."""
    lines = [
        "| items | CPU ms per user, batches of 64 | CPU ms of one user alone | load, CPU s | memory of loading, MB | peak of the process, "
        "MB | folder, MB | adding 1,000 items, CPU s | time per user over the first size |",
        "|" + "---|" * 9,
    ]
    for record in records:
        ratio = record["ms_per_user"] / records[0]["ms_per_user"]
        cells = [
            f"{record['items']:,}",
            f"{record['ms_per_user']:.1f}",
            f"{record['ms_of_one']:.1f}",
            f"{record['load_seconds']:.1f}",
            f"{record['load_mb']:,.0f}",
            f"{record['resident_mb']:,.0f}",
            f"{record['folder_mb']:,.0f}",
            f"{record['add_seconds']:.2f}",
            f"{ratio:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
