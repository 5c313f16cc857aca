"""Stage `interests` (DCIM): descriptors with confidences and a summary of the deep interests that an item serves.

A language model mines them from title, description, caption, categories and attributes (the small demo captioner from the picture).
Alternatively, generator `captions` takes over what the captioning model wrote beside its captions (`caption.with_interests`), and
`coengagement` mines key phrases of co-engaged items without a model; such rows are never encoder input.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from mmsid.annotate.caption import (
    build_generator,
    confidence_of,
    default_prompt,
    picture_loader,
    print_summary,
    provenance,
    refused_pictures,
)
from mmsid.annotate.captioned_interests import captioned_interests, wrote_interests
from mmsid.annotate.coengagement import CoengagementGenerator, mine_phrases, phrases_json
from mmsid.annotate.confidence import ANY_MODEL
from mmsid.annotate.generator import Generator
from mmsid.annotate.job import annotate
from mmsid.annotate.job_config import ModelJobConfig
from mmsid.annotate.job_inputs import JobInput, Task
from mmsid.annotate.prompts import PLACEHOLDER, Prompt, evidence_json, item_evidence, load_prompt
from mmsid.annotate.readers import captions_of
from mmsid.annotate.records import Interests, parse_interests
from mmsid.artifacts import sha256, writing
from mmsid.catalog import Catalog, Item, co_engagement, read_catalog, split_histories
from mmsid.errors import ConfigError
from mmsid.ray_pool import Engine


class InterestsConfig(ModelJobConfig):
    """Options of the interests stage.

    Attributes:
        generator: as in `ModelJobConfig`, or `captions` or `coengagement` (no model).
        captions: a finished `caption` folder, used by prompts that contain the item's text and by the generator `captions`.
        pictures: give the first readable picture to the model. None: only if the prompt has no placeholder for text.
        descriptors: descriptors per item, for `coengagement`.
        window: largest distance in steps between two co-engaged items of a history, for `coengagement`.
    """

    generator: Literal["huggingface", "openai", "captions", "coengagement"] = "huggingface"
    captions: Path | None = None
    pictures: bool | None = None
    max_new_tokens: int = Field(default=384, ge=1)
    descriptors: int = Field(default=5, ge=1, le=8)
    window: int = Field(default=3, ge=1)

    def loaded_prompt(self) -> Prompt:
        """The prompt of the model; for a generator without a model the placeholder of the text alone."""
        if self.generator in ("captions", "coengagement"):
            return Prompt(text=PLACEHOLDER, sha256=sha256(PLACEHOLDER), name=self.generator)
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
        engine: as in `caption.run`; `captions` and `coengagement` always run in this process.

    Raises:
        AnnotationError: reason `gate`, when too many items failed (the draft keeps the rows, see `job.annotate`).
        ArtifactError: `captions` is not a finished caption folder.
        ConfigError: model or prompt cannot be used; `generator: captions` without captions that hold interests.
        CatalogError: the catalogue cannot be used.
    """
    from_behaviour, prompt = config.generator == "coengagement", config.loaded_prompt()
    if config.generator == "captions" and config.captions is None:
        raise ConfigError("interests.generator: captions needs interests.captions, a finished folder of caption with with_interests: true")
    reads_captions = config.captions is not None and prompt.wants_evidence
    loader = picture_loader(config)
    source = {"source": "coengagement" if from_behaviour else "llm"}
    confidence = ANY_MODEL if config.generator in ("captions", "coengagement") else confidence_of(config)
    task = Task("interests", prompt, Interests, parse_interests, loader, any_picture=True, constants=source, confidence=confidence)
    with writing(config.out, stage="interests", config=config, inputs=config.inputs(), resume=True) as draft:
        catalog = read_catalog(config.catalog)
        task = replace(task, integer_ids=catalog.integer_ids)
        total, uncached = len(catalog.items), config.model_copy(update={"cache": None})
        if config.generator == "captions":
            generator, inputs = captioned_interests(config.captions, catalog.items)
            annotate(inputs, total, task, generator, uncached, draft)
        elif from_behaviour:
            captions = captions_of(catalog, config.captions if reads_captions else None)
            inputs = _coengagement_inputs(config, catalog, captions)
            annotate(inputs, total, task, generator := generator or CoengagementGenerator(), uncached, draft)
        else:
            if reads_captions and wrote_interests(config.captions):
                warnings.warn(
                    f"interests: {config.captions} holds interests already, which its model wrote beside the captions; "
                    "set interests.generator: captions to use them instead of running a second model",
                    stacklevel=2,
                )
            captions = captions_of(catalog, config.captions if reads_captions else None)
            pictures = not prompt.wants_evidence if config.pictures is None else config.pictures
            inputs = (_job_input(item, captions, with_text=prompt.wants_evidence, with_pictures=pictures) for item in catalog.items)
            annotate(inputs, total, task, generator := generator or build_generator(config, Interests), config, draft, engine)
        draft.extra.update(catalog_sha256=catalog.sha256, **provenance(prompt, generator), **source)
    print_summary("interests", draft, config.out)
    return config.out


def _job_input(item: Item, captions: dict[str, str], *, with_text: bool, with_pictures: bool) -> JobInput:
    caption = captions.get(item.item_id, "")
    texts = item_evidence(item, caption)
    has_text = with_text and any(texts.values())
    evidence = evidence_json(**texts) if with_text else ""
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
