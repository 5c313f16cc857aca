"""Configuration of the stage `train_tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mmsid.accelerator import Precision
from mmsid.catalog import CatalogConfig
from mmsid.config import StageConfig
from mmsid.tokenizer import initialization
from mmsid.tokenizer.inputs import FieldName
from mmsid.tokenizer.model import BackboneSettings
from mmsid.tokenizer.objective import UNISID_WEIGHTS, LossWeights


class TrainTokenizerConfig(StageConfig):
    """`loss: ours` starts from balanced residual codes and distils them; `loss: unisid` is the published loss: parallel heads,
    random start, multi-granularity contrast on the logits + InfoNCE + 0.1 reconstruction, pairs and finest positives by category.
    `head`, `partners`, `finest` and single keys of `start` and `weights` override what the loss implies.

    `without`: fields left out of `use` (they may still be reconstructed). `partners`: who an anchor is paired with in a batch, a
    co-engaged item where there is one, or one of its finest category.

    At the end the trained states are clustered once more, so that the raw codes are balanced (residual head, balanced start; one
    more reading of the items). `memory` first adds what behaviour says of each known item beyond what content predicts.
    `reconstruct` None takes summaries where there are interests, else attributes, else nothing.
    `against`: published SIDs of an earlier tokenizer of the same sizes; the codes are renamed at the end, by one permutation per
    level, to agree with them for most items.
    """

    renamed_keys: ClassVar[dict[str, str]] = {"memory": "behaviour_regression", "against": "align_codes_to"}

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
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    precision: Precision = "auto"
    behaviour_regression: bool = True
    align_codes_to: Path | None = None
    checkpoint_every: int = Field(50, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _single_keys_override(cls, data: Any) -> Any:
        """A section that names some keys changes those alone; the others stay what the loss implies."""
        if not isinstance(data, dict):
            return data
        unisid = data.get("loss") == "unisid"
        weights = UNISID_WEIGHTS if unisid else LossWeights()
        implied = {"weights": weights.model_dump(), "start": {"mode": "random" if unisid else "balanced"}}
        return data | {name: values | data[name] for name, values in implied.items() if isinstance(data.get(name), dict)}

    @field_validator("reconstruct", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    def resolved_head(self) -> str:
        """Residual for our loss, parallel for UniSID's, unless set."""
        return self.head or ("parallel" if self.loss == "unisid" else "residual")

    def resolved_start(self) -> initialization.StartSettings:
        """Balanced for our loss, random for UniSID's, unless set."""
        return self.start or initialization.StartSettings(mode="random" if self.loss == "unisid" else "balanced")

    def behavioural(self, chosen: str | None) -> bool:
        """Whether `finest` or `partners`, as `chosen`, goes by co-engagement: ours does unless set, UniSID's does not."""
        return (chosen or ("category" if self.loss == "unisid" else "engaged")) == "engaged"

    def resolved_weights(self) -> LossWeights:
        """The published weights for UniSID's loss, ours otherwise, unless set."""
        return self.weights or (UNISID_WEIGHTS if self.loss == "unisid" else LossWeights())
