"""A small catalogue with pictures and a generator without a model, for the tests of annotation jobs."""

from __future__ import annotations

import json
import time
from pathlib import Path

from PIL import Image

from mmsid.annotate.caption import CaptionConfig
from mmsid.annotate.generator import GenerationFailure, Request
from mmsid.annotate.readers import read_rows
from mmsid.catalog import CatalogConfig


def write_catalog(folder: Path, items: int = 24) -> CatalogConfig:
    """`items` items: every fifth with two plain pictures, the others with one. All pictures differ in colour."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for at in range(items):
        names = []
        for creative in range(2 if at % 5 == 4 else 1):
            name = f"images/{at}_{creative}.png"
            Image.new("RGB", (6 + at % 3, 5), (at * 7 % 256, at * 31 % 256, 100 * creative)).save(folder / name)
            names.append(name)
        lines.append(json.dumps({"item_id": f"i{at}", "title": f"thing number {at}", "image": names}))
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    return CatalogConfig(items=folder / "items.jsonl")


def caption_config(catalog: CatalogConfig, out: Path, **options) -> CaptionConfig:
    return CaptionConfig(**{"out": out, "catalog": catalog, "batch_size": 4, "shard_rows": 7, "max_quarantined": 0.05} | options)


class StubGenerator:
    """Captions a picture by its first pixel. `broken(colour, sampled)` returns an invalid answer, or None for a valid one."""

    model_id = "stub@0"

    def __init__(self, broken=lambda colour, sampled: None, sleep: float = 0.0) -> None:
        self.broken, self.sleep = broken, sleep
        self.calls: list[list[Request]] = []

    @property
    def parameters(self) -> dict:
        return {"max_new_tokens": 8}

    def generate(self, requests: list[Request]) -> list[str | GenerationFailure]:
        time.sleep(self.sleep)
        self.calls.append(requests)
        return [self._answer(request) for request in requests]

    @property
    def num_requests(self) -> int:
        return sum(len(requests) for requests in self.calls)

    def _answer(self, request: Request) -> str | GenerationFailure:
        colour = request.pictures[0].getpixel((0, 0))
        sampled = request.temperature > 0
        invalid = self.broken(colour, sampled)
        if invalid is not None:
            return invalid
        return json.dumps({"caption": f"a plain card of colour {colour}" + (f", sampled {request.seed % 97}" if sampled else "")})


def rows_of(folder: Path, stage: str = "caption") -> list[dict]:
    return list(read_rows(folder, stage))
