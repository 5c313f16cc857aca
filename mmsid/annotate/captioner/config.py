"""Configuration of the stage `train_captioner`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from mmsid.annotate.captioner.data import Targets
from mmsid.annotate.captioner.model import ModelSizes
from mmsid.catalog.config import CatalogConfig
from mmsid.config import Section, StageConfig

DEMO_DENSE = {
    "product": "product",
    "color": "product",
    "pattern": "product",
    "brand": "brand",
    "price_tens": "tens",
    "price_units": "units",
    "headline": "headline",
}
DEMO_TEMPLATE = "a {color} {pattern} {product} by {brand}, priced {price}, headline {headline}"


class Phase(Section):
    """Budget and rates of one phase. Give `steps` (reproducible) or `seconds` (whatever the machine manages); 0 steps skip it."""

    steps: int | None = None
    seconds: float | None = None
    batch_size: int = 48
    muon_lr: float = 9e-3
    adamw_lr: float = 1.5e-3
    warmup_steps: int = 50
    weight_decay: float = 0.02
    final_rate: float = 0.03
    clip: float = 1.0


class Augment(Section):
    """Changes made to training pictures. `shift`: px each way, one per batch; `flip`: mirror half of the batch (photographs only: text
    would be mirrored too); `tint`: largest relative change per colour channel."""

    shift: int = 3
    flip: bool = False
    tint: float = 0.0


class DrawnSource(Section):
    """Freshly drawn demo cards: `cards` for training (never a held-out triple), `held_out` and `seen` for the measurement."""

    cards: int = 100_000
    held_out: int = 1000
    seen: int = 500
    seed: int = 0
    workers: int = 1
    cache: Path | None = None


class LoraSection(Section):
    """Low-rank adapters on a hub VLM's language model. `merge` writes one ordinary model folder, else adapter and processor."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target: str = r".*(language_model|text_model).*\.(q_proj|k_proj|v_proj|o_proj)"
    merge: bool = True


class TrainCaptionerConfig(StageConfig):
    """Configuration of `train_captioner`.

    `see` warms the tower up on labels, `tell` trains the language model with the tower fixed, `joint` trains all. `fields` become label
    heads; those of `digit_fields` are two-digit numbers read digit by digit; `dense` says on which boxed element's patches a label lies.
    With `base_model` (path or hub id) only `tell` is run, on LoRA adapters.
    """

    renamed_keys: ClassVar[dict[str, str]] = {"see": "vision_warmup", "tell": "captioning"}

    source: Literal["drawn", "catalog"] = "catalog"
    drawn: DrawnSource = DrawnSource()
    catalog: CatalogConfig | None = None
    targets: Targets = Targets()
    caption_template: str = DEMO_TEMPLATE
    fields: tuple[str, ...] = ("product", "color", "pattern", "brand", "price", "headline")
    digit_fields: tuple[str, ...] = ("price",)
    dense: dict[str, str] = Field(default_factory=lambda: dict(DEMO_DENSE))
    caption_prompt: str = "caption_demo"
    interests_prompt: str = "interests_demo"
    interest_share: float = 0.25
    sizes: ModelSizes = ModelSizes()
    augment: Augment = Augment()
    vision_warmup: Phase = Phase(steps=3000)
    captioning: Phase = Phase(steps=400, muon_lr=6e-3, adamw_lr=1e-3)
    joint: Phase = Phase(steps=400, muon_lr=6e-3, adamw_lr=1e-3)
    label_weight: float = 0.2
    compile_tower: bool = False
    checkpoint_seconds: float = 180.0
    evaluate_pictures: int = 1000
    base_model: str | None = None
    lora: LoraSection = LoraSection()
