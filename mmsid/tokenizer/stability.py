"""Stage `stability`: how many codes flip when an ad is told or shown a little differently.

A sample of the catalogue is read again with something changed that should not matter: words missing from the captions, the
pictures saved at another JPEG quality, the pictures cropped. Changed pictures are captioned (and their interests mined) again by the
models that did it before, handed in as a function: rooms of one storey do not import each other.

A flip rate alone says little; beside it stands how much less often items flip whose margin (`sids.parquet`) is large. Where the
margin tells, a consumer may hold back the codes that are not sure.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from mmsid.artifacts import manifest_folder, write_json, write_text, writing
from mmsid.catalog import CatalogConfig, Fields, Item, load_picture, read_catalog
from mmsid.config import StageConfig
from mmsid.errors import ConfigError, PictureError
from mmsid.progress import done
from mmsid.sids.distribution import flip_rate
from mmsid.tokenizer.inputs import ItemInput, MinedInterests, build_inputs, read_caption_texts, read_mined_interests
from mmsid.tokenizer.model import Encoded, ItemTokenizer

# (catalogue of changed pictures, folder to write into) -> captions and interests folders, made as the given ones were
AnnotateAgain = Callable[[CatalogConfig, Path], tuple[Path | None, Path | None]]
Change = Callable[[Image.Image], Image.Image]


class StabilityConfig(StageConfig):
    """What is changed, and for how many items.

    Attributes:
        max_items: evenly spaced over the catalogue's content order.
        caption_dropout: share of a caption's words that are left out, at random; at least one word stays.
        jpeg_quality: pictures are saved again at this quality.
        crop: pictures are cut to this share of width and height, around the middle, and scaled back.
    """

    tokenizer: Path
    catalog: CatalogConfig
    captions: Path | None = None
    interests: Path | None = None
    max_items: int = Field(300, ge=1)
    caption_dropout: float = Field(0.1, gt=0, lt=1)
    jpeg_quality: int = Field(60, ge=1, le=95)
    crop: float = Field(0.9, gt=0, lt=1)
    batch_size: int = Field(32, ge=1)


def run(config: StabilityConfig, reannotate: AnnotateAgain | None = None) -> Path:
    """Write `stability.json` and `stability.md` to `config.out`.

    `reannotate` is needed where the tokenizer reads captions or interests and the catalogue has pictures.

    Raises:
        ArtifactError, CatalogError, ConfigError: what is wrong with the folders named; or nothing that the tokenizer reads can
            be changed.
    """
    inputs = {
        "tokenizer": manifest_folder(config.tokenizer),
        "items": config.catalog.items,
        "captions": config.captions,
        "interests": config.interests,
    }
    with writing(config.out, stage="stability", config=config, inputs=inputs) as draft:
        sample = _Sample(config, draft.path / "scratch")
        found = sample.measure(reannotate)
        sample.clear()
        report = {"items": len(sample.items), "levels": sample.tokenizer.num_levels, "changes": found}
        write_json(draft.path / "stability.json", report)
        write_text(draft.path / "stability.md", stability_table(report))
        draft.counts["items"] = len(sample.items)
    flips = ", ".join(f"{name} {figures['flip']['any']:.1%}" for name, figures in found.items())
    done(f"stability: of {len(sample.items):,} items flip under {flips}; wrote {config.out}")
    return config.out


def stability_table(report: dict[str, Any]) -> str:
    """Markdown, one row per change."""
    levels = range(1, report["levels"] + 1)
    heads = ["changed", *[f"level {level} flips" for level in levels], "any level", "any, least sure quarter", "any, surest quarter"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, figures in report["changes"].items():
        shares = [*figures["flip"]["levels"], figures["flip"]["any"], figures["least_sure_quarter"], figures["surest_quarter"]]
        lines.append(f"| {name} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
    return "\n".join(lines) + "\n"


class _Sample:
    """Some items of the catalogue, as they are and as changed."""

    def __init__(self, config: StabilityConfig, scratch: Path) -> None:
        self.config, self.scratch = config, scratch
        catalog = read_catalog(config.catalog.model_copy(update={"sequences": None}))
        rows = np.unique(np.linspace(0, len(catalog.items) - 1, min(config.max_items, len(catalog.items))).astype(int))
        self.items = [catalog.items[row] for row in rows]
        self.tokenizer = ItemTokenizer.from_pretrained(config.tokenizer, open_picture=self._open)
        self.use = self.tokenizer.settings.use
        self.captions = read_caption_texts(config.captions)
        self.interests = read_mined_interests(config.interests)

    def measure(self, reannotate: AnnotateAgain | None) -> dict[str, Any]:
        """Change -> figures."""
        as_is = self._encode(self.items, self.captions, self.interests)
        found = {}
        if "caption" in self.use and self.captions:
            fewer = {name: self._without_words(text) for name, text in self.captions.items()}
            found["caption words"] = _figures(as_is, self._encode(self.items, fewer, self.interests))
        told = {"caption", "interests"} & set(self.use) if self.captions or self.interests else set()
        if any(item.images for item in self.items) and (told or "pictures" in self.use):
            if told and reannotate is None:
                raise ConfigError("stability: changed pictures must be captioned again; run it by `mmsid stability`")
            share = self.config.crop
            changes: dict[str, tuple[Change, dict[str, Any]]] = {
                "JPEG quality": (lambda picture: picture, {"suffix": ".jpg", "quality": self.config.jpeg_quality}),
                "crop": (lambda picture: _cropped(picture, share), {"suffix": ".png"}),
            }
            for number, (name, (change, saving)) in enumerate(changes.items()):
                folder = self.scratch / str(number)
                catalog, items = self._show(folder, change, **saving)
                captions, interests = self.captions, self.interests
                if told and reannotate is not None:
                    folders = reannotate(catalog, folder)
                    captions, interests = read_caption_texts(folders[0]), read_mined_interests(folders[1])
                found[name] = _figures(as_is, self._encode(items, captions, interests))
        if not found:
            raise ConfigError(
                f"stability: the tokenizer reads {', '.join(self.use) or 'no named field'}, and of that neither captions nor pictures are "
                "given, so there is nothing to change; name its captions folder, or leave this stage out"
            )
        return found

    def clear(self) -> None:
        """Remove the changed pictures and what was written about them."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _encode(self, items: Sequence[Item], captions: dict[str, str], interests: dict[str, MinedInterests]) -> Encoded:
        readable = interests if "interests" in self.use else None
        inputs: list[ItemInput] = build_inputs(items, captions, readable, self.use or None)
        return self.tokenizer.encode(inputs, self.config.batch_size)

    def _without_words(self, text: str) -> str:
        """The caption without some words; which ones follows from the text and the seed."""
        words = text.split()
        rng = np.random.default_rng([self.config.seed, *text.encode()])
        kept = rng.random(len(words)) >= self.config.caption_dropout
        return " ".join(word for word, stays in zip(words, kept, strict=True) if stays) or text

    def _show(self, folder: Path, change: Change, *, suffix: str, **saving: Any) -> tuple[CatalogConfig, list[Item]]:
        """The sample as a catalogue of its own below `folder`, its pictures changed; and its items, in the sample's order."""
        pictures = folder / "pictures"
        pictures.mkdir(parents=True)
        items = []
        with open(folder / "items.jsonl", "w", encoding="utf-8") as lines:
            for number, item in enumerate(self.items):
                paths = []
                for place, image in enumerate(item.images):
                    try:
                        picture = change(load_picture(image, self.config.catalog.pictures, self.config.catalog.root))
                    except PictureError:
                        continue
                    paths.append(pictures / f"{number}-{place}{suffix}")
                    picture.save(paths[-1], **saving)
                items.append(replace(item, images=tuple(paths)))
                facts = {name: getattr(item, name) for name in ("item_id", "title", "description", "categories", "attributes")}
                lines.write(json.dumps(facts | {"image": [str(path.relative_to(folder)) for path in paths]}) + "\n")
        fields = Fields(attributes=["attributes"])
        return CatalogConfig(items=folder / "items.jsonl", image_root=folder, fields=fields, pictures=self.config.catalog.pictures), items

    def _open(self, path: Path) -> Image.Image:
        root = self.scratch if self.scratch in Path(path).parents else self.config.catalog.root
        return load_picture(path, self.config.catalog.pictures, root)


def _cropped(picture: Image.Image, share: float) -> Image.Image:
    width, height = picture.size
    left, top = round(width * (1 - share) / 2), round(height * (1 - share) / 2)
    return picture.crop((left, top, width - left, height - top)).resize(picture.size, Image.Resampling.BICUBIC)


def _figures(as_is: Encoded, changed: Encoded) -> dict[str, Any]:
    """Flip rates of raw codes, over all items and for the quarters of least and greatest margin before the change."""
    before, after = as_is.raw_codes.numpy(), changed.raw_codes.numpy()
    flips = flip_rate(before, after)
    order = np.argsort(as_is.margin.numpy(), kind="stable")
    flipped = (before != after).any(axis=1)[order]
    quarter = max(1, len(order) // 4)
    return {
        "flip": {"levels": flips[:-1].tolist(), "any": float(flips[-1])},
        "least_sure_quarter": float(flipped[:quarter].mean()),
        "surest_quarter": float(flipped[-quarter:].mean()),
    }
