"""Stage `judge`: is each mined descriptor specific, usable and grounded in what is known of its item? 0 or 1, by a language model.

One request per descriptor, as in QARM (arXiv 2604.20861, section 2.4): a malformed answer costs one descriptor, and equal questions
are asked once. The judge sees what the miner saw, and should be another model than the miner: models like their own sentences.
The labels are what `text_quality` learns from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmsid.annotate.caption import closing_line, input_paths, model_of, picture_loader
from mmsid.annotate.generator import Generator
from mmsid.annotate.job import annotate
from mmsid.annotate.job_config import JobInput, ModelJobConfig, Task
from mmsid.annotate.prompts import evidence_json, load_prompt
from mmsid.annotate.readers import ItemInterests, read_captions, read_interests
from mmsid.annotate.records import Judgement, parse_judgement
from mmsid.artifacts import is_complete, read_manifest, writing
from mmsid.backbone.packaged_weights import DEMO
from mmsid.catalog import Item, read_catalog
from mmsid.errors import ConfigError
from mmsid.progress import done, is_main_process


class JudgeConfig(ModelJobConfig):
    """What to judge, and with which model.

    Attributes:
        model: a folder or hub id of a language model; the small captioners of mmsid cannot judge.
        interests: a finished `interests` folder, mined by a language model.
        captions: a finished `caption` folder; pictures reach the judge only through it.
    """

    model: str | Path
    interests: Path
    captions: Path | None = None
    max_new_tokens: int = 16


def run(config: JudgeConfig, generator: Generator | None = None) -> Path:
    """Judge every descriptor into `config.out`, one row each; `generator` replaces the configured model.

    A row's `creative` is the place of its descriptor among the item's, from 0. An item without usable interests gets one row,
    quarantined as `no_interests`, which the gate excuses.

    Raises:
        AnnotationError: reason `gate`, when too many descriptors got no valid label (the rows stay in the draft, see `job`).
        ArtifactError: `interests` or `captions` is not a finished folder of its stage.
        ConfigError: the model cannot judge, the interests were mined from behaviour, or the prompt has no place for the evidence.
    """
    if generator is None:
        _check_model(config.model)
    source = read_manifest(config.interests, "interests")["extra"].get("source")
    if source == "coengagement":
        raise ConfigError(
            f"judge.interests: {config.interests} was mined from co-engagement; such descriptors restate behaviour and have no evidence "
            "in the item's text. Mine interests with a language model, or leave `judge` out: the text quality is then 1 for every item"
        )
    prompt = load_prompt(config.prompt or "judge")
    if not prompt.wants_evidence:
        raise ConfigError(f"judge.prompt {prompt.name!r} has no place for the evidence, so it would judge nothing; add {{{{evidence}}}}")
    inputs = input_paths(config) | {"interests": config.interests}
    inputs |= {"captions": config.captions} if config.captions is not None else {}
    task = Task("judge", prompt, Judgement, parse_judgement, picture_loader(config))
    with writing(config.out, stage="judge", config=config, inputs=inputs, resume=True) as draft:
        catalog = read_catalog(config.catalog)
        captions = read_captions(config.captions) if config.captions is not None else {}
        interests = read_interests(config.interests)
        units = [unit for item in catalog.items for unit in _units(item, interests, captions)]
        annotate(units, len(units), task, generator or model_of(config, Judgement), config, draft)
        draft.extra.update(catalog_sha256=catalog.sha256, prompt=prompt.name, prompt_sha256=prompt.sha256)
    if is_main_process():
        done(closing_line("judge", draft, config.out))
    return config.out


def _units(item: Item, interests: Mapping[str, ItemInterests], captions: Mapping[str, str]) -> list[JobInput]:
    """One unit per descriptor, in the miner's order."""
    if item.item_id not in interests:
        return [JobInput(item.item_id, reason="no_interests")]
    text = {"title": item.title, "description": item.description, "caption": captions.get(item.item_id, "")}
    if not any(text.values()):
        return [JobInput(item.item_id, reason="no_evidence")]
    found = interests[item.item_id].descriptors
    return [JobInput(item.item_id, at, evidence=evidence_json(**text, descriptor=one.descriptor)) for at, one in enumerate(found)]


def _check_model(model: str | Path) -> None:
    ours = str(model) == DEMO or (is_complete(Path(model)) and read_manifest(Path(model))["stage"] == "train_captioner")
    if ours:
        raise ConfigError(f"judge.model: {model} only reads drawn pictures aloud; name a language model (a folder or a hub id)")
