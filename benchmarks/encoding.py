"""Cost of the item tokenizer relative to its bare backbone: encoding and training steps, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/encoding.py

Items are synthetic texts for MiniLM. Times are CPU seconds of the process; variants are interleaved, and ratios are medians over
repetitions. Prints Markdown and writes benchmarks/results/encoding.json.
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
from mmsid.quantize import fuse
from mmsid.tokenizer import initialization
from mmsid.tokenizer.behaviour import BehaviourSettings, ItemBehaviour
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import ROUNDING_MARGIN, ItemTokenizer, TokenizerSettings
from mmsid.tokenizer.objective import Labels, LossWeights, Objective
from mmsid.tokenizer.reconstruction import train_decoder

WORDS = [
    *("red", "blue", "green", "striped", "leather", "summer", "winter", "running", "office", "garden"),
    *("lamp", "chair", "shoe", "bag", "light", "warm", "noble", "cheap", "new", "soft"),
]
BEHAVIOUR = 64


def main() -> None:
    """Run the benchmark, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--codes", type=int, default=32, help="codes per level; 1,024 items on 32 codes are as dense as a catalogue")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "encoding.json")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    items = synthetic_items(parsed.items)
    width = 384 + BEHAVIOUR
    behaviour = BehaviourSettings(source="vectors", dim=BEHAVIOUR)
    settings = TokenizerSettings(codebook_size=parsed.codes, code_dim=width + 3, embedding_dim=width, behaviour=behaviour)
    tokenizer = ItemTokenizer(settings)
    known = random_behaviour(len(items))
    items = known.added_to(items)
    labels = start(tokenizer, items, known, parsed.batch)
    trained = compare_training(tokenizer, items, labels, parsed.batch, parsed.repeats)
    results = {
        "threads": 1,
        "items": parsed.items,
        "batch": parsed.batch,
        "encode": compare_encoding(tokenizer, items, parsed.batch, parsed.repeats),
        "train": trained,
    }
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(parsed.out, results)
    print(table(results))


