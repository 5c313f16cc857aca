"""The `mmsid` command: it parses, wires the stages of one run together, and calls them. Nothing else.

mmsid run CONFIG [key=value ...] [--redo STAGE]      every stage of the configuration in order; continues where it stopped
mmsid STAGE --config CONFIG [key=value ...] [--redo] one stage; also `accelerate launch scripts/STAGE.py --config CONFIG`
                                                     caption, interests and assign: `--engine ray` works on a Ray cluster
mmsid assign --config CONFIG --append SIDS           the same, but the Semantic IDs in the folder SIDS stay as they are
mmsid report RUN [catalog.key=value ...]             write RUN/report.html; RUN is a run's folder, its YAML, or results of a benchmark
mmsid catalog --config CONFIG                        read the catalogue and describe it
mmsid demo-catalog OUT --items N --users M --seed S  draw the demo catalogue
mmsid churn OLD NEW [--out REPORT.json]              what changed between two SID folders
mmsid bundle OUT --tokenizer T --sids S              a tokenizer and its SIDs as one model folder, ready to upload
mmsid bench --dataset D --suite S [suite.key=value ...]  every name of a suite on a data set, one table; continues where it stopped
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmsid.artifacts import input_hashes, is_complete, plain, read_manifest, write_json
from mmsid.config import Section, StageConfig, build, load_yaml
from mmsid.errors import ArtifactError, ConfigError, MmsidError
from mmsid.progress import done

Stage = tuple[type[StageConfig], Callable[..., Path]]


def _load_stage(name: str) -> Stage:
    """The config class and the function of a stage; imported only when asked for, so that `mmsid --help` is quick."""
    if name == "train_captioner":
        from mmsid.annotate.captioner.config import TrainCaptionerConfig
        from mmsid.annotate.captioner.stage import run

        return TrainCaptionerConfig, run
    if name == "caption":
        from mmsid.annotate.caption import CaptionConfig, run

        return CaptionConfig, run
    if name == "interests":
        from mmsid.annotate.interests import InterestsConfig, run

        return InterestsConfig, run
    if name == "judge":
        from mmsid.annotate.judge import JudgeConfig, run

        return JudgeConfig, run
    if name == "text_quality":
        from mmsid.annotate.quality.stage import TextQualityConfig, run

        return TextQualityConfig, run
    if name == "train_tokenizer":
        from mmsid.tokenizer.train import run
        from mmsid.tokenizer.train_config import TrainTokenizerConfig

        return TrainTokenizerConfig, run
    if name == "assign":
        from mmsid.tokenizer.assign import AssignConfig, run

        return AssignConfig, run
    if name == "stability":
        from mmsid.tokenizer.stability import StabilityConfig, run

        return StabilityConfig, _with_annotators(run)
    if name == "baselines":
        from mmsid.tokenizer.baselines import BaselinesConfig, run

        return BaselinesConfig, run
    if name == "sid_reward":
        from mmsid.refine.sid_reward import SidRewardConfig, run

        return SidRewardConfig, run
    if name == "refine":
        from mmsid.refine.config import RefineConfig
        from mmsid.refine.stage import run

        return RefineConfig, _with_quick_recommender(run)
    if name == "train_recommender":
        from mmsid.recommend.train import TrainRecommenderConfig, run

        return TrainRecommenderConfig, run
    if name == "train_recommender_rl":
        from mmsid.recommend.reinforce import TrainRecommenderRLConfig, run

        return TrainRecommenderRLConfig, run
    from mmsid.report.summary import ReportConfig, run

    return ReportConfig, run


ON_RAY = ("caption", "interests", "assign")  # stages that can be handed to a Ray cluster
STAGES = (
    "train_captioner",
    "caption",
    "interests",
    "judge",
    "text_quality",
    "train_tokenizer",
    "assign",
    "stability",
    "baselines",
    "sid_reward",
    "refine",
    "train_recommender",
    "train_recommender_rl",
    "report",
)


class RunHeader(Section):
    """The keys at the top of a run's YAML that are not stages."""

    name: str
    runs: Path = Path("runs")
    seed: int = 0
    catalog: dict[str, Any]


