"""The stages of the pipeline: their order, their configurations, and how one run connects them.

A stage is `run(config) -> folder`. A run is one YAML with a section per stage. Stage modules are imported on first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mmsid.artifacts import is_complete, restore, rewriting
from mmsid.config import Section, StageConfig, build
from mmsid.errors import ArtifactError, ConfigError
from mmsid.progress import done, is_main_process

# stage -> its configuration class and its function, in the order in which a run executes them
_STAGES = {
    "ingest": ("mmsid.catalog.ingest.stage:IngestConfig", "mmsid.catalog.ingest.stage:run"),
    "train_captioner": ("mmsid.annotate.captioner.config:TrainCaptionerConfig", "mmsid.annotate.captioner.stage:run"),
    "caption": ("mmsid.annotate.caption:CaptionConfig", "mmsid.annotate.caption:run"),
    "interests": ("mmsid.annotate.interests:InterestsConfig", "mmsid.annotate.interests:run"),
    "judge": ("mmsid.annotate.judge:JudgeConfig", "mmsid.annotate.judge:run"),
    "text_quality": ("mmsid.annotate.quality.stage:TextQualityConfig", "mmsid.annotate.quality.stage:run"),
    "train_tokenizer": ("mmsid.tokenizer.train_config:TrainTokenizerConfig", "mmsid.tokenizer.train:run"),
    "assign": ("mmsid.tokenizer.assign:AssignConfig", "mmsid.tokenizer.assign:run"),
    "stability": ("mmsid.tokenizer.stability:StabilityConfig", "mmsid.tokenizer.stability:run"),
    "baselines": ("mmsid.tokenizer.baselines:BaselinesConfig", "mmsid.tokenizer.baselines:run"),
    "sid_reward": ("mmsid.refine.sid_reward:SidRewardConfig", "mmsid.refine.sid_reward:run"),
    "refine": ("mmsid.refine.config:RefineConfig", "mmsid.refine.stage:run"),
    "train_recommender": ("mmsid.recommend.train:TrainRecommenderConfig", "mmsid.recommend.train:run"),
    "train_recommender_rl": ("mmsid.recommend.reinforce:TrainRecommenderRLConfig", "mmsid.recommend.reinforce:run"),
    "recommend": ("mmsid.recommend.recommend:RecommendConfig", "mmsid.recommend.recommend:run"),
    "report": ("mmsid.report.summary:ReportConfig", "mmsid.report.summary:run"),
}
STAGES = tuple(_STAGES)
INGEST = STAGES[0]  # the only stage that reads the user's files; part of every run
_NEED_USERS = ("train_recommender", "train_recommender_rl")
_SHORTEST = 3  # interactions of a user with an item to train on, one to validate and one to test
ConfigT = TypeVar("ConfigT", bound=StageConfig)
ON_RAY = ("ingest", "caption", "interests", "assign", "recommend")  # stages that accept engine="ray"


class RunHeader(Section):
    """The keys at the top of a run's YAML that are not stages.

    Attributes:
        name: name of the run; its stages write to `runs`/`name`.
        runs: folder of all runs. Its `.cache` is shared by them.
        seed: random seed of all stages that do not set their own.
        catalog: the section `catalog`. Every stage reads it.
    """

    name: str
    runs: Path = Path("runs")
    seed: int = 0
    catalog: dict[str, Any]


def stage_configs(data: Mapping[str, Any], source: str) -> dict[str, StageConfig]:
    """Build one configuration per stage from a run's YAML, in run order.

    The catalogue, the seed and the folders of earlier stages are filled in where a section does not set them.

    Args:
        data: the YAML as read by `load_yaml`.
        source: file name for error messages.

    Raises:
        ConfigError: unknown section or key, wrong type, missing key. The message names key, file and remedy.
    """
    unknown = sorted(set(data) - set(STAGES) - set(RunHeader.model_fields))
    if unknown:
        known = ", ".join([*RunHeader.model_fields, *STAGES])
        raise ConfigError(f"{source}: unknown section {unknown[0]}; known sections: {known}")
    header = build(RunHeader, {key: value for key, value in data.items() if key not in STAGES}, source=source, section="")
    reads = bool(header.catalog)  # a captioner of drawn ads needs no catalogue
    if reads:
        build(_imported("mmsid.catalog.config:CatalogConfig"), header.catalog, source=source, section="catalog")
    sections = {stage: data.get(stage) or {} for stage in STAGES if stage in data or (stage == INGEST and reads)}
    folders = {stage: header.runs / header.name / stage for stage in sections}
    configs: dict[str, StageConfig] = {}
    for stage, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{source}: section {stage} is {section!r}, expected keys below it (or nothing for the defaults)")
        cls = config_class(stage)
        catalog = {"picture_cache": header.runs / ".cache" / "pictures", **header.catalog} if reads else {}
        if reads and stage != INGEST:
            catalog["ingested"] = folders[INGEST]
        filled = {"out": folders[stage], "seed": header.seed, "catalog": catalog, **_upstream(stage, folders, header, configs)}
        filled = {key: value for key, value in filled.items() if key in cls.model_fields and value is not None}
        configs[stage] = build(cls, {**filled, **section}, source=source, section=stage)
    return configs


def run_stages(configs: Mapping[str, StageConfig], redo: Sequence[str] = (), engine: str = "local") -> None:
    """Run every stage in order. Finished and unchanged folders are kept.

    Args:
        redo: stages that are run again, together with all later stages. A finished folder stays until the new one is complete.
        engine: "local" or "ray"; used by the stages in `ON_RAY`.

    Raises:
        ArtifactError: a finished folder was written with another configuration or other inputs.
        ConfigError: `redo` names a stage that `configs` lacks, or a recommender is to be trained on a catalogue without users. This is
            noticed before the first stage.
    """
    for stage in redo:
        if stage not in configs:
            raise ConfigError(f"--redo {stage}: the configuration has no such stage; it has {', '.join(configs)}")
    redone = False
    for stage, config in configs.items():
        redone = redone or stage in redo
        run = partial(_run_function(stage, config), **({"engine": engine} if stage in ON_RAY else {}))
        if redone:
            with rewriting(config.out):
                run(config)
        elif stage == INGEST:  # reads changed sources again by itself
            run(config)
        else:
            run_unless_finished(stage, config, run)
        if stage == INGEST:
            _refuse_without_users(configs)


def _refuse_without_users(configs: Mapping[str, StageConfig]) -> None:
    for stage in _NEED_USERS:
        if stage in configs and not is_complete(configs[stage].out):
            histories = _imported("mmsid.catalog.catalog:read_catalog")(configs[stage].catalog).histories
            longest = int(histories.lengths.max(initial=0))
            if longest < _SHORTEST:
                raise ConfigError(
                    f"{stage}: the catalogue has {len(histories):,} users, and the longest history has {longest} items; give "
                    f"catalog.sequences or events with histories of {_SHORTEST} items or more, or remove the section {stage}"
                )


def run_unless_finished(stage: str, config: ConfigT, run: Callable[[ConfigT], Any]) -> None:
    """Call `run(config)`, unless `config.out` was finished by the same configuration and inputs.

    Raises:
        ArtifactError: the folder was finished with other settings or other inputs.
    """
    if is_main_process():
        restore(config.out)
    if is_complete(config.out):
        _check_unchanged(stage, config)
        done(f"{stage}: finished earlier, kept ({config.out})")
    else:
        run(config)


def run_stage(stage: str, settings: Mapping[str, Any], engine: str = "local") -> Path:
    """Run one stage from the keys of its configuration section. Returns the folder written.

    Raises:
        ConfigError: a key is unknown, missing or of the wrong type.
        ArtifactError: the folder was finished with other settings or other inputs.
    """
    config = build(config_class(stage), dict(settings), source=f"mmsid stage {stage}", section=stage)
    run_stages({stage: config}, engine=engine)
    return config.out


def config_class(stage: str) -> type[StageConfig]:
    """Configuration class of a stage."""
    return _imported(_STAGES[stage][0])


def _run_function(stage: str, config: StageConfig) -> Callable[..., Path]:
    """The stage's function. Functions of packages that it may not import itself are passed to it."""
    run = _imported(_STAGES[stage][1])
    if stage == "refine":
        return partial(run, quick_recommender=_imported("mmsid.recommend.train:quick_recommender")(config.catalog))
    if stage == "stability":
        reannotate = _imported("mmsid.annotate.reannotate:reannotate")
        return partial(run, reannotate=partial(reannotate, config.captions, config.interests))
    return run


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _upstream(stage: str, folders: Mapping[str, Path], header: RunHeader, configs: Mapping[str, StageConfig]) -> dict[str, Any]:
    """Folders of earlier stages, by the configuration key that reads them. `configs`: those built so far."""
    variants = {method: folders["baselines"] / method for method in configs["baselines"].methods} if "baselines" in configs else {}
    if "assign" in configs:
        variants["ours"] = folders["assign"]
    if "refine" in configs:
        variants["ours_refined"] = folders["refine"] / "sids"
    behaviour = getattr(configs.get("train_tokenizer"), "behaviour", None)
    sids, recommender = folders.get("assign"), None
    if stage == "recommend" and "train_recommender" in configs:
        trained = configs["train_recommender"]
        sids, recommender = trained.variants.get(trained.kept_variant), trained.kept_recommender
    return {
        "model": folders.get("train_captioner") if stage == "caption" else None,
        "cache": header.runs / ".cache" / "annotations.sqlite",
        "captions": folders.get("caption"),
        "interests": folders.get("interests"),
        "judgements": folders.get("judge"),
        "text_quality": folders.get("text_quality"),
        "tokenizer": folders.get("train_tokenizer"),
        "sids": sids,
        "recommender": recommender,
        "behaviour": behaviour if stage != "train_tokenizer" and isinstance(behaviour, tuple) else None,
        "variants": variants if stage == "train_recommender" and variants else None,
        "run": header.runs / header.name,
    }


def _check_unchanged(stage: str, config: StageConfig) -> None:
    changed = _imported("mmsid.unchanged:changes")(stage, config)
    if changed:
        remedy = f"--redo {stage} writes it and all later stages again; another `name:` keeps both"
        if stage not in STAGES:
            remedy = "--redo writes it again; another --out keeps both"
        raise ArtifactError(f"{config.out} was finished with another configuration: {'; '.join(changed)}. {remedy}")
