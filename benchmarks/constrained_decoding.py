"""Cost and effect of decoding under the JSON schema: the shipped demo model on drawn ads, with and without the constraint, one thread.

    python benchmarks/constrained_decoding.py --out benchmarks/results/constrained_decoding.json

Batches of 16 are answered by bare `generate`, by free decoding with log-probabilities, and by constrained decoding, in turn, in one run.
A ratio is the median over the batches of the CPU seconds of one way over those of bare `generate`; other work on the machine disturbs
CPU seconds less than wall seconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmsid.annotate.confidence import DEMO_MODEL
from mmsid.annotate.generator import Answer, Request
from mmsid.annotate.huggingface import HuggingFaceGenerator
from mmsid.annotate.prompts import load_prompt
from mmsid.annotate.records import Caption, Interests, Record, strict_json
from mmsid.artifacts import write_json
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.catalog.demo import write_demo_catalog
from mmsid.errors import AnnotationError

BATCH = 16
WAYS = ("bare", "free", "constrained")
JOBS: dict[str, tuple[type[Record], str, int]] = {
    "captions": (Caption, "caption_demo", 256),
    "interests": (Interests, "interests_demo", 384),
}


class Bare(HuggingFaceGenerator):
    """The demo model with the `generate` of transformers alone: no log-probabilities, no constraint."""

    @torch.inference_mode()
    def decode(self, inputs: dict[str, torch.Tensor], requests: list[Request]) -> list[Answer]:
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, pad_token_id=0)
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return [Answer(text) for text in self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def main() -> None:
    """Measure both kinds of answers and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ads", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/constrained_decoding.json"))
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        items = write_demo_catalog(Path(folder) / "ads", items=parsed.ads, users=0, seed=11) / "items.parquet"
        paths = [path for item in read_catalog(CatalogConfig(items=items)).items for path in item.images][: parsed.ads]
        pictures = [Image.open(path).convert("RGB") for path in paths]
    results: dict[str, Any] = {"pictures": len(pictures), "batch": BATCH, "threads": 1}
    for name, (record, prompt, budget) in JOBS.items():
        results[name] = compared(pictures, record, load_prompt(prompt).text, budget)
        print(name, results[name])
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(parsed.out, results)


def compared(pictures: list[Image.Image], record: type[Record], prompt: str, budget: int) -> dict[str, Any]:
    """CPU seconds, answers and confidence of the three ways to decode."""
    models = {
        "bare": Bare("demo", max_new_tokens=budget),
        "free": HuggingFaceGenerator("demo", max_new_tokens=budget),
        "constrained": HuggingFaceGenerator("demo", max_new_tokens=budget, schema=record.model_json_schema()),
    }
    requests = [Request(prompt, (picture,)) for picture in pictures]
    answers: dict[str, list[Answer]] = {way: [] for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for model in models.values():
        model.generate(requests[:BATCH])  # loads the model
    for number, start in enumerate(range(0, len(requests), BATCH)):
        turn = number % len(WAYS)
        for way in (*WAYS[turn:], *WAYS[:turn]):
            started = time.process_time()
            answers[way] += models[way].generate(requests[start : start + BATCH])
            seconds[way].append(time.process_time() - started)
    differ = [at for at in range(len(requests)) if answers["bare"][at] != answers["constrained"][at]]
    return {
        "cpu_seconds": {way: round(sum(seconds[way]), 2) for way in WAYS},
        "free_over_bare": ratio(seconds["free"], seconds["bare"]),
        "constrained_over_bare": ratio(seconds["constrained"], seconds["bare"]),
        "valid": {way: sum(map(is_json, answers[way])) for way in WAYS},
        "constrained_differ_from_bare": len(differ),
        "of_which_were_valid": sum(is_json(answers["bare"][at]) for at in differ),
        "cut_short": sum(answer.cut_short for answer in answers["constrained"]),
        "below_the_limit_of_confidence": sum(DEMO_MODEL.uncertain(answer.log_probability) for answer in answers["constrained"]),
    }


def ratio(seconds: list[float], baseline: list[float]) -> float:
    return round(statistics.median(one / base for one, base in zip(seconds, baseline)), 4)


def is_json(answer: str) -> bool:
    try:
        strict_json(answer)
    except AnnotationError:
        return False
    return True


if __name__ == "__main__":
    main()