def wire(data: dict[str, Any], source: str) -> dict[str, StageConfig]:
    """Turn a run's YAML into one config per stage, in run order.

    A section holds what a person chose; output folders, the catalogue, the seed and the folders of earlier stages are
    filled in here unless the section names others.

    Raises:
        ConfigError: unknown section or key, wrong type, missing key; names key, file and remedy.
    """
    unknown = sorted(set(data) - set(STAGES) - set(RunHeader.model_fields))
    if unknown:
        known = ", ".join([*RunHeader.model_fields, *STAGES])
        raise ConfigError(f"{source}: unknown section {unknown[0]}; known sections: {known}")
    header = build(RunHeader, {key: value for key, value in data.items() if key not in STAGES}, source=source, section="")
    sections = {stage: data[stage] or {} for stage in STAGES if stage in data}
    folder = {stage: header.runs / header.name / stage for stage in sections}
    configs = {}
    for stage, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{source}: section {stage} is {section!r}, expected keys below it (or nothing for the defaults)")
        cls, _ = _load_stage(stage)
        filled = {"out": folder[stage], "seed": header.seed, "catalog": header.catalog, **_upstream(stage, folder, header, configs)}
        filled = {key: value for key, value in filled.items() if key in cls.model_fields and value is not None}
        configs[stage] = build(cls, {**filled, **section}, source=source, section=stage)
    return configs


def _upstream(stage: str, folder: dict[str, Path], header: RunHeader, configs: dict[str, StageConfig]) -> dict[str, Any]:
    """Where a stage finds what earlier stages, whose `configs` are built already, write."""
    variants = {name: folder["baselines"] / name for name in configs["baselines"].methods} if "baselines" in configs else {}
    if "assign" in configs:
        variants["ours"] = folder["assign"]
    if "refine" in configs:
        variants["ours_refined"] = folder["refine"] / "sids"
    return {
        "model": folder.get("train_captioner") if stage == "caption" else None,
        "cache": header.runs / ".cache" / "annotations.sqlite",
        "captions": folder.get("caption"),
        "interests": folder.get("interests"),
        "judgements": folder.get("judge"),
        "text_quality": folder.get("text_quality"),
        "tokenizer": folder.get("train_tokenizer"),
        "sids": folder.get("assign"),
        "variants": variants if stage == "train_recommender" and variants else None,
        "run": header.runs / header.name,
    }


def run_stages(configs: dict[str, StageConfig], redo: Sequence[str] = (), engine: str = "local") -> None:
    """Run every stage in order, keeping those that are finished and unchanged. `engine`: where stages of `ON_RAY` work.

    Raises:
        ArtifactError: a finished folder was written with another configuration or other inputs.
    """
    for stage in redo:
        if stage not in configs:
            raise ConfigError(f"--redo {stage}: the configuration has no such stage; it has {', '.join(configs)}")
    redone = False
    for stage, config in configs.items():
        redone = redone or stage in redo
        if redone:
            shutil.rmtree(config.out, ignore_errors=True)
        if is_complete(config.out):
            _check_unchanged(stage, config)
            done(f"{stage}: finished earlier, kept ({config.out})")
            continue
        _load_stage(stage)[1](config, **({"engine": engine} if stage in ON_RAY else {}))


def _check_unchanged(stage: str, config: StageConfig) -> None:
    manifest = read_manifest(config.out, stage)
    was, now = manifest["config"], plain(config)
    changed = [f"{key} was {was.get(key)!r}, is {now.get(key)!r}" for key in sorted(set(was) | set(now)) if was.get(key) != now.get(key)]
    paths = {name: Path(path) for name, path in manifest["input_paths"].items()}
    hashes = input_hashes(paths)
    changed += [f"its input {name} ({paths[name]}) has changed" for name in paths if hashes[name] != manifest["inputs"][name]]
    if changed:
        remedy = f"--redo {stage} writes it (and what follows) again; another `name:` keeps both"
        raise ArtifactError(f"{config.out} was finished with another configuration: {'; '.join(changed)}. {remedy}")


def _with_quick_recommender(run: Callable[..., Path]) -> Callable[..., Path]:
    """Refinement may not import the recommender (rooms of one storey), so the gate's quick look at it is handed in."""

    def run_with(config: StageConfig) -> Path:
        from mmsid.recommend.train import quick_recommender

        return run(config, quick_recommender=quick_recommender(config.catalog))

    return run_with


