"""Stage `caption` (CMSA): one caption per creative, written by a vision-language model from the picture.

The functions that build the generator, the prompt and the picture loader are shared with the stages `interests` and `judge`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field, model_validator

from mmsid.annotate.confidence import ANY_MODEL, DEMO_MODEL, LOW_CONFIDENCE, Confidence
from mmsid.annotate.generator import DEFAULT_BATCH_SIZE, Generator
from mmsid.annotate.job import annotate
from mmsid.annotate.job_config import ModelJobConfig
from mmsid.annotate.job_inputs import JobInput, Task
from mmsid.annotate.ocr import check_installed
from mmsid.annotate.prompts import Prompt, evidence_json, item_evidence, load_prompt
from mmsid.annotate.records import Caption, CaptionWithInterests, Record, parse_caption, parse_caption_with_interests
from mmsid.annotate.server import OpenAIGenerator
from mmsid.annotate.server_checks import server_problems
from mmsid.annotate.text_overlays import mask_overlays
from mmsid.annotate.word_check import WordCheck, small_print
from mmsid.artifacts import Draft, is_complete, read_manifest, writing
from mmsid.backbone.packaged_weights import DEMO
from mmsid.catalog import Item, PictureLimits, load_picture, read_catalog
from mmsid.progress import done, is_main_process
from mmsid.ray_pool import Engine


class CaptionConfig(ModelJobConfig):
    """Options of the caption stage. The default prompt is `caption_demo` for the small captioners of mmsid, else `caption`.

    Attributes:
        check_words: read the words of every picture by OCR (extra `ocr`), and flag captions that claim others (`word_check`).
        with_interests: ask the model for caption and interests in one answer, so that it reads every picture once. The default prompt is
            then `caption_with_interests`, which also gives the item's text, and `max_new_tokens` is 512. Stage `interests` takes the
            interests over with `generator: captions`. The small captioners of mmsid cannot do it.
    """

    check_words: bool = Field(default=False, exclude_if=lambda check: not check)
    with_interests: bool = False

    @model_validator(mode="after")
    def _check_with_interests(self) -> CaptionConfig:
        if self.with_interests and self.server is None and is_small_captioner(self.model):
            raise ValueError(
                f"with_interests: {self.model} is a small captioner, which gives one kind of answer per request; name a hub model, or "
                "leave with_interests out and run stage interests with its own model"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _longer_answers(cls, values: Any) -> Any:
        """A caption and eight interests need up to 400 tokens."""
        asked = isinstance(values, dict) and values.get("with_interests") and "max_new_tokens" not in values
        return values | {"max_new_tokens": 512} if asked else values


def run(config: CaptionConfig, generator: Generator | None = None, engine: Engine = "local") -> Path:
    """Caption every creative of the catalogue into `config.out`.

    Args:
        generator: replaces the configured model.
        engine: `local` (this process, or the processes of `accelerate launch`) or `ray` (actors of a Ray cluster).

    Raises:
        AnnotationError: reason `gate`, when too many creatives failed (the draft keeps the rows, see `job.annotate`).
        ConfigError, CatalogError: model, prompt or catalogue cannot be used.
    """
    prompt = load_prompt(config.prompt or default_prompt("caption_with_interests" if config.with_interests else "caption", config))
    words = WordCheck() if config.check_words else None
    record, parse = record_of(config)
    task = Task("caption", prompt, record, parse, picture_loader(config), words=words, confidence=confidence_of(config))
    generator = generator or build_generator(config, record)
    with writing(config.out, stage="caption", config=config, inputs=config.inputs(), resume=True) as draft:
        catalog = read_catalog(config.catalog)
        task = replace(task, integer_ids=catalog.integer_ids)
        total = sum(len(_job_inputs(item, with_text=False)) for item in catalog.items)
        inputs = (one for item in catalog.items for one in _job_inputs(item, prompt.wants_evidence))
        annotate(inputs, total, task, generator, config, draft, engine)
        draft.extra.update(catalog_sha256=catalog.sha256, **provenance(prompt, generator))
    print_summary("caption", draft, config.out)
    return config.out


def _job_inputs(item: Item, with_text: bool) -> list[JobInput]:
    """One input per usable creative, then one per refused creative; a single one with reason `no_picture` if the item has neither."""
    evidence = evidence_json(**item_evidence(item)) if with_text else ""
    inputs = [JobInput(item.item_id, at, (path,), evidence) for at, path in enumerate(item.images)]
    inputs += [JobInput(item.item_id, len(inputs) + at, reason=reason) for at, reason in enumerate(refused_pictures(item))]
    return inputs or [JobInput(item.item_id, reason="no_picture")]


def refused_pictures(item: Item) -> list[str]:
    """The catalogue's problem codes of the item's refused pictures, such as `picture_missing`."""
    return [problem for problem in item.problems if problem.startswith("picture_")]


def default_prompt(stage: str, config: ModelJobConfig) -> str:
    """The prompt that fits the model: a trained captioner gets the prompt of its training, a hub model the detailed one."""
    if str(config.model) == DEMO:
        return f"{stage}_demo"
    if config.server is None and is_complete(Path(config.model)):
        return read_manifest(Path(config.model))["config"].get(f"{stage}_prompt") or f"{stage}_demo"
    return stage


def is_small_captioner(model: str | Path) -> bool:
    """True for `demo` and for a folder of stage `train_captioner`: models that know the prompts of their training only."""
    return str(model) == DEMO or (is_complete(Path(model)) and read_manifest(Path(model))["stage"] == "train_captioner")


def record_of(config: CaptionConfig) -> tuple[type[Record], Callable[[str], Record]]:
    """The record that the model writes, and the function that reads it."""
    return (CaptionWithInterests, parse_caption_with_interests) if config.with_interests else (Caption, parse_caption)


def confidence_of(config: ModelJobConfig) -> Confidence:
    """How sure the configured model has to be of its answers."""
    return DEMO_MODEL if config.server is None and str(config.model) == DEMO else ANY_MODEL


def provenance(prompt: Prompt, generator: Generator) -> dict[str, Any]:
    """What a manifest says of the answers' origin: the prompt, and whether every answer was held to the JSON schema (None: not known)."""
    return {"prompt": prompt.name, "prompt_sha256": prompt.sha256, "constrained": getattr(generator, "constrained", None)}


