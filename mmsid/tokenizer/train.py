"""Stage `train_tokenizer`: from a catalogue and its annotations to a tokenizer folder.

Start (closed form, `targets`), then a short accelerate loop on the losses of `objective`. Single process, or
`accelerate launch` (DDP; on a machine without GPU: `accelerate launch --multi_gpu --num_processes 2`, gloo). The data order is
a function of (seed, step, rank) and nothing is random inside a step, so that a resumed run equals the uninterrupted one.
Checkpoints are safetensors. Only rank 0 writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mmsid.artifacts import manifest_folder, writing
from mmsid.catalog import CatalogConfig, read_catalog, split_histories
from mmsid.config import StageConfig
from mmsid.precision import Precision, make_accelerator
from mmsid.progress import done
from mmsid.tokenizer import targets
from mmsid.tokenizer.inputs import FieldName
from mmsid.tokenizer.model import BackboneSettings
from mmsid.tokenizer.objective import UNISID_WEIGHTS, LossWeights
from mmsid.tokenizer.training import OnStep, Training


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
    start: targets.StartSettings | None = None
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
    memory: bool = True
    against: Path | None = None
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

    def resolved_start(self) -> targets.StartSettings:
        """Balanced for our loss, random for UniSID's, unless set."""
        return self.start or targets.StartSettings(mode="random" if self.loss == "unisid" else "balanced")

    def behavioural(self, chosen: str | None) -> bool:
        """Whether `finest` or `partners`, as `chosen`, goes by co-engagement: ours does unless set, UniSID's does not."""
        return (chosen or ("category" if self.loss == "unisid" else "engaged")) == "engaged"

    def resolved_weights(self) -> LossWeights:
        """The published weights for UniSID's loss, ours otherwise, unless set."""
        return self.weights or (UNISID_WEIGHTS if self.loss == "unisid" else LossWeights())


def run(config: TrainTokenizerConfig, on_step: OnStep | None = None) -> Path:
    """Train a tokenizer into `config.out` (a tokenizer folder with a manifest); resumes an unfinished run of the same config.

    `on_step(step, losses)` is called after every optimiser step.

    Raises:
        ConfigError, CatalogError, ArtifactError: what is wrong with settings, catalogue or earlier folders.
        MmsidError: the gradient is NaN or infinite.
    """
    accelerator = make_accelerator(config.precision, unused_parameters=True)
    catalog = read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split) if catalog.histories else None
    folders = {
        "items": config.catalog.items,
        "sequences": config.catalog.sequences,
        "captions": config.captions,
        "interests": config.interests,
        "against": None if config.against is None else manifest_folder(config.against),
    }
    with writing(config.out, stage="train_tokenizer", config=config, inputs=folders, resume=True) as draft:
        accelerator.wait_for_everyone()  # rank 0 has opened the draft
        training = Training(config, accelerator, catalog, split, draft)
        training.loop(on_step)
        training.finish()
        accelerator.wait_for_everyone()
    done(
        f"train_tokenizer: wrote a tokenizer of {config.num_levels} x {config.codebook_size} codes, {config.steps} steps on "
        f"{len(catalog.items):,} items, to {config.out}"
    )
    return config.out
