"""Time and memory of tokenizer training and assignment by catalogue size, with a tiny encoder and generated items and users.

    OMP_NUM_THREADS=1 python benchmarks/tokenizer_scale.py --rows 10000 100000

Each size runs in its own process. Seconds are CPU seconds; memory is the growth of resident memory at its peak. The training steps are
the same for both sizes, so a linear stage shows a ratio between 1 and 10. Writes benchmarks/results/tokenizer_scale.json.
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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from assignment import PeakRam
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from mmsid.artifacts import write_json
from mmsid.catalog import CatalogConfig, read_catalog, split_histories
from mmsid.sids import SidTable
from mmsid.tokenizer import assign, train
from mmsid.tokenizer.model import BackboneSettings

WORDS = 2000
GROUP = 50  # items that users of one group engage with


def main() -> None:
    """Measure every size, write one JSON file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5])
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tokenizer_scale.json")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # folder of a catalogue; used by the child process
    parsed = parser.parse_args()
    if parsed.one is not None:
        print(json.dumps(one_size(parsed.one, parsed.codes, parsed.steps)))
        return
    records = []
    for rows in parsed.rows:
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder), rows)
            command = [sys.executable, __file__, "--one", folder, "--codes", str(parsed.codes), "--steps", str(parsed.steps)]
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        records.append(json.loads(finished.stdout.splitlines()[-1]))
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(parsed.out, {"codes": parsed.codes, "steps": parsed.steps, "sizes": records})
    print(table(records))


def draw(folder: Path, rows: int) -> None:
    """Write `rows` items of eight words, and histories of eight items of one group, about five interactions per item.

    A tenth of the items has no interaction. The tiny encoder is written beside them.
    """
    rng = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(WORDS)])
    titles = [" ".join(line) for line in words[rng.integers(WORDS, size=(rows, 8))]]
    pq.write_table(pa.table({"item_id": [f"i{number}" for number in range(rows)], "title": titles}), folder / "items.parquet")
    warm = rng.permutation(rows)[: rows - rows // 10]
    users = 5 * rows // 8
    groups = rng.integers(-(-len(warm) // GROUP), size=users)
    places = np.minimum(groups[:, None] * GROUP + rng.integers(GROUP, size=(users, 8)), len(warm) - 1)
    histories = [[f"i{row}" for row in line] for line in warm[places].tolist()]
    pq.write_table(pa.table({"user_id": [f"u{user}" for user in range(users)], "items": histories}), folder / "sequences.parquet")
    write_encoder(folder / "encoder", words.tolist())


def write_encoder(folder: Path, words: list[str]) -> None:
    """An untrained BERT of two layers of width 32 with one token per word."""
    vocabulary = {token: index for index, token in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", *words, "title", ":", "."])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), pad_token_id=1, **sizes)).save_pretrained(folder)


def one_size(folder: Path, codes: int, steps: int) -> dict[str, Any]:
    """CPU seconds and memory (MiB) of both stages, and how many items with interactions were read with their behaviour."""
    catalog = CatalogConfig(items=folder / "items.parquet", sequences=folder / "sequences.parquet")
    record: dict[str, Any] = {}

    def measured(stage: str, work: Callable[[], Any]) -> Any:
        with PeakRam() as peak:
            started = time.process_time()
            result = work()
            record[f"{stage}_seconds"] = round(time.process_time() - started, 1)
        record[f"{stage}_mb"] = round(peak.grown / 2**20)
        return result

    backbone = BackboneSettings(path=str(folder / "encoder"), max_length=24)
    settings = {"codebook_size": codes, "steps": steps, "reconstruct": "off", "backbone": backbone, "batch_size": 64}
    config = train.TrainTokenizerConfig(out=folder / "tokenizer", catalog=catalog, **settings)
    tokenizer = measured("train", lambda: train.run(config))
    sids = measured("assign", lambda: assign.run(assign.AssignConfig(out=folder / "sids", tokenizer=tokenizer, catalog=catalog)))
    source = SidTable.load(sids).source
    histories = split_histories(read_catalog(catalog), catalog.split).fit_histories()
    engaged = len(np.unique(np.concatenate(histories)))
    return {"rows": len(source), "with_interactions": engaged, "with_behaviour": int((source == "behaviour").sum())} | record


def table(records: list[dict[str, Any]]) -> str:
    """Markdown with one row per size; ratios are to the first size."""
    columns = {
        "items": "rows",
        "with train interactions": "with_interactions",
        "read with behaviour": "with_behaviour",
        "train, CPU s": "train_seconds",
        "train, MB": "train_mb",
        "assign, CPU s": "assign_seconds",
        "assign, MB": "assign_mb",
    }
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for record in records:
        cells = [
            f"{record[key]:,}" + (f" ({record[key] / max(records[0][key], 1e-9):.1f})" if key.startswith(("train", "assign")) else "")
            for key in columns.values()
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
