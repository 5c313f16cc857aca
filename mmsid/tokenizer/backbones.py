"""Backbones of the item tokenizer: settings, and the model that they describe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from mmsid.backbone.lora import LoraSettings
from mmsid.backbone.model_loading import Dtype
from mmsid.backbone.query_tokens import QueryBackbone
from mmsid.backbone.text import TextBackbone, hidden_size_of
from mmsid.backbone.vectors import VectorBackbone
from mmsid.backbone.vlm import INSTRUCTION, VlmBackbone, open_as_is
from mmsid.catalog import Catalog
from mmsid.config import Section
from mmsid.errors import ConfigError
from mmsid.tokenizer.inputs import ALL_FIELDS, FieldName


class BackboneSettings(Section):
    """The backbone of a tokenizer.

    Attributes:
        kind: "text" and "vlm" read the content of an item with a pretrained model. "vectors" reads `catalog.vectors` instead.
        path: "minilm", "demo" (with `kind: vlm`), a folder or a hub id. Saved tokenizers store this reference, not the weights.
        max_length: text tokens per item at most.
        max_pictures: pictures per item at most (`kind: vlm`).
        picture_tokens: tokens per picture at most (`kind: vlm`). None: 256, or the least that the family can do.
        dtype: number format of the frozen weights. `auto` is bfloat16 on a GPU that computes in it (checkpoints of less than 400 MB in
            float32 stay so), and float32 elsewhere.
        instruction: prompt before the pictures and the text of an item (`kind: vlm`).
        states: input of the heads, one state per query token ("tokens"), or the mean content state for all of them ("pooled", an
            ablation of the query tokens).
        lora: adapter; for `kind: vectors`, `r` is the width of the bottleneck of every token.
        widths: dimension of each family of vectors (`kind: vectors`), set by training.
    """

    kind: Literal["text", "vlm", "vectors"] = "text"
    path: str = "minilm"
    max_length: int = Field(96, ge=1)
    max_pictures: int = Field(1, ge=0)
    picture_tokens: int | None = Field(None, ge=1)
    dtype: Dtype = "auto"
    instruction: str = INSTRUCTION
    states: Literal["tokens", "pooled"] = "tokens"
    lora: LoraSettings = LoraSettings()
    widths: tuple[int, ...] = Field((), exclude_if=lambda widths: not widths)

    @property
    def fields(self) -> tuple[FieldName, ...]:
        """Item fields that a backbone of this kind can read."""
        if self.kind == "vectors":
            return ("vectors",)
        return tuple(name for name in ALL_FIELDS if name != "vectors" and (name != "pictures" or self.kind == "vlm"))

    def fitted_to(self, catalog: Catalog) -> BackboneSettings:
        """These settings with the widths of the catalogue's vectors.

        Raises:
            ConfigError: the backbone reads vectors and the catalogue has none.
        """
        if self.kind != "vectors":
            return self
        if catalog.vectors is None:
            raise ConfigError("backbone.kind is 'vectors', but catalog.vectors names no file; name one, or choose kind text or vlm")
        return self.model_copy(update={"widths": catalog.vectors.widths})

    def hidden_size(self) -> int:
        """Size H of a state.

        Raises:
            ConfigError: no model configuration at `path`.
        """
        return sum(self.widths) if self.kind == "vectors" else hidden_size_of(self.path)

    def describe(self) -> str:
        """Phrase for the model card: the model or the vectors, and sizes."""
        if self.kind == "vectors":
            return f"vectors of dimension {' + '.join(map(str, self.widths))} (bottleneck {self.lora.r})"
        return f"{self.path} ({self.kind}, at most {self.max_length} text tokens, LoRA rank {self.lora.r})"


def build_backbone(
    settings: BackboneSettings, num_levels: int, seed: int, open_picture: Callable[[Any], Any] = open_as_is
) -> QueryBackbone | VectorBackbone:
    """Backbone with `num_levels` SID tokens and one EMB token.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    if settings.kind == "vectors":
        return VectorBackbone(settings.widths, num_levels=num_levels, rank=settings.lora.r, seed=seed)
    common = {"num_levels": num_levels, "max_length": settings.max_length, "dtype": settings.dtype, "seed": seed}
    if settings.kind == "text":
        return TextBackbone(settings.path, **common)
    pictures = {"max_pictures": settings.max_pictures, "picture_tokens": settings.picture_tokens, "open_picture": open_picture}
    pictures["instruction"] = settings.instruction
    return VlmBackbone(settings.path, **pictures, **common)
