"""`mmsid STAGE`, `mmsid run` and `mmsid report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsid.config import load_yaml
from mmsid.progress import done
from mmsid.stages import INGEST, ON_RAY, run_stages, stage_configs


def one_stage(stage: str, arguments: list[str]) -> None:
    """One stage, from the arguments `--config CONFIG [key=value ...]`."""
    parser = argparse.ArgumentParser(prog=f"mmsid {stage}", description=f"Run the stage {stage} of a configuration.")
    parser.add_argument("--config", required=True, type=Path, help="YAML of the run")
    parser.add_argument("--redo", action="store_true", help="write a finished folder again; the old one stays until then")
    if stage in ON_RAY:
        parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: run on a Ray cluster (extra `ray`)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. train_tokenizer.steps=50")
    if stage == "assign":
        parser.add_argument("--append", metavar="SIDS", help="SID folder whose published codes stay (assign.append)")
        parser.add_argument("--refresh", action="store_true", help="move published items whose behaviour has become sure (assign.refresh)")
    if stage == "recommend":
        parser.add_argument("--users", metavar="FILE", help="table of users and histories; default: all users of the catalogue")
        parser.add_argument("--k", type=int, help="items per user (recommend.k)")
    parsed = parser.parse_intermixed_args(arguments)
    options = {name: getattr(parsed, name, None) for name in ("append", "refresh", "users", "k")}
    given = [f"{stage}.{name}={value}" for name, value in options.items() if value is not None and value is not False]
    data = load_yaml(parsed.config, [*parsed.overrides, *given])
    data.setdefault(stage, data.get("refine", {}) if stage == "sid_reward" else {})
    configs = stage_configs(data, source=str(parsed.config))
    chosen = {name: configs[name] for name in dict.fromkeys((INGEST, stage)) if name in configs}
    run_stages(chosen, redo=[stage] if parsed.redo else [], engine=getattr(parsed, "engine", "local"))


def run(arguments: list[str]) -> None:
    """Every stage of a configuration."""
    parser = argparse.ArgumentParser(prog="mmsid run", description="Run all stages in order. A second call resumes.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--redo", action="append", default=[], metavar="STAGE", help="run this stage and all later ones again")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help=f"engine of the stages {', '.join(ON_RAY)}")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args(arguments)
    run_stages(stage_configs(load_yaml(parsed.config, parsed.overrides), source=str(parsed.config)), redo=parsed.redo, engine=parsed.engine)


def report(arguments: list[str]) -> None:
    """The HTML report of a run or of benchmark results."""
    parser = argparse.ArgumentParser(prog="mmsid report", description="Write an HTML report of a run or of benchmark results.")
    parser.add_argument("source", type=Path, metavar="RUN", help="folder of a run, YAML of a run, or results of a benchmark (.json)")
    parser.add_argument("overrides", nargs="*", metavar="catalog.key=value", help="new location of the catalogue, if it was moved")
    parsed = parser.parse_args(arguments)
    source: Path = parsed.source
    if source.suffix in (".yaml", ".yml"):
        one_stage("report", ["--config", str(source), *parsed.overrides])
        return
    from mmsid.report.page import write_results_page, write_run_page
    from mmsid.report.run_folder import catalog_of_run

    if source.suffix == ".json":
        out = write_results_page(source, source.with_suffix(".html"))
    else:
        out = write_run_page(source, catalog_of_run(source, parsed.overrides), source / "report.html")
    done(f"report: wrote {out} ({out.stat().st_size / 1e6:.1f} MB), open it in a browser")


def ingested_catalog(path: Path, overrides: Sequence[str] = ()) -> Any:
    """Settings of the catalogue of a configuration, after its stage ingest."""
    configs = stage_configs({"name": path.stem, **load_yaml(path, overrides)}, source=str(path))
    run_stages({INGEST: configs[INGEST]})
    return configs[INGEST].catalog.model_copy(update={"ingested": configs[INGEST].out})
