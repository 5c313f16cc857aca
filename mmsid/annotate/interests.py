"""Stage `interests` (DCIM): descriptors with confidences and a summary of the deep interests that an item serves.

A language model mines them from title, description and caption (the small demo captioner from the picture). Alternatively,
generator `coengagement` mines key phrases of co-engaged items without a model; such rows are never encoder input.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from mmsid.annotate.caption import build_generator, default_prompt, picture_loader, print_summary, refused_pictures
from mmsid.annotate.coengagement import CoengagementGenerator, mine_phrases, phrases_json
from mmsid.annotate.generator import Generator
from mmsid.annotate.job import annotate
from mmsid.annotate.job_config import ModelJobConfig
from mmsid.annotate.job_inputs import JobInput, Task
from mmsid.annotate.prompts import PLACEHOLDER, Prompt, evidence_json, load_prompt
from mmsid.annotate.readers import captions_of
from mmsid.annotate.records import Interests, parse_interests
from mmsid.artifacts import sha256, writing
from mmsid.catalog import Catalog, Item, co_engagement, read_catalog, split_histories
from mmsid.ray_pool import Engine


class InterestsConfig(ModelJobConfig):
    """Options of the interests stage.

    Attributes:
        generator: as in `ModelJobConfig`, or `coengagement` (no model).
        captions: a finished `caption` folder, used by prompts that contain the item's text.
        pictures: give the first readable picture to the model. None: only if the prompt has no placeholder for text.
        descriptors: descriptors per item, for `coengagement`.
        window: largest distance in steps between two co-engaged items of a history, for `coengagement`.
    """

    generator: Literal["huggingface", "openai", "coengagement"] = "huggingface"
    captions: Path | None = None
    pictures: bool | None = None
    descriptors: int = Field(default=5, ge=1, le=8)
    window: int = Field(default=3, ge=1)

    def loaded_prompt(self) -> Prompt:
        """The prompt of the model; for `coengagement` the placeholder of the text alone."""
        if self.generator == "coengagement":
            return Prompt(text=PLACEHOLDER, sha256=sha256(PLACEHOLDER), name="coengagement")
        return load_prompt(self.prompt or default_prompt("interests", self))

    def inputs(self) -> dict[str, Path | None]:
        """As `ModelJobConfig.inputs`, and the captions if the prompt reads them."""
        return super().inputs() | {"captions": None if self.unread_keys() else self.captions}

    def unread_keys(self) -> tuple[str, ...]:
        """`captions`, for a prompt that reads the picture alone."""
        return () if self.loaded_prompt().wants_evidence else ("captions",)


def run(config: InterestsConfig, generator: Generator | None = None, engine: Engine = "local") -> Path:
    """Mine the interests of every item into `config.out`, one row per item.

    Args:
        generator: replaces the configured model.
        engine: as in `caption.run`; `coengagement` always runs in this process.

    Raises:
        AnnotationError: reason `gate`, when too many items failed (the draft keeps the rows, see `job.annotate`).
        ArtifactError: `captions` is not a finished caption folder.
        ConfigError, CatalogError: model, prompt or catalogue cannot be used.
    """
    from_behaviour, prompt = config.generator == "coengagement", config.loaded_prompt()
    reads_captions = config.captions is not None and prompt.wants_evidence
    loader = picture_loader(config)
    source = {"source": "coengagement" if from_behaviour else "llm"}
    task = Task("interests", prompt, Interests, parse_interests, loader, any_picture=True, constants=source)
    with writing(config.out, stage="interests", config=config, inputs=config.inputs(), resume=True) as draft:
        catalog = read_catalog(config.catalog)
        task = replace(task, integer_ids=catalog.integer_ids)
        captions = captions_of(catalog, config.captions if reads_captions else None)
        total = len(catalog.items)
        if from_behaviour:
            inputs = _coengagement_inputs(config, catalog, captions)
            annotate(inputs, total, task, generator or CoengagementGenerator(), config.model_copy(update={"cache": None}), draft)
        else:
            pictures = not prompt.wants_evidence if config.pictures is None else config.pictures
            inputs = (_job_input(item, captions, with_text=prompt.wants_evidence, with_pictures=pictures) for item in catalog.items)
            annotate(inputs, total, task, generator or build_generator(config, Interests), config, draft, engine)
        draft.extra.update(catalog_sha256=catalog.sha256, prompt=prompt.name, prompt_sha256=prompt.sha256, **source)
    print_summary("interests", draft, config.out)
    return config.out


def _job_input(item: Item, captions: dict[str, str], *, with_text: bool, with_pictures: bool) -> JobInput:
    caption = captions.get(item.item_id, "")
    has_text = with_text and bool(item.title or item.description or caption)
    evidence = evidence_json(title=item.title, description=item.description, caption=caption) if with_text else ""
    images = item.images if with_pictures else ()
    if images or has_text:
        return JobInput(item.item_id, 0, images, evidence)
    refused = refused_pictures(item)
    if with_pictures and refused:
        return JobInput(item.item_id, reason=refused[0])
    return JobInput(item.item_id, reason="no_picture" if with_pictures else "no_evidence")


def _coengagement_inputs(config: InterestsConfig, catalog: Catalog, captions: dict[str, str]) -> list[JobInput]:
    """Inputs from the histories of the fit users' train part only: no held-out, valid or test interaction reaches a target."""
    split = split_histories(catalog, config.catalog.split)
    weights = co_engagement(split.fit_histories(), len(catalog.items), config.window, split.fit_weights())
    mined = mine_phrases(catalog, weights, captions, num_descriptors=config.descriptors)
    return [
        JobInput(item.item_id, evidence=phrases_json(phrases)) if phrases else JobInput(item.item_id, reason="no_coengagement")
        for item, phrases in zip(catalog.items, mined)
    ]
