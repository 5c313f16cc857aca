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
    """Steps, batch size and learning rates of one training phase.

    Attributes:
        steps: optimiser steps. A phase with 0 steps is skipped.
        batch_size: pictures per step.
        muon_lr: peak learning rate of Muon, which trains the hidden weight matrices.
        adamw_lr: peak learning rate of AdamW, which trains all other weights.
        warmup_steps: steps over which the learning rates rise linearly.
        weight_decay: weight decay of both optimisers.
        final_rate: share of the peak learning rate that is left at the end.
        clip: largest norm of the gradient.
    """

    steps: int
    batch_size: int = 48
    muon_lr: float = 9e-3
    adamw_lr: float = 1.5e-3
    warmup_steps: int = 50
    weight_decay: float = 0.02
    final_rate: float = 0.03
    clip: float = 1.0


class Augment(Section):
    """Augmentation of training pictures.

    Attributes:
        shift: largest shift in px along each axis, drawn once per batch.
        flip: mirror half of the batch. For photographs only, because text would be mirrored too.
        tint: largest relative change per colour channel.
    """

    shift: int = 3
    flip: bool = False
    tint: float = 0.0


class DrawnSource(Section):
    """Numbers of freshly drawn demo cards.

    Attributes:
        cards: for training, from combinations of product, colour and pattern that are not held out.
        held_out: for evaluation, from held-out combinations.
        seen: for evaluation, other cards of training combinations.
        seed: random seed of the cards.
    """

    cards: int = 100_000
    held_out: int = 1000
    seen: int = 500
    seed: int = 0


class LoraSection(Section):
    """Low-rank adapters on the language model of a hub VLM.

    Attributes:
        rank: rank of the adapters.
        alpha: the adapters are scaled by alpha / rank.
        dropout: dropout rate at the input of the adapters.
        target: regular expression over the names of the modules that get an adapter.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target: str = r".*(language_model|text_model).*\.(q_proj|k_proj|v_proj|o_proj)"


class TrainCaptionerConfig(StageConfig):
    """Configuration of `train_captioner`.

    Attributes:
        source: `catalog` trains on the pictures of `catalog`, `drawn` on freshly drawn demo cards.
        drawn: how many cards are drawn (`source: drawn`).
        catalog: items whose pictures are trained on (`source: catalog`).
        targets: texts that the captioner learns to write (`source: catalog`).
        caption_template: writes the training captions from `fields`, see `CaptionTemplate`.
        fields: fields that become label heads of the vision tower.
        digit_fields: fields that are two-digit numbers. Each becomes two labels, one per digit.
        dense: label -> element of a drawn card, on whose patches the label is also predicted. Not used for catalogues.
        caption_prompt, interests_prompt: name of a shipped prompt, or a file.
        interest_share: share of the batches that train the interests prompt, where the pictures have interests.
        sizes: sizes of a model that is trained from scratch.
        augment: augmentation of the training pictures.
        vision_warmup: phase that trains the vision tower on labels.
        captioning: phase that trains the language model while the tower is fixed.
        joint: phase that trains all weights, with the label loss at `label_weight`.
        label_weight: weight of the label loss in `joint`.
        checkpoint_seconds: time in seconds between two checkpoints.
        evaluate_pictures: largest number of pictures per evaluation set.
        base_model: path or hub id of an image-text-to-text model. Only `captioning` runs, on LoRA adapters.
        lora: adapters on `base_model`.
    """

    execution_keys: ClassVar[tuple[str, ...]] = ("checkpoint_seconds",)
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
    checkpoint_seconds: float = 180.0
    evaluate_pictures: int = 1000
    base_model: str | None = None
    lora: LoraSection = LoraSection()

    def inputs(self) -> dict[str, Path | None]:
        """The tables of items and of targets; none for drawn cards."""
        if self.source == "drawn" or self.catalog is None:
            return {}
        return self.catalog.item_files() | {"targets": self.targets.table}
