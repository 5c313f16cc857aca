"""`mmsid bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmsid.errors import ConfigError


def bench(
    arguments: list[str],
    refiners: Mapping[str, Callable[[dict[str, Any]], Path]] | None = None,
    peers: Mapping[str, Callable[..., Any]] | None = None,
) -> None:
    """Compare the methods of a suite on a data set."""
    parser = argparse.ArgumentParser(prog="mmsid bench", description="Compare the methods of a suite on a data set. A second call resumes.")
    parser.add_argument("--dataset", required=True, help="name of a shipped data set (configs/bench/datasets), or a YAML file")
    parser.add_argument("--suite", required=True, help="name of a shipped suite (configs/bench/suites), or a YAML file")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="run only these methods; the table lists all finished ones")
    parser.add_argument("--stage", choices=("screen", "full"), default="full", help="screen: the first seed (or draw) only")
    parser.add_argument("--part", choices=("valid", "test"), default="test", help="valid: test ranks stay unread")
    parser.add_argument("--results", type=Path, help="folder of the table; default: the one named in the suite")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="jobs are stored below RUNS/bench/DATASET/SUITE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. suite.seeds=[0] dataset.name=mine")
    parsed = parser.parse_intermixed_args(arguments)
    from mmsid.recommend.bench.files import load_dataset, load_suite
    from mmsid.recommend.bench.new_items.config import NewItemsSuite
    from mmsid.recommend.bench.new_items.run import run_new_items
    from mmsid.recommend.bench.run import BenchOptions, run
    from mmsid.refine.ungated import refine_ungated

    overrides: dict[str, list[str]] = {"dataset": [], "suite": []}
    for override in parsed.overrides:
        whose, _, rest = override.partition(".")
        if whose not in overrides:
            raise ConfigError(f"override {override!r} begins with neither `dataset.` nor `suite.`; prefix the key with one of them")
        overrides[whose].append(rest)
    dataset, suite = load_dataset(parsed.dataset, overrides["dataset"]), load_suite(parsed.suite, overrides["suite"])
    only = tuple(name for name in parsed.only.split(",") if name)
    options = BenchOptions(
        suite_name=Path(parsed.suite).stem, only=only, stage=parsed.stage, part=parsed.part, results=parsed.results, runs=parsed.runs
    )
    if isinstance(suite, NewItemsSuite):
        run_new_items(dataset, suite, options, peers)
    else:
        run(dataset, suite, options, refine=refiners or {"ppo": refine_ungated})
