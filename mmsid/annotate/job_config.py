"""What an annotation job is made of: its configuration, its units of work, and the rows that come of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa
from PIL import Image
from pydantic import Field, model_validator

from mmsid.annotate.prompts import Prompt
from mmsid.annotate.records import Record
from mmsid.annotate.server import ServerConfig
from mmsid.backbone.packaged_weights import DEMO
from mmsid.catalog import CatalogConfig
from mmsid.config import StageConfig
from mmsid.ray_pool import RayConfig

# There was nothing to annotate: a fact about the item, not a failure of the job, so the gate looks past these rows.
EXCUSED = frozenset({"no_picture", "no_evidence", "no_coengagement", "no_interests"})


class JobConfig(StageConfig):
    """What every annotation job has: batching, retries, the gate, shards and the cache.

    `readers` and `ray` say how the work is done, not what comes out: they are in no manifest, and a draft outlives their change.
    """

    batch_size: int = Field(default=16, ge=1)
    temperature: float = Field(default=0.0, ge=0.0)  # 0 = greedy
    retries: int = Field(default=1, ge=0, le=10)
    retry_temperature: float = Field(default=0.7, gt=0.0)  # a greedy retry would only repeat itself
    max_quarantined: float = Field(default=0.05, ge=0.0, le=1.0)
    shard_rows: int = Field(default=1_024, ge=1)
    cache: Path | None = None
    max_side: int | None = Field(default=1_024, ge=16)  # pictures are shrunk to this longer side before anything sees them
    readers: int = Field(default=4, ge=1, exclude=True)  # threads that read and decode pictures ahead of the model
    ray: RayConfig = Field(default=RayConfig(), exclude=True)


class ModelJobConfig(JobConfig):
    """An annotation job that a model does: a Hugging Face one in process, or whatever an OpenAI-compatible server serves.

    Attributes:
        generator: who answers. For `openai`, `model` is the name that the server knows and `revision` names its weights.
        model: `demo`, a folder, or a hub id.
        dtype, device: of the model in process; device `auto` = cuda when there is one.
        mask_overlays: lines of small print are painted over before the model looks (see `overlays`).
        picture_tokens: largest number of tokens that a picture may cost, for models that scale it with the size (Qwen-VL).
        prompt: a shipped prompt's name or a file; None = the one that suits the model.
        server: where the server is and how to treat it; needed by `openai`.
    """

    catalog: CatalogConfig
    generator: Literal["huggingface", "openai"] = "huggingface"
    model: str | Path = DEMO
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    max_new_tokens: int = Field(default=256, ge=1)
    mask_overlays: bool = False
    picture_tokens: int | None = Field(default=None, ge=1)
    prompt: str | None = None
    server: ServerConfig | None = None

    @model_validator(mode="after")
    def _server_goes_with_openai(self) -> ModelJobConfig:
        if (self.generator == "openai") != (self.server is not None):
            raise ValueError("generator: openai and a server: section go together; write both or neither")
        if self.generator == "openai" and self.picture_tokens is not None:
            raise ValueError("picture_tokens: with generator: openai the server's own processor decides; set it there, or lower max_side")
        return self


@dataclass(frozen=True)
class JobInput:
    """One row to be made. A `reason` known beforehand (a picture that the catalogue refused) quarantines it before any model runs."""

    item_id: str
    creative: int = 0
    pictures: tuple[Path, ...] = ()
    evidence: str = ""
    reason: str | None = None


@dataclass(frozen=True)
class Task:
    """What to make of every unit: which prompt, which record, how its pictures are read.

    With `any_picture`, the first picture that can be read is used; otherwise all must be readable. `constants` are columns
    with one value in every row.
    """

    what: str
    prompt: Prompt
    record: type[Record]
    parse: Callable[[str], Record]
    load_picture: Callable[[Path], Image.Image]
    any_picture: bool = False
    constants: Mapping[str, str] = field(default_factory=dict)

    @property
    def schema(self) -> pa.Schema:
        """Columns of a row: identity, the record's fields (lists as JSON), status, provenance."""
        text = [pa.field(name, pa.string()) for name in (*self.record.model_fields, *self.constants)]
        return pa.schema(
            [
                pa.field("item_id", pa.string()),
                pa.field("creative", pa.int64()),
                *text,
                pa.field("status", pa.string()),
                pa.field("reason", pa.string()),
                pa.field("flags", pa.list_(pa.string())),
                pa.field("attempts", pa.list_(pa.string())),
                pa.field("rejected", pa.string()),
                *(pa.field(name, pa.string()) for name in ("prompt_sha256", "model_id", "input_sha256")),
            ]
        )
