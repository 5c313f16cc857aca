"""Stage `judge`: label every mined descriptor 1 (specific, usable, supported by the item's evidence) or 0 with a language model.

The method is the judge of QARM (arXiv 2604.20861, section 2.4), with one request per descriptor. The judge reads the same evidence as
the miner and should be another model, because models prefer their own text. Stage `text_quality` is trained on the labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mmsid.annotate.caption import build_generator, is_small_captioner, picture_loader, print_summary, provenance
from mmsid.annotate.generator import Generator
from mmsid.annotate.job import annotate
from mmsid.annotate.job_config import ModelJobConfig
from mmsid.annotate.job_inputs import JobInput, Task
from mmsid.annotate.prompts import evidence_json, item_evidence, load_prompt
from mmsid.annotate.readers import ItemInterests, captions_of, interests_of
from mmsid.annotate.records import Judgement, parse_judgement
from mmsid.artifacts import read_manifest, writing
from mmsid.catalog import Item, read_catalog
from mmsid.errors import ConfigError


class JudgeConfig(ModelJobConfig):
    """Options of the judge stage.

    Attributes:
        model: a folder or hub id of a language model; the small captioners of mmsid cannot judge.
        interests: a finished `interests` folder, mined by a language model.
        captions: a finished `caption` folder. The judge reads captions, not pictures.
    """

    model: str | Path
    interests: Path
    captions: Path | None = None
    max_new_tokens: int = 16

    def inputs(self) -> dict[str, Path | None]:
        """As `ModelJobConfig.inputs`, the interests, and the captions."""
        return super().inputs() | {"interests": self.interests, "captions": self.captions}


def run(config: JudgeConfig, generator: Generator | None = None) -> Path:
    """Judge every descriptor into `config.out`, one row per descriptor; `generator` replaces the configured model.

    Column `creative` is the index of the descriptor among the item's descriptors, from 0. An item without usable interests gets one
    row that is quarantined as `no_interests`, which the error-rate gate does not count.

    Raises:
        AnnotationError: reason `gate`, when too many descriptors got no valid label (the draft keeps the rows, see `job.annotate`).
        ArtifactError: `interests` or `captions` is not a finished folder of its stage.
        ConfigError: the model cannot judge, the interests were mined from behaviour, or the prompt has no placeholder for evidence.
    """
    if generator is None and is_small_captioner(config.model):
        raise ConfigError(
            f"judge.model: {config.model} is a small captioner, which cannot judge texts; name a language model (folder or hub id)"
        )
    source = read_manifest(config.interests, "interests")["extra"].get("source")
    if source == "coengagement":
        raise ConfigError(
            f"judge.interests: {config.interests} was mined from co-engagement; such descriptors restate behaviour and have no evidence "
            "in the item's text. Mine interests with a language model, or leave `judge` out: the text quality is then 1 for every item"
        )
    prompt = load_prompt(config.prompt or "judge")
    if not prompt.wants_evidence:
        raise ConfigError(f"judge.prompt {prompt.name!r} has no placeholder {{{{evidence}}}}, so the model would see no evidence; add it")
    task = Task("judge", prompt, Judgement, parse_judgement, picture_loader(config))
    with writing(config.out, stage="judge", config=config, inputs=config.inputs(), resume=True) as draft:
        catalog = read_catalog(config.catalog)
        task = replace(task, integer_ids=catalog.integer_ids)
        captions, interests = captions_of(catalog, config.captions), interests_of(catalog, config.interests)
        inputs = [one for item in catalog.items for one in _job_inputs(item, interests, captions)]
        generator = generator or build_generator(config, Judgement)
        annotate(inputs, len(inputs), task, generator, config, draft)
        draft.extra.update(catalog_sha256=catalog.sha256, **provenance(prompt, generator))
    print_summary("judge", draft, config.out)
    return config.out


def _job_inputs(item: Item, interests: Mapping[str, ItemInterests], captions: Mapping[str, str]) -> list[JobInput]:
    """One input per descriptor, in the order of the interests."""
    if item.item_id not in interests:
        return [JobInput(item.item_id, reason="no_interests")]
    text = item_evidence(item, captions.get(item.item_id, ""))
    if not any(text.values()):
        return [JobInput(item.item_id, reason="no_evidence")]
    found = interests[item.item_id].descriptors
    return [JobInput(item.item_id, at, evidence=evidence_json(**text, descriptor=one.descriptor)) for at, one in enumerate(found)]
