"""A small finished run with pictures, captions, a tokenizer and a recommender, and its bundle, for tests of `mmsid.serve`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from tiny_backbones import tiny_bert

from mmsid.annotate import caption, interests
from mmsid.backbone.lora import LoraSettings
from mmsid.catalog import CatalogConfig
from mmsid.catalog.ingest.stage import IngestConfig
from mmsid.catalog.ingest.stage import run as ingest
from mmsid.recommend import train as train_recommender
from mmsid.serve.bundling import bundle_run
from mmsid.tokenizer import assign, train
from mmsid.tokenizer.model import BackboneSettings

COLOURS, THINGS = ("red", "blue", "green"), ("shoe", "bag", "lamp", "chair")
ITEMS, USERS = 48, 60
ATTACK = '<img src=x onerror="window.attacked = 1"><script>window.attacked = 1</script>'


class ColourModel:
    """Generator that answers with the name of the picture's colour. A white picture gets no JSON."""

    model_id = "colours@0"
    parameters: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, record: type) -> None:
        self.record, self.asked = record, 0

    def generate(self, requests: list[Any]) -> list[str]:
        self.asked += len(requests)
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> str:
        red, green, blue = request.pictures[0].resize((1, 1)).getpixel((0, 0))
        if min(red, green, blue) > 240:
            return "nothing to see"
        colour = max((red, "red"), (green, "green"), (blue, "blue"))[1]
        if "caption" in self.record.model_fields:
            return json.dumps({"caption": f"a {colour} thing"})
        return json.dumps({"descriptors": [{"descriptor": f"likes {colour}", "confidence": 0.8}], "summary": f"for friends of {colour}"})


def picture(colour: str, mark: int = 0, size: int = 48) -> bytes:
    """PNG of one colour with a mark that depends on a number."""
    drawn, data = Image.new("RGB", (size, size), colour), io.BytesIO()
    ImageDraw.Draw(drawn).rectangle((mark % 40, mark // 40, mark % 40 + 3, mark // 40 + 3), "black")
    drawn.save(data, "PNG")
    return data.getvalue()


def write_catalogue(folder: Path) -> CatalogConfig:
    """48 ads of three colours and four things; users stay with one thing. The title of ad 0 is markup."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for n in range(ITEMS):
        colour, thing = COLOURS[n % 3], THINGS[n % 4]
        (folder / "images" / f"{n}.png").write_bytes(picture(colour, n))
        row = {"item_id": f"i{n}", "title": f"{colour} {thing} {n}", "description": f"{thing} for home", "image": f"images/{n}.png"}
        rows.append(row | {"categories": ["home", thing], "attributes": {"colour": [colour], "size": ["small"] if n % 2 else None}})
    pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")
    users = [
        {"user_id": f"u{user}", "items": [f"i{(user % 4) + 4 * ((user + 2 * step) % 12)}" for step in range(6)]} for user in range(USERS)
    ]
    pq.write_table(pa.Table.from_pylist(users), folder / "sequences.parquet")
    fields = {"attributes": ["attributes"]}
    return CatalogConfig(items=folder / "items.parquet", sequences=folder / "sequences.parquet", fields=fields)


def write_run(folder: Path) -> Path:
    """Run the stages on `write_catalogue`. -> folder of the run."""
    run, plain = folder / "runs" / "small", write_catalogue(folder / "data")
    ingest(IngestConfig(out=run / "ingest", catalog=plain))
    catalog = plain.model_copy(update={"ingested": run / "ingest"})
    caption.run(caption.CaptionConfig(out=run / "caption", catalog=catalog), ColourModel(caption.Caption))
    interests.run(interests.InterestsConfig(out=run / "interests", catalog=catalog), ColourModel(interests.Interests))
    texts = {"captions": run / "caption", "interests": run / "interests"}
    backbone = BackboneSettings(path=tiny_bert(folder / "bert"), max_length=60, lora=LoraSettings(r=2))
    settings = {"codebook_size": 8, "steps": 2, "batch_size": 8, "reconstruct": "off", "backbone": backbone, **texts}
    tokenizer = train.run(train.TrainTokenizerConfig(out=run / "train_tokenizer", catalog=catalog, **settings))
    sids = assign.run(assign.AssignConfig(out=run / "assign", tokenizer=tokenizer, catalog=catalog, **texts))
    shape, schedule = {"d_model": 16, "heads": 2, "hidden": 16, "layers": 1}, {"epochs": 2, "batch_size": 32, "lr": 0.02}
    settings = {"model": shape, "schedule": schedule, "variants": {"ours": sids}, "recommender": "ours", "seeds": [0]}
    train_recommender.run(train_recommender.TrainRecommenderConfig(out=run / "train_recommender", catalog=catalog, **settings))
    return run


def write_world(folder: Path) -> tuple[Path, Path]:
    """-> folder of a run, and its bundle."""
    run = write_run(folder)
    return run, bundle_run(folder / "bundle", run=run)
