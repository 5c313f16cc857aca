"""Stage `interests` (DCIM): the deep interests that an item may serve, as descriptors with confidences and one summary.

Generators `huggingface` and `openai`: a language model reads title, description and caption (or our small model the picture).
`coengagement`: no model at all, see `coengagement`; its rows may be reconstructed but never encoded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mmsid.annotate.caption import PICTURE, closing_line, default_prompt, input_paths, model_of, picture_loader
from mmsid.annotate.coengagement import CoengagementGenerator, evidence_of, mine
from mmsid.annotate.generator import Generator
from mmsid.annotate.job import annotate
from mmsid.annotate.job_config import JobInput, ModelJobConfig, Task
from mmsid.annotate.prompts import PLACEHOLDER, Prompt, evidence_json, load_prompt
from mmsid.annotate.readers import read_captions
from mmsid.annotate.records import Interests, parse_interests
from mmsid.artifacts import sha256, writing
from mmsid.catalog import Catalog, Item, co_engagement, read_catalog, split_histories
from mmsid.progress import done, is_main_process
from mmsid.ray_pool import Engine


class InterestsConfig(ModelJobConfig):
    """What to mine interests from, and how.

    Attributes:
        generator: as in `ModelJobConfig`, or the miner.
        captions: a finished `caption` folder, used where the prompt (or the miner) reads text.
        pictures: show the first readable picture to the model; None = only when the prompt has no place for text.
        descriptors, window: of the `coengagement` miner: how many per item, and how many steps apart still counts.
    """

    generator: Literal["huggingface", "openai", "coengagement"] = "huggingface"
    captions: Path | None = None
    pictures: bool | None = None
    descriptors: int = Field(default=5, ge=1, le=8)
    window: int = Field(default=3, ge=1)


def run(config: InterestsConfig, generator: Generator | None = None, engine: Engine = "local") -> Path:
    """Mine the interests of every item into `config.out`, one row each; `generator` replaces the configured model.

    `engine` says where, as in `caption.run`; `coengagement` needs no model and always works here.

    Raises:
        AnnotationError: reason `gate`, when too many items failed (the rows stay in the draft, see `job`).
        ArtifactError: `captions` is not a finished caption folder.
        ConfigError, CatalogError: model, prompt or catalogue cannot be used.
    """
    mining = config.generator == "coengagement"
    if mining:
        prompt = Prompt(text=PLACEHOLDER, sha256=sha256(PLACEHOLDER), name="coengagement")
    else:
        prompt = load_prompt(config.prompt or default_prompt("interests", config))
    reads_captions = config.captions is not None and prompt.wants_evidence
    inputs = input_paths(config) | ({"captions": config.captions} if reads_captions else {})
    loader = picture_loader(config)
    source = {"source": "coengagement" if mining else "llm"}
    task = Task("interests", prompt, Interests, parse_interests, loader, any_picture=True, constants=source)
    with writing(config.out, stage="interests", config=config, inputs=inputs, resume=True) as draft:
        catalog = read_catalog(config.catalog)
        captions = read_captions(config.captions) if reads_captions else {}
        total = len(catalog.items)
        if mining:
            units = _mined_units(config, catalog, captions)
            annotate(units, total, task, generator or CoengagementGenerator(), config.model_copy(update={"cache": None}), draft)
        else:
            pictures = not prompt.wants_evidence if config.pictures is None else config.pictures
            units = (_unit(item, captions, with_text=prompt.wants_evidence, with_pictures=pictures) for item in catalog.items)
            annotate(units, total, task, generator or model_of(config, Interests), config, draft, engine)
        draft.extra.update(catalog_sha256=catalog.sha256, prompt=prompt.name, prompt_sha256=prompt.sha256, **source)
    if is_main_process():
        done(closing_line("interests", draft, config.out))
    return config.out


def _unit(item: Item, captions: dict[str, str], *, with_text: bool, with_pictures: bool) -> JobInput:
    caption = captions.get(item.item_id, "")
    has_text = with_text and bool(item.title or item.description or caption)
    evidence = evidence_json(title=item.title, description=item.description, caption=caption) if with_text else ""
    images = item.images if with_pictures else ()
    if images or has_text:
        return JobInput(item.item_id, 0, images, evidence)
    refused = [problem for problem in item.problems if problem.startswith(PICTURE)]
    if with_pictures and refused:
        return JobInput(item.item_id, reason=refused[0])
    return JobInput(item.item_id, reason="no_picture" if with_pictures else "no_evidence")


def _mined_units(config: InterestsConfig, catalog: Catalog, captions: dict[str, str]) -> list[JobInput]:
    """Only users of the fit part of train are looked at: nothing held out, valid or test reaches a target."""
    histories = split_histories(catalog, config.catalog.split).fit_histories()
    weights = co_engagement(histories, len(catalog.items), window=config.window)
    mined = mine(catalog, weights, captions, num_descriptors=config.descriptors)
    return [
        JobInput(item.item_id, evidence=evidence_of(phrases)) if phrases else JobInput(item.item_id, reason="no_coengagement")
        for item, phrases in zip(catalog.items, mined)
    ]
