"""What does the tokenizer cost on top of its backbone? Encoding and a training step, ratios within one run, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/encoding.py

Items are synthetic texts of very unequal length for MiniLM. The rival is the bare body: the same rows with as many tokens more as there
are SID and EMB tokens, its own attention mask, nothing else.

- Encoding: `ItemTokenizer.encode` (tokenising, batching, query tokens, heads, doubtful items read again) against forwards of the bare
  body over token ids that lie ready, sorted by their count and padded to the longest row of each batch. Throughput of ours over the
  bare body's; wanted: .95 at least.
- A training step without reconstruction (batching, forward, losses, backward, clipping, optimiser) against forward and backward of
  the bare body with the same LoRA over the same batch. Time of ours over the bare body's; wanted: 1.15 at most.
- Reconstruction: what it adds to such a step, timed apart.

Seconds are those that the process spent computing, so that other work on the machine counts little; ways are interleaved, a ratio is
taken within each repetition, and the median is reported. Prints Markdown; writes benchmarks/results/encoding.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmsid.artifacts import write_json
from mmsid.backbone.query_tokens import Batch
from mmsid.tokenizer import initialization
from mmsid.tokenizer.behaviour_regression import BehaviourRegression
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import DOUBTFUL, ItemTokenizer, TokenizerSettings
from mmsid.tokenizer.objective import Labels, LossWeights, Objective
from mmsid.tokenizer.reconstruction import train_decoder

WORDS = [
    *("red", "blue", "green", "striped", "leather", "summer", "winter", "running", "office", "garden"),
    *("lamp", "chair", "shoe", "bag", "light", "warm", "noble", "cheap", "new", "soft"),
]
BEHAVIOUR = 64


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--codes", type=int, default=32, help="per level; as many items to a code as in a catalogue")
    parser.add_argument("--memory", type=int, default=4096, help="items that the tokenizer remembers when it encodes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "encoding.json")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    items = synthetic_items(parsed.items)
    width = 384 + BEHAVIOUR
    tokenizer = ItemTokenizer(TokenizerSettings(codebook_size=parsed.codes, code_dim=width + 3, embedding_dim=width))
    labels = start(tokenizer, items, parsed.batch)
    trained = compare_training(tokenizer, items, labels, parsed.batch, parsed.repeats)
    if parsed.memory:
        tokenizer.add_behaviour(
            BehaviourRegression(parsed.memory, width + 3)
        )  # remembers nothing: it costs what a fitted one costs, and moves no code
    results = {
        "threads": 1,
        "items": parsed.items,
        "batch": parsed.batch,
        "memory": parsed.memory,
        "encode": compare_encoding(tokenizer, items, parsed.batch, parsed.repeats),
        "train": trained,
    }
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(parsed.out, results)
    print(table(results))


def synthetic_items(count: int) -> list[ItemInput]:
    """Texts of 5 to 60 words, short ones more often."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.0, 0.6, count), 5, 60).astype(int)
    return [ItemInput(f"item {number}: {' '.join(rng.choice(WORDS, length))}") for number, length in enumerate(lengths)]


def start(tokenizer: ItemTokenizer, items: list[ItemInput], batch: int) -> Tensor:
    """The closed-form start that training begins with, on random behaviour: margins as real codes have them. -> target codes (N, L)."""
    readings = initialization.read_states(tokenizer, items, batch, 0)
    vectors = np.random.default_rng(1).normal(size=(len(items), BEHAVIOUR)).astype(np.float32) / BEHAVIOUR**0.5
    fused = initialization.fused_space(readings.pooled, initialization.Behaviour(None, vectors, np.zeros(len(items))), 1.0, centre=False)
    return initialization.balanced_start(tokenizer, readings, fused, 0)


def compare_encoding(tokenizer: ItemTokenizer, items: list[ItemInput], batch: int, repeats: int) -> dict[str, Any]:
    """Items per second of both ways, and the median ratio."""
    encoded = tokenizer.backbone.tokens_of(items)
    counts = [row["input_ids"].shape[1] for row in encoded]
    order = np.argsort(counts, kind="stable")
    ready = [tokenizer.backbone.stack([encoded[row] for row in order[first : first + batch]], 1) for first in range(0, len(items), batch)]

    @torch.no_grad()
    def bare() -> None:
        for one in ready:
            body_states(tokenizer, one)

    tokenizer.eval()
    ours, theirs = interleaved([lambda: tokenizer.encode(items, batch), bare], repeats)
    scores = tokenizer.encode(items, batch).scores
    return {
        "tokens_per_item": float(np.mean(counts)) + tokenizer.backbone.num_queries,
        "ours_items_per_second": len(items) / float(np.median(ours)),
        "bare_items_per_second": len(items) / float(np.median(theirs)),
        "throughput_over_bare": float(np.median(theirs / ours)),
        "read_again": float((tokenizer.head.greedy(scores).relative < DOUBTFUL).float().mean()),
    }