def _with_annotators(run: Callable[..., Path]) -> Callable[..., Path]:
    """The tokenizer may not import annotation (rooms of one storey), so what captions changed pictures again is handed in."""

    def run_with(config: StageConfig) -> Path:
        from mmsid.annotate.reannotate import reannotate

        return run(config, reannotate=partial(reannotate, config.captions, config.interests))

    return run_with


def main_stage(stage: str, arguments: Sequence[str] | None = None) -> None:
    """What every script in `scripts/` calls: one stage from `--config CONFIG [key=value ...]`."""
    _guarded(lambda: _one_stage(stage, list(sys.argv[1:] if arguments is None else arguments)))


def _one_stage(stage: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"mmsid {stage}", description=f"Run the stage {stage} of a configuration.")
    parser.add_argument("--config", required=True, type=Path, help="YAML of the run; the section with the stage's name is used")
    parser.add_argument("--redo", action="store_true", help="write a finished folder again")
    if stage in ON_RAY:
        parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: in the actors of a Ray cluster (extra `ray`)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. train_tokenizer.steps=50")
    if stage == "assign":
        parser.add_argument("--append", metavar="SIDS", help="keep the Semantic IDs of this folder, give new items theirs (assign.append)")
    parsed = parser.parse_intermixed_args(arguments)
    append = [f"assign.append={parsed.append}"] if getattr(parsed, "append", None) else []
    data = load_yaml(parsed.config, [*parsed.overrides, *append])
    data.setdefault(stage, data.get("refine", {}) if stage == "sid_reward" else {})
    configs = wire(data, source=str(parsed.config))
    run_stages({stage: configs[stage]}, redo=[stage] if parsed.redo else [], engine=getattr(parsed, "engine", "local"))


def _run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mmsid run", description="Run all stages in order; continues where it stopped.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--redo", action="append", default=[], metavar="STAGE", help="write this stage and what follows again")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help=f"where {', '.join(ON_RAY)} work")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args(arguments)
    run_stages(wire(load_yaml(parsed.config, parsed.overrides), source=str(parsed.config)), redo=parsed.redo, engine=parsed.engine)


def _report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mmsid report", description="Write one HTML page about a run, or about a benchmark's results.")
    parser.add_argument("source", type=Path, metavar="RUN", help="folder of a run, YAML of a run, or results of a benchmark (.json)")
    parser.add_argument("overrides", nargs="*", metavar="catalog.key=value", help="where the run's catalogue lies now, if it was moved")
    parsed = parser.parse_args(arguments)
    source: Path = parsed.source
    if source.suffix in (".yaml", ".yml"):
        _one_stage("report", ["--config", str(source), *parsed.overrides])
        return
    from mmsid.report.page import write_results_page, write_run_page
    from mmsid.report.run_folder import catalog_of_run

    if source.suffix == ".json":
        out = write_results_page(source, source.with_suffix(".html"))
    else:
        out = write_run_page(source, catalog_of_run(source, parsed.overrides), source / "report.html")
    done(f"report: wrote {out} ({out.stat().st_size / 1e6:.1f} MB), open it in a browser")


