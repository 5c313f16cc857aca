"""Configuration of annotation jobs: batching, retries, error-rate gate and cache; model, prompt and server."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mmsid.annotate.server_config import ServerConfig
from mmsid.artifacts import is_complete
from mmsid.backbone.packaged_weights import DEMO
from mmsid.catalog import CatalogConfig
from mmsid.config import StageConfig
from mmsid.ray_pool import RayConfig


class JobConfig(StageConfig):
    """Options of every annotation job.

    `batch_size`, `max_quarantined`, `cache`, `readers` and `ray` do not change the rows. They are not part of the manifest, and a draft
    can be resumed with other values.

    Attributes:
        batch_size: requests per call of the generator. None: 16, or as many as the free memory of a GPU should hold (16 to 256). A batch
            that exceeds the memory is halved, and the job goes on with the smaller size.
        temperature: of the first attempt; 0 is greedy decoding.
        retries: further attempts after an invalid answer.
        retry_temperature: of the further attempts; a greedy retry would return the same answer.
        max_quarantined: largest share of failed rows that the error-rate gate accepts, of the rows that the model was asked for.
        shard_rows: rows per output file.
        cache: sqlite file with the answers of earlier jobs. None: duplicates are shared within the job only.
        max_side: pictures are shrunk to this longer side (pixels) before the model reads them. None: never.
        readers: threads that read and decode pictures ahead of the model.
        ray: resources of the engine `ray`.
    """

    batch_size: int | None = Field(default=None, ge=1, exclude=True)
    temperature: float = Field(default=0.0, ge=0.0)
    retries: int = Field(default=1, ge=0, le=10)
    retry_temperature: float = Field(default=0.7, gt=0.0)
    max_quarantined: float = Field(default=0.05, ge=0.0, le=1.0, exclude=True)
    shard_rows: int = Field(default=1_024, ge=1)
    cache: Path | None = Field(default=None, exclude=True)
    max_side: int | None = Field(default=1_024, ge=16)
    readers: int = Field(default=4, ge=1, exclude=True)
    ray: RayConfig = Field(default=RayConfig(), exclude=True)


class ModelJobConfig(JobConfig):
    """Options of an annotation job with a model: a Hugging Face model in this process, or an OpenAI-compatible server.

    Attributes:
        catalog: the items and their pictures.
        generator: `huggingface`, or `openai`. For `openai`, `model` is the name on the server and `revision` names its weights.
        model: `demo`, a folder, or a hub id.
        revision: git revision of a hub model.
        dtype: number format of the weights of a model in this process. `auto` is bfloat16 on a GPU that computes in it (checkpoints of
            less than 400 MB in float32 stay so), and float32 elsewhere.
        device: of a model in this process: `auto` (cuda, else mps, else cpu), `cpu`, `cuda`, `cuda:1`, `mps`. Not part of the manifest.
        max_new_tokens: longest answer.
        mask_overlays: paint over lines of small print before the model reads the picture (see `text_overlays`). `ocr` locates the lines by
            OCR (extra `ocr`) instead of counting strokes.
        picture_tokens: largest number of tokens per picture, for models whose token count depends on its settings or the size.
        prompt: name of a shipped prompt, or a file. None: the prompt that fits the model.
        system_prompt: instruction in the role `system` before every prompt; "" for none.
        template_arguments: variables of the model's chat template. For a model in this process `enable_thinking` is false unless it stands
            here; a server gets them as `chat_template_kwargs`.
        server: address and limits of the server; required by `openai`.
    """

    catalog: CatalogConfig
    generator: Literal["huggingface", "openai"] = "huggingface"
    model: str | Path = DEMO
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field(default="auto", exclude=True)
    max_new_tokens: int = Field(default=256, ge=1)
    mask_overlays: bool | Literal["ocr"] = False
    picture_tokens: int | None = Field(default=None, ge=1)
    system_prompt: str = ""
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    prompt: str | None = None
    server: ServerConfig | None = None

    def inputs(self) -> dict[str, Path | None]:
        """The catalogue, and the model if it is a folder that mmsid wrote."""
        trained = self.server is None and is_complete(Path(self.model))
        return self.catalog.inputs() | {"model": Path(self.model) if trained else None}

    @model_validator(mode="after")
    def _check_server(self) -> ModelJobConfig:
        if (self.generator == "openai") != (self.server is not None):
            raise ValueError("generator: openai and a server: section go together; write both or neither")
        if self.generator == "openai" and self.picture_tokens:
            raise ValueError(
                "picture_tokens does not apply to openai, where the server's own processor decides; set it there or lower max_side"
            )
        return self