def compare_training(tokenizer: ItemTokenizer, items: list[ItemInput], codes: Tensor, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step: bare forward and backward, ours without reconstruction, ours with it."""
    rows = np.argsort([len(item.text) for item in items], kind="stable")[len(items) // 2 :][:batch]
    texts = [" ".join(item.text.split()[:20]) for item in items]
    decoder = train_decoder(texts, prompt_length=tokenizer.num_levels + 1, steps=2)
    plain = Objective(tokenizer, LossWeights(reconstruction=0.0), None)
    whole = Objective(tokenizer, LossWeights(), decoder)
    ids, mask = decoder.ids([texts[row] for row in rows])
    half, index = len(rows) // 2, torch.from_numpy(rows)
    labels = Labels(
        index,
        codes[index],
        torch.randn(len(rows), tokenizer.settings.code_dim),
        torch.arange(len(rows))[:, None].expand(-1, tokenizer.num_levels) % 8,
        torch.ones(half, dtype=torch.bool),
        torch.ones(half, dtype=torch.bool),
        ids,
        mask,
    )
    ready = tokenizer.backbone.collate([items[row] for row in rows])
    body = [weight for weight in tokenizer.backbone.parameters() if weight.requires_grad]

    def bare() -> None:
        body_states(tokenizer, ready).float().sum().backward()
        for weight in body:
            weight.grad = None

    ways = [bare, stepper(plain, items, rows, labels), stepper(whole, items, rows, labels)]
    tokenizer.train()
    theirs, ours, with_reconstruction = interleaved(ways, repeats)
    return {
        "tokens": int(ready["attention_mask"].sum()),
        "bare_seconds": float(np.median(theirs)),
        "step_seconds": float(np.median(ours)),
        "step_over_bare": float(np.median(ours / theirs)),
        "reconstruction_seconds": float(np.median(with_reconstruction - ours)),
        "reconstruction_over_bare": float(np.median((with_reconstruction - ours) / theirs)),
    }


def stepper(objective: Objective, items: list[ItemInput], rows: np.ndarray, labels: Labels) -> Callable[[], None]:
    """One whole optimiser step, as in training."""
    optimizer = torch.optim.AdamW([weight for weight in objective.parameters() if weight.requires_grad], lr=1e-6)

    def step() -> None:
        batch = objective.tokenizer.backbone.collate([items[row] for row in rows])
        objective(batch, labels)[0].backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def body_states(tokenizer: ItemTokenizer, batch: Batch) -> Tensor:
    """The bare body over the same rows: plain ids at the query places, the padding mask, nothing read off."""
    return tokenizer.backbone.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state


def interleaved(ways: list[Callable[[], Any]], repeats: int) -> list[np.ndarray]:
    """Seconds of the process per way, (repeats,) each; one repetition more goes first and is not counted."""
    seconds = np.zeros((repeats + 1, len(ways)))
    for row in seconds:
        for place, way in enumerate(ways):
            started = time.process_time()
            way()
            row[place] = time.process_time() - started
    return list(seconds[1:].T)


def table(results: dict[str, Any]) -> str:
    """Both comparisons in Markdown."""
    encode, train = results["encode"], results["train"]
    return "\n".join(
        [
            "| encoding | items per second | over the bare body |",
            "|---|---|---|",
            f"| bare body, {encode['tokens_per_item']:.0f} tokens an item | {encode['bare_items_per_second']:.1f} | 1 |",
            f"| encode ({encode['read_again']:.1%} read again) | {encode['ours_items_per_second']:.1f} | "
            f"{encode['throughput_over_bare']:.3f} |",
            "",
            f"| training, {train['tokens']:,} tokens | seconds | over the bare body |",
            "|---|---|---|",
            f"| bare forward and backward | {train['bare_seconds']:.3f} | 1 |",
            f"| a step without reconstruction | {train['step_seconds']:.3f} | {train['step_over_bare']:.3f} |",
            f"| reconstruction, on top | {train['reconstruction_seconds']:.3f} | {train['reconstruction_over_bare']:.3f} |",
        ]
    )


if __name__ == "__main__":
    main()