def build_generator(config: ModelJobConfig, record: type[Record]) -> Generator:
    """The generator of the configured model: a Hugging Face model in this process, or a client of the server."""
    if config.server is not None:
        return OpenAIGenerator(
            str(config.model),
            config.server,
            revision=config.revision,
            max_new_tokens=config.max_new_tokens,
            schema=record.model_json_schema(),
            batch_size=config.batch_size or DEFAULT_BATCH_SIZE,
            system_prompt=config.system_prompt,
            template_arguments=config.template_arguments,
        )
    from mmsid.annotate.huggingface import HuggingFaceGenerator  # the import takes seconds; a server does not need it

    return HuggingFaceGenerator(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        max_new_tokens=config.max_new_tokens,
        picture_tokens=config.picture_tokens,
        system_prompt=config.system_prompt,
        template_arguments=config.template_arguments,
        schema=record.model_json_schema(),
    )


def picture_loader(config: ModelJobConfig) -> partial[Image.Image]:
    """A function that loads a picture under the catalogue's limits. It can be pickled and called in any process and folder.

    Raises ConfigError if `mask_overlays` needs the extra `ocr`, which is not installed.

    With `mask_overlays` it also shrinks the picture to `max_side` and masks it, in this order: the detector has to see the picture
    at the size that the model reads.
    """
    load = partial(_load, config.catalog.pictures, config.catalog.picture_roots)
    if not config.mask_overlays:
        return load
    if config.mask_overlays == "ocr":
        check_installed("mask_overlays: ocr")
    return partial(_load_masked, load, config)


def _load(limits: PictureLimits, roots: tuple[Path, Path], path: Path) -> Image.Image:
    return load_picture(path, limits, root=roots)


def _load_masked(load: Callable[[Path], Image.Image], config: ModelJobConfig, path: Path) -> Image.Image:
    return masked(load(path), config)


def masked(picture: Image.Image, config: ModelJobConfig) -> Image.Image:
    """The picture without small print, at most `max_side` wide and high, if `mask_overlays` is set; else unchanged."""
    if not config.mask_overlays:
        return picture
    if config.max_side is not None:
        picture.thumbnail((config.max_side, config.max_side), Image.Resampling.LANCZOS)
    return mask_overlays(picture, small_print if config.mask_overlays == "ocr" else None)


def print_summary(stage: str, draft: Draft, out: Path) -> None:
    """Print the closing line of an annotation stage (on rank 0, which has the counts): rows by status, reasons, generations."""
    if not is_main_process():
        return
    counts, reasons = draft.counts, draft.extra["reasons"]
    why = f": {', '.join(f'{reason} {count:,}' for reason, count in list(reasons.items())[:3])}" if reasons else ""
    work, uncertain = draft.extra["work"], draft.extra["flags"].get(LOW_CONFIDENCE, 0)
    unsure = f"; {uncertain:,} ok rows flagged {LOW_CONFIDENCE}" if uncertain else ""
    done(
        f"{stage}: wrote {counts['in']:,} rows ({counts['ok']:,} ok, {counts['quarantined']:,} quarantined{why}; "
        f"{work.get('generated', 0):,} generations, {work.get('cache_hits', 0):,} from the cache{unsure}) to {out}"
    )
    for problem in server_problems(work):
        warnings.warn(f"{stage}: {problem}", stacklevel=3)
    if alike := draft.extra.get("alike"):
        warnings.warn(f"{stage}: {alike}", stacklevel=3)