def _catalog(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mmsid catalog", description="Read a catalogue and describe it.")
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args(arguments)
    from mmsid.catalog import CatalogConfig, describe, read_catalog, split_histories, summary

    data = load_yaml(parsed.config, parsed.overrides)
    config = build(CatalogConfig, data.get("catalog") or {}, source=str(parsed.config), section="catalog")
    catalog = read_catalog(config)
    print(summary(describe(catalog, split_histories(catalog, config.split))))


def _demo_catalog(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mmsid demo-catalog", description="Draw ads, and users whose best achievable HR is known.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, default=1200)
    parser.add_argument("--users", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args(arguments)
    from mmsid.catalog.demo import write_demo_catalog

    if is_complete(parsed.out):
        extra = read_manifest(parsed.out, "demo_catalog")["config"]
        if all(extra.get(key) == getattr(parsed, key) for key in ("items", "users", "seed")):
            done(f"demo-catalog: drawn earlier, kept ({parsed.out})")
            return
    write_demo_catalog(parsed.out, items=parsed.items, users=parsed.users, seed=parsed.seed)


def _churn(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mmsid churn", description="What changed between two SID folders of one catalogue.")
    parser.add_argument("old", type=Path, help="the published folder (or its sids.parquet)")
    parser.add_argument("new", type=Path)
    parser.add_argument("--out", type=Path, help="write the report as JSON too")
    parsed = parser.parse_args(arguments)
    from mmsid.sids import read_sid_folder
    from mmsid.sids.churn import churn_report, churn_table

    report = churn_report(read_sid_folder(parsed.old), read_sid_folder(parsed.new))
    print(churn_table(report), end="")
    if parsed.out is not None:
        write_json(parsed.out, report)


def _bundle(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mmsid bundle", description="Tokenizer and the Semantic IDs it published, as one model folder.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="runs/NAME/train_tokenizer, or runs/NAME/refine/tokenizer")
    parser.add_argument("--sids", type=Path, required=True, help="runs/NAME/assign, or runs/NAME/refine/sids")
    parsed = parser.parse_args(arguments)
    from mmsid.tokenizer.bundle import write_bundle

    write_bundle(parsed.tokenizer, parsed.sids, parsed.out)


def _bench(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mmsid bench", description="Run every name of a suite on a data set; continues where it stopped.")
    parser.add_argument("--dataset", required=True, help="a shipped data set (configs/bench/datasets), or a YAML of your own")
    parser.add_argument("--suite", required=True, help="a shipped suite (configs/bench/suites), or a YAML of your own")
    parser.add_argument(
        "--only", default="", metavar="ARM,ARM", help="run the jobs of these variants alone; the table holds all finished ones"
    )
    parser.add_argument("--stage", choices=("screen", "full"), default="full", help="screen: the first seed only")
    parser.add_argument("--part", choices=("valid", "test"), default="test", help="valid: test ranks are not opened")
    parser.add_argument("--results", type=Path, help="folder of the table; default: the suite's")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="jobs are kept below RUNS/bench/DATASET/SUITE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted, e.g. suite.seeds=[0] dataset.name=mine suite.jobs=2")
    parsed = parser.parse_intermixed_args(arguments)
    from mmsid.recommend.bench.config import load_dataset, load_suite
    from mmsid.recommend.bench.run import BenchOptions, run
    from mmsid.refine.controls import control_arm

    overrides: dict[str, list[str]] = {"dataset": [], "suite": []}
    for override in parsed.overrides:
        whose, _, rest = override.partition(".")
        if whose not in overrides:
            raise ConfigError(f"override {override!r} begins with neither `dataset.` nor `suite.`; say whose key it is")
        overrides[whose].append(rest)
    dataset, suite = load_dataset(parsed.dataset, overrides["dataset"]), load_suite(parsed.suite, overrides["suite"])
    only = tuple(name for name in parsed.only.split(",") if name)
    options = {"stage": parsed.stage, "part": parsed.part, "results": parsed.results, "runs": parsed.runs}
    run(dataset, suite, BenchOptions(suite_name=Path(parsed.suite).stem, only=only, **options), refine=control_arm)


def _guarded(action: Callable[[], None]) -> None:
    """Our own errors are told in one line with exit code 1; anything else is a bug and keeps its traceback."""
    try:
        action()
    except MmsidError as error:
        print(f"mmsid: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `mmsid` command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command == "run":
        _guarded(lambda: _run(rest))
    elif command == "catalog":
        _guarded(lambda: _catalog(rest))
    elif command == "demo-catalog":
        _guarded(lambda: _demo_catalog(rest))
    elif command == "churn":
        _guarded(lambda: _churn(rest))
    elif command == "bundle":
        _guarded(lambda: _bundle(rest))
    elif command == "bench":
        _guarded(lambda: _bench(rest))
    elif command == "report" and rest and not rest[0].startswith("-"):
        _guarded(lambda: _report(rest))
    elif command in STAGES:
        main_stage(command, rest)
    elif command in ("-h", "--help", "help"):
        print(f"{__doc__}\nstages: {', '.join(STAGES)}")
    else:
        print(
            f"mmsid: unknown command {command!r}; known: run, catalog, demo-catalog, churn, bundle, bench, {', '.join(STAGES)}",
            file=sys.stderr,
        )
        raise SystemExit(2)


if __name__ == "__main__":
    main()
