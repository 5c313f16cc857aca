"""Configuration of the stage `train_tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mmsid.accelerator import Precision
from mmsid.artifacts import manifest_folder
from mmsid.backbone.picture_features import PictureEncoderName
from mmsid.catalog import CatalogConfig
from mmsid.config import StageConfig
from mmsid.tokenizer import initialization
from mmsid.tokenizer.backbones import BackboneSettings
from mmsid.tokenizer.behaviour import behaviour_inputs
from mmsid.tokenizer.inputs import FieldName
from mmsid.tokenizer.objective import UNISID_WEIGHTS, LossWeights


class TrainTokenizerConfig(StageConfig):
    """Configuration of `train_tokenizer`.

    `head`, `partners`, `finest` and single keys of `start` and `weights` override what `loss` implies.

    Attributes:
        catalog: the items, and the logs that behaviour is read from.
        captions, interests: annotation folders of this catalogue, for the fields of the same names.
        use, without: fields that the tokenizer reads; fields in `without` are removed from `use` but may be reconstructed.
        backbone: the pretrained model that reads an item.
        num_levels: L, codes per item.
        codebook_size: K, codes per level.
        loss: "ours" starts from balanced residual codes and distils them. "unisid" is the published loss (arXiv 2602.10445): parallel
            heads, random initialization, multi-granularity contrast on the logits + InfoNCE + 0.1 reconstruction, with pairs and
            finest positives by category.
        head: "residual" chooses the code of a level given those before it, "parallel" chooses all levels independently. By default
            "residual" for our loss and "parallel" for that of UniSID.
        start: initialization of the heads, and size and weight of the behaviour vectors.
        weights: weight of every loss.
        tau: temperature of both contrastive losses.
        finest: positives of the last level, co-engaged items or items of the same category.
        partners: partner of an anchor in a batch, a co-engaged item if there is one, or an item of the same finest category.
        reconstruct: text to reconstruct; by default summaries if there are interests, else attributes, else none.
        reconstruct_from: input of the reconstruction, continuous states (as published) or vectors of the chosen codes.
        decoder: language model that reconstructs, a folder or hub id; by default a small one is trained for `decoder_steps` steps.
        decoder_steps: steps of the small language model, before the tokenizer is trained.
        steps: optimiser steps; 0 keeps the initialization.
        batch_size: items per batch; one half are anchors, the other half their partners.
        accumulate: batches whose gradients are averaged for one optimiser step.
        learning_rate, head_learning_rate: for the weights inside the backbone (query tokens, adapter), and for the heads. The rate of the
            heads is lowered where the states of the backbone are long and alike (`head_rate`).
        warmup: share of the steps over which the learning rates rise linearly.
        precision: number format of the forward pass; "auto" is bf16 where the hardware multiplies in bf16, else fp32.
        behaviour: what the tokenizer reads of an item's behaviour, beside its content: "coengagement" (factorised, from the train
            sequences; no input without sequences), "none", or parquet files of item_id and vector: embeddings of the user's own (two-tower,
            graph). By default "coengagement" for our loss and "none" for that of UniSID. Residual head and balanced start only.
        pictures: picture encoders whose features join the states of a backbone that sees no pixels: "colours" (264 numbers), "efficientnet"
            (extra `pictures`), or a list of both; "none" by default.
        align_codes_to: SID folder of an earlier tokenizer of the same sizes. At the end, the codes of each level are permuted to agree
            with it for as many items as possible.
        checkpoint_every: steps between checkpoints.
    """

    execution_keys: ClassVar[tuple[str, ...]] = ("checkpoint_every",)
    renamed_keys: ClassVar[dict[str, str]] = {"memory": "behaviour", "behaviour_regression": "behaviour", "against": "align_codes_to"}

    catalog: CatalogConfig
    captions: Path | None = None
    interests: Path | None = None
    use: tuple[FieldName, ...] | None = None
    without: tuple[FieldName, ...] = ()
    backbone: BackboneSettings = BackboneSettings()
    num_levels: int = Field(3, ge=1, le=8)
    codebook_size: int = Field(256, ge=2)
    loss: Literal["ours", "unisid"] = "ours"
    head: Literal["residual", "parallel"] | None = None
    start: initialization.StartSettings | None = None
    weights: LossWeights | None = None
    tau: float = Field(0.07, gt=0)
    finest: Literal["engaged", "category"] | None = None
    partners: Literal["engaged", "category"] | None = None
    reconstruct: Literal["summary", "attributes", "off"] | None = None
    reconstruct_from: Literal["states", "codes"] = "states"
    decoder: str | None = None
    decoder_steps: int = Field(120, ge=1)
    steps: int = Field(100, ge=0)
    batch_size: int = Field(32, ge=2)
    accumulate: int = Field(1, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    head_learning_rate: float = Field(1e-4, gt=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    precision: Precision = "auto"
    behaviour: Literal["none", "coengagement"] | tuple[Path, ...] | None = None
    pictures: tuple[PictureEncoderName, ...] = Field((), exclude_if=lambda pictures: not pictures)
    align_codes_to: Path | None = None
    checkpoint_every: int = Field(50, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _single_keys_override(cls, data: Any) -> Any:
        """Keys missing in `weights` and `start` get the values that the loss implies."""
        if not isinstance(data, dict):
            return data
        unisid = data.get("loss") == "unisid"
        weights = UNISID_WEIGHTS if unisid else LossWeights()
        implied = {"weights": weights.model_dump(), "start": {"mode": "random" if unisid else "balanced"}}
        return data | {name: values | data[name] for name, values in implied.items() if isinstance(data.get(name), dict)}

    @field_validator("behaviour", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, Path)) and value not in ("none", "coengagement") else value

    @field_validator("pictures", mode="before")
    @classmethod
    def _one_encoder(cls, value: Any) -> Any:
        return () if value in ("none", None) else (value,) if isinstance(value, str) else value

    @field_validator("pictures")
    @classmethod
    def _encoders_once(cls, value: tuple[PictureEncoderName, ...]) -> tuple[PictureEncoderName, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"pictures names an encoder twice ({', '.join(value)}); name each once")
        return tuple(sorted(value))

    @field_validator("reconstruct", mode="before")
    @classmethod
    def _parse_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML parses a bare `off` as false

    def inputs(self) -> dict[str, Path | None]:
        """The catalogue, the annotations, the user's behaviour vectors, and the earlier tokenizer."""
        return {
            **self.catalog.inputs(),
            **behaviour_inputs(self.behaviour),
            "captions": self.captions,
            "interests": self.interests,
            "align_codes_to": None if self.align_codes_to is None else manifest_folder(self.align_codes_to),
        }

    def resolved_head(self) -> str:
        """`head`, by default "residual" for our loss and "parallel" for that of UniSID."""
        return self.head or ("parallel" if self.loss == "unisid" else "residual")

    def resolved_start(self) -> initialization.StartSettings:
        """`start`, by default balanced for our loss and random for that of UniSID."""
        return self.start or initialization.StartSettings(mode="random" if self.loss == "unisid" else "balanced")

    def resolved_behaviour(self) -> str | tuple[Path, ...]:
        """`behaviour`, by default "coengagement" for our loss and "none" for that of UniSID."""
        return self.behaviour if self.behaviour is not None else ("none" if self.loss == "unisid" else "coengagement")

    def uses_coengagement(self, value: str | None) -> bool:
        """Whether `value`, of `finest` or `partners`, is "engaged"; the default is "engaged" for our loss with behaviour."""
        return (value or ("category" if self.loss == "unisid" or self.behaviour == "none" else "engaged")) == "engaged"

    def resolved_weights(self) -> LossWeights:
        """`weights`, by default the published ones for the loss of UniSID."""
        return self.weights or (UNISID_WEIGHTS if self.loss == "unisid" else LossWeights())
