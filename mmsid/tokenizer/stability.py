"""Stage `stability`: flip rates of codes when the inputs of an item change in ways that should not matter.

A sample of the catalogue is encoded again with words missing from the captions, with pictures saved at another JPEG quality, and with
cropped pictures. Changed pictures are annotated again by a function that the caller passes (`mmsid.annotate.reannotate`). Flip rates
are also given for the quarters of smallest and largest margin (`sids.parquet`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from pydantic import Field

from mmsid.artifacts import manifest_folder, on_main_process, write_json, write_text, writing
from mmsid.catalog import CatalogConfig, Fields, Item, load_picture, read_catalog
from mmsid.config import StageConfig
from mmsid.errors import ConfigError, PictureError
from mmsid.progress import done
from mmsid.sids.distribution import flip_rate
from mmsid.tokenizer.inputs import MinedInterests, build_inputs, read_annotations, read_caption_texts, read_mined_interests
from mmsid.tokenizer.model import Encoded, ItemTokenizer

# (catalogue of changed pictures, output folder) -> caption and interests folders, made with the models of the given folders
Reannotate = Callable[[CatalogConfig, Path], tuple[Path | None, Path | None]]
Change = Callable[[Image.Image], Image.Image]


class StabilityConfig(StageConfig):
    """Configuration of `stability`.

    Attributes:
        tokenizer: a tokenizer folder.
        catalog: the items.
        captions, interests: annotation folders of this catalogue, needed if the tokenizer reads these fields.
        max_items: size of the sample, evenly spaced over the catalogue's content order.
        caption_dropout: share of a caption's words that are removed at random; at least one word stays.
        jpeg_quality: pictures are saved again at this quality.
        crop: pictures are cropped to this share of width and height around the centre, and scaled back.
        batch_size: items per forward pass.
    """

    execution_keys: ClassVar[tuple[str, ...]] = ("batch_size",)

    tokenizer: Path
    catalog: CatalogConfig
    captions: Path | None = None
    interests: Path | None = None
    max_items: int = Field(300, ge=1)
    caption_dropout: float = Field(0.1, gt=0, lt=1)
    jpeg_quality: int = Field(60, ge=1, le=95)
    crop: float = Field(0.9, gt=0, lt=1)
    batch_size: int = Field(32, ge=1)

    def inputs(self) -> dict[str, Path | None]:
        """The tokenizer, the catalogue without users, and the annotations."""
        folders = {"tokenizer": manifest_folder(self.tokenizer), "captions": self.captions, "interests": self.interests}
        return {**self.catalog.without_users().inputs(), **folders}


@on_main_process
def run(config: StabilityConfig, reannotate: Reannotate | None = None) -> Path:
    """Write `stability.json` and `stability.md` to `config.out`.

    `reannotate` is required if the tokenizer reads captions or interests and the catalogue has pictures.

    Raises:
        ArtifactError, CatalogError: a folder or the catalogue is unusable.
        ConfigError: the tokenizer reads neither captions nor pictures, or `reannotate` is missing.
    """
    with writing(config.out, stage="stability", config=config, inputs=config.inputs()) as draft:
        sample = _Sample(config, draft.path / "scratch")
        found = sample.measure(reannotate)
        sample.clear()
        report = {"items": len(sample.items), "levels": sample.tokenizer.num_levels, "changes": found}
        write_json(draft.path / "stability.json", report)
        write_text(draft.path / "stability.md", stability_table(report))
        draft.counts["items"] = len(sample.items)
    rates = ", ".join(f"{name} {figures['flip']['any']:.1%}" for name, figures in found.items())
    done(f"stability: flip rates of {len(sample.items):,} items: {rates}; wrote {config.out}")
    return config.out


def stability_table(report: dict[str, Any]) -> str:
    """Markdown table with one row per change."""
    levels = range(1, report["levels"] + 1)
    heads = ["changed", *[f"level {level} flips" for level in levels], "any level", "any, least sure quarter", "any, surest quarter"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, figures in report["changes"].items():
        shares = [*figures["flip"]["levels"], figures["flip"]["any"], figures["least_sure_quarter"], figures["surest_quarter"]]
        lines.append(f"| {name} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
    return "\n".join(lines) + "\n"


class _Sample:
    """Sample of the catalogue, encoded before and after changes."""

    def __init__(self, config: StabilityConfig, scratch: Path) -> None:
        self.config, self.scratch = config, scratch
        catalog = read_catalog(config.catalog.without_users())
        rows = np.unique(np.linspace(0, len(catalog.items) - 1, min(config.max_items, len(catalog.items))).astype(int))
        self.items = [catalog.items[row] for row in rows]
        self.tokenizer = ItemTokenizer.from_pretrained(config.tokenizer, open_picture=self._open)
        self.use = self.tokenizer.settings.use
        annotations = read_annotations(catalog.items, config.captions, config.interests)
        self.captions, self.interests = dict(annotations.captions), dict(annotations.interests)

    def measure(self, reannotate: Reannotate | None) -> dict[str, Any]:
        """Name of the change -> flip rates."""
        before = self._encode(self.items, self.captions, self.interests)
        found = {}
        if "caption" in self.use and self.captions:
            shortened = {item_id: self._drop_words(text) for item_id, text in self.captions.items()}
            found["caption words"] = _flip_rates(before, self._encode(self.items, shortened, self.interests))
        annotated = {"caption", "interests"} & set(self.use) if self.captions or self.interests else set()
        if any(item.images for item in self.items) and (annotated or "pictures" in self.use):
            if annotated and reannotate is None:
                raise ConfigError(
                    f"stability: the tokenizer reads {', '.join(sorted(annotated))}, so changed pictures must be captioned again, but no "
                    "`reannotate` function was given; run `mmsid stability`"
                )
            share = self.config.crop
            changes: dict[str, tuple[Change, dict[str, Any]]] = {
                "JPEG quality": (lambda picture: picture, {"suffix": ".jpg", "quality": self.config.jpeg_quality}),
                "crop": (lambda picture: _cropped(picture, share), {"suffix": ".png"}),
            }
            for number, (name, (change, saving)) in enumerate(changes.items()):
                folder = self.scratch / str(number)
                catalog, items = self._changed_catalog(folder, change, **saving)
                captions, interests = self.captions, self.interests
                if annotated and reannotate is not None:
                    folders = reannotate(catalog, folder)
                    captions, interests = read_caption_texts(folders[0]), read_mined_interests(folders[1])
                found[name] = _flip_rates(before, self._encode(items, captions, interests))
        if not found:
            raise ConfigError(
                f"stability: there is nothing to change: the tokenizer reads {', '.join(self.use) or 'no named field'}, but neither "
                "captions nor pictures of these fields are given; set stability.captions, or leave this stage out"
            )
        return found

    def clear(self) -> None:
        """Remove the changed pictures and their annotations."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _encode(self, items: Sequence[Item], captions: dict[str, str], interests: dict[str, MinedInterests]) -> Encoded:
        inputs = build_inputs(items, captions, interests if "interests" in self.use else None, self.use or None)
        return self.tokenizer.encode(inputs, self.config.batch_size)

    def _drop_words(self, text: str) -> str:
        """The caption with words dropped at random; the choice is a function of the text and the seed."""
        words = text.split()
        rng = np.random.default_rng([self.config.seed, *text.encode()])
        kept = rng.random(len(words)) >= self.config.caption_dropout
        return " ".join(word for word, keep in zip(words, kept, strict=True) if keep) or text

    def _changed_catalog(self, folder: Path, change: Change, *, suffix: str, **saving: Any) -> tuple[CatalogConfig, list[Item]]:
        """Write the sample with changed pictures as a catalogue below `folder`; returns it with its items, in the sample's order."""
        pictures = folder / "pictures"
        pictures.mkdir(parents=True)
        items = []
        with open(folder / "items.jsonl", "w", encoding="utf-8") as lines:
            for number, item in enumerate(self.items):
                paths = []
                for index, image in enumerate(item.images):
                    try:
                        picture = change(load_picture(image, self.config.catalog.pictures, self.config.catalog.picture_roots))
                    except PictureError:
                        continue
                    paths.append(pictures / f"{number}-{index}{suffix}")
                    picture.save(paths[-1], **saving)
                items.append(replace(item, images=tuple(paths)))
                row = {name: getattr(item, name) for name in ("item_id", "title", "description", "categories", "attributes")}
                lines.write(json.dumps(row | {"image": [str(path.relative_to(folder)) for path in paths]}) + "\n")
        fields = Fields(attributes=["attributes"])
        return CatalogConfig(items=folder / "items.jsonl", image_root=folder, fields=fields, pictures=self.config.catalog.pictures), items

    def _open(self, path: Path) -> Image.Image:
        root = self.scratch if self.scratch in Path(path).parents else self.config.catalog.picture_roots
        return load_picture(path, self.config.catalog.pictures, root)


def _cropped(picture: Image.Image, share: float) -> Image.Image:
    width, height = picture.size
    left, top = round(width * (1 - share) / 2), round(height * (1 - share) / 2)
    return picture.crop((left, top, width - left, height - top)).resize(picture.size, Image.Resampling.BICUBIC)


def _flip_rates(before: Encoded, after: Encoded) -> dict[str, Any]:
    """Flip rates of raw codes over all items, and over the quarters of smallest and largest margin before the change."""
    old, new = before.raw_codes.numpy(), after.raw_codes.numpy()
    rates = flip_rate(old, new)
    order = np.argsort(before.margin.numpy(), kind="stable")
    flipped = (old != new).any(axis=1)[order]
    quarter = max(1, len(order) // 4)
    return {
        "flip": {"levels": rates[:-1].tolist(), "any": float(rates[-1])},
        "least_sure_quarter": float(flipped[:quarter].mean()),
        "surest_quarter": float(flipped[-quarter:].mean()),
    }