def synthetic_items(count: int) -> list[ItemInput]:
    """Texts of 5 to 60 words, log-normally distributed."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.0, 0.6, count), 5, 60).astype(int)
    return [ItemInput(f"item {number}: {' '.join(rng.choice(WORDS, length))}") for number, length in enumerate(lengths)]


def random_behaviour(count: int) -> ItemBehaviour:
    """Random behaviour vectors with 10 interactions each."""
    vectors = np.random.default_rng(1).normal(size=(count, BEHAVIOUR)).astype(np.float32) / BEHAVIOUR**0.5
    return ItemBehaviour(vectors, np.full(count, 10.0))


def start(tokenizer: ItemTokenizer, items: list[ItemInput], known: ItemBehaviour, batch: int) -> Tensor:
    """Closed-form initialization on random behaviour, for margins like those of real codes; returns target codes (N, L)."""
    content = initialization.read_states(tokenizer, items, batch, 0)
    fused = fuse(initialization.unit_content(content.pooled, centre=False), known.vectors)
    return initialization.balanced_start(tokenizer, content, fused, known, 0)[0]


def compare_encoding(tokenizer: ItemTokenizer, items: list[ItemInput], batch: int, repeats: int) -> dict[str, Any]:
    """Throughput of `ItemTokenizer.encode` relative to forward passes of the bare backbone. Target: at least .95.

    The backbone reads prepared token ids, sorted by length, with placeholders for the SID and EMB tokens.
    """
    encoded = tokenizer.backbone.tokens_of(items)
    counts = [row["input_ids"].shape[1] for row in encoded]
    order = np.argsort(counts, kind="stable")
    batches = [tokenizer.backbone.stack([encoded[row] for row in order[first : first + batch]], 1) for first in range(0, len(items), batch)]

    @torch.no_grad()
    def bare() -> None:
        for prepared in batches:
            backbone_states(tokenizer, prepared)

    tokenizer.eval()
    encode_seconds, bare_seconds = interleaved([lambda: tokenizer.encode(items, batch), bare], repeats)
    scores = tokenizer.encode(items, batch).scores
    return {
        "tokens_per_item": float(np.mean(counts)) + tokenizer.backbone.num_queries,
        "ours_items_per_second": len(items) / float(np.median(encode_seconds)),
        "bare_items_per_second": len(items) / float(np.median(bare_seconds)),
        "throughput_over_bare": float(np.median(bare_seconds / encode_seconds)),
        "encoded_again": float((tokenizer.head.greedy(scores).relative_margin < ROUNDING_MARGIN).float().mean()),
    }


def compare_training(tokenizer: ItemTokenizer, items: list[ItemInput], codes: Tensor, batch: int, repeats: int) -> dict[str, Any]:
    """Time of a training step, without and with reconstruction, relative to a forward and backward pass of the bare backbone.

    The backbone has the same LoRA. Target without reconstruction: at most 1.15.
    """
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
    prepared = tokenizer.backbone.collate([items[row] for row in rows])
    trainable = [weight for weight in tokenizer.backbone.parameters() if weight.requires_grad]

    def bare() -> None:
        backbone_states(tokenizer, prepared).float().sum().backward()
        for weight in trainable:
            weight.grad = None

    variants = [bare, stepper(plain, items, rows, labels), stepper(whole, items, rows, labels)]
    tokenizer.train()
    bare_seconds, step_seconds, whole_seconds = interleaved(variants, repeats)
    return {
        "tokens": int(prepared["attention_mask"].sum()),
        "bare_seconds": float(np.median(bare_seconds)),
        "step_seconds": float(np.median(step_seconds)),
        "step_over_bare": float(np.median(step_seconds / bare_seconds)),
        "reconstruction_seconds": float(np.median(whole_seconds - step_seconds)),
        "reconstruction_over_bare": float(np.median((whole_seconds - step_seconds) / bare_seconds)),
    }


def stepper(objective: Objective, items: list[ItemInput], rows: np.ndarray, labels: Labels) -> Callable[[], None]:
    """Function that runs one optimiser step as in training."""
    optimizer = torch.optim.AdamW([weight for weight in objective.parameters() if weight.requires_grad], lr=1e-6)

    def step() -> None:
        batch = objective.tokenizer.collate([items[row] for row in rows])
        objective(batch, labels)[0].backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def backbone_states(tokenizer: ItemTokenizer, batch: Batch) -> Tensor:
    """Bare backbone over the same rows, with placeholder ids instead of query tokens and a plain padding mask."""
    return tokenizer.backbone.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state


def interleaved(variants: list[Callable[[], Any]], repeats: int) -> list[np.ndarray]:
    """CPU seconds (repeats,) of each variant, run in turn; a first repetition is warm-up and left out."""
    seconds = np.zeros((repeats + 1, len(variants)))
    for row in seconds:
        for index, variant in enumerate(variants):
            started = time.process_time()
            variant()
            row[index] = time.process_time() - started
    return list(seconds[1:].T)


def table(results: dict[str, Any]) -> str:
    """Results in Markdown."""
    encode, train = results["encode"], results["train"]
    return "\n".join(
        [
            "| encoding | items per second | over the bare backbone |",
            "|---|---|---|",
            f"| bare backbone, {encode['tokens_per_item']:.0f} tokens per item | {encode['bare_items_per_second']:.1f} | 1 |",
            f"| encode ({encode['encoded_again']:.1%} encoded again) | {encode['ours_items_per_second']:.1f} | "
            f"{encode['throughput_over_bare']:.3f} |",
            "",
            f"| training, {train['tokens']:,} tokens | seconds | over the bare backbone |",
            "|---|---|---|",
            f"| bare forward and backward | {train['bare_seconds']:.3f} | 1 |",
            f"| a step without reconstruction | {train['step_seconds']:.3f} | {train['step_over_bare']:.3f} |",
            f"| reconstruction, additional | {train['reconstruction_seconds']:.3f} | {train['reconstruction_over_bare']:.3f} |",
        ]
    )


if __name__ == "__main__":
    main()
