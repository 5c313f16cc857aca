"""`mmsid bench`: screen every arm at one seed, tune it on valid, run the selected arms at all seeds, and write one result table.

Screening runs all trials of every arm at the first seed. The best trial on valid is used at the other seeds. Arms close to the best of
their family on valid, claimed arms and baselines get all seeds. Finished jobs are kept between calls. A failed job is reported and the
others continue. Jobs that do not fit the time budget are listed as not run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from mmsid._version import __version__
from mmsid.artifacts import is_complete, plain, read_manifest, write_json
from mmsid.config import Section
from mmsid.errors import ConfigError, MmsidError
from mmsid.progress import done, track
from mmsid.progress_bar import console
from mmsid.recommend.bench.config import DatasetConfig, SuiteConfig
from mmsid.recommend.bench.jobs import Bench, Prepare, Refiners
from mmsid.recommend.bench.plan import Arm, BenchJob, Plan
from mmsid.recommend.bench.pool import Outcome, Pool
from mmsid.recommend.bench.results import collect, not_run
from mmsid.recommend.bench.selection import SELECTED_BY, Choice, select
from mmsid.recommend.bench.tables import bench_table
from mmsid.recommend.evaluate import Part
from mmsid.recommend.result_rows import dataset_facts


class BenchOptions(Section):
    """Options of one call of `mmsid bench`.

    Attributes:
        suite_name: folder name of the jobs.
        only: arms whose jobs run in this call; the tables list all arms with finished jobs.
        stage: `screen` stops after the first seed.
        part: `valid` reads no test ranks and writes `<dataset>.valid.json` and `.md`; `test` reads both parts.
        results: replaces the results folder of the suite.
        runs: folder of all runs.
    """

    suite_name: str
    only: tuple[str, ...] = ()
    stage: Literal["screen", "full"] = "full"
    part: Literal["valid", "test"] = "test"
    results: Path | None = None
    runs: Path = Path("runs")


@dataclass
class _CallState:
    """Outcomes of the jobs of one call, and durations of finished fits."""

    budget_minutes: float
    workers: int
    since: float = field(default_factory=time.monotonic)
    fit_seconds: list[float] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)
    not_started: list[Outcome] = field(default_factory=list)

    @property
    def minutes(self) -> float:
        """Wall time of this call so far."""
        return (time.monotonic() - self.since) / 60

    def may_start(self) -> bool:
        """True if one more fit of mean duration would end within the budget."""
        mean_seconds = float(np.mean(self.fit_seconds)) if self.fit_seconds else 0.0
        return self.minutes + mean_seconds / 60 <= self.budget_minutes

    def record(self, outcome: Outcome, remaining: int) -> None:
        """Record an outcome. Prints errors, and an estimate of the remaining time after the first fit."""
        if outcome.error is not None:
            (self.failed if outcome.started else self.not_started).append(outcome)
            if outcome.started:
                _print(f"{_label(outcome.job)} failed: {outcome.error}")
        elif outcome.job.kind == "fit":
            self.fit_seconds.append(outcome.seconds)
            if len(self.fit_seconds) == 1:
                minutes = remaining * outcome.seconds / self.workers / 60
                _print(
                    f"the first recommender took {outcome.seconds:.0f} s; at this rate, the remaining {remaining} jobs of this stage take "
                    f"{minutes:.0f} minutes on {self.workers} processes; budget {self.budget_minutes:g} minutes, {self.minutes:.0f} used"
                )


def run(dataset: DatasetConfig, suite: SuiteConfig, options: BenchOptions, refine: Refiners | None = None) -> Path:
    """Run the jobs of a suite within its time budget and write the result table. Returns the path of the JSON file.

    Args:
        refine: control -> function that makes the arms of kind `refine`; passed in, because `recommend` does not import `refine`.

    Raises:
        ConfigError: `only` has an unknown arm, the data set has no user to rank, or the configuration of the catalogue is invalid.
        MmsidError: a job failed; raised at the end, after all results are written. The message lists all failed jobs.
    """
    work = options.runs / "bench" / dataset.name / options.suite_name
    bench = Bench(dataset, work / "inputs", refine)
    if not len(bench.split.users("valid")) or not len(bench.split.users("test")):
        raise ConfigError(
            f"bench: {dataset.name} has no user with a valid and a test item; give catalog.sequences or events with histories of "
            "3 items or more"
        )
    plan = Plan(dataset, suite, bench.catalog.sha256, work)
    arms = _selected_arms(plan, options.only)
    _check_controls(arms, refine or {})
    if any(arm.config.sids is not None and arm.config.sids.method not in ("random", "category_path") for arm in arms):
        _ = bench.sources.text  # computed once and cached on disk for all processes
    state = _CallState(suite.budget_minutes, suite.jobs or os.cpu_count() or 1)
    first, *others = suite.seeds
    with Pool(Prepare(dataset, work / "inputs", refine), state.workers, work / "logs") as pool:
        classical, with_sids = plan.classical(), [arm for arm in arms if arm.config.kind != "sasrec"]
        needs_classical = classical is not None and (not options.only or classical.arm.name in options.only or any(map(plan.fusion, arms)))
        jobs = [classical] if needs_classical else []
        jobs += [job for arm in with_sids for job in plan.sid_jobs(arm, first)]
        jobs += [plan.fit(arm, trial, first) for trial in range(len(suite.trials)) for arm in arms]
        _run_jobs(pool, jobs, state, "screen")
        choice = select(plan)
        if options.stage == "full":
            jobs = []
            for seed in others:
                jobs += [job for arm in with_sids if arm.name in choice.finalists for job in plan.sid_jobs(arm, seed)]
                jobs += [plan.fit(arm, choice.trials[arm.name], seed) for arm in arms if arm.name in choice.finalists]
            _run_jobs(pool, jobs, state, "all seeds")
    path = _write(plan, options, bench, choice, state)
    if state.failed:
        errors = "; ".join(f"{_label(outcome.job)}: {outcome.error}" for outcome in state.failed)
        raise MmsidError(f"bench: {len(state.failed)} jobs failed (the results of the others are in {path}): {errors}")
    return path


def _selected_arms(plan: Plan, only: Sequence[str]) -> list[Arm]:
    """The arms listed in `only`, by their name or that of their entry in the suite; all arms if `only` is empty."""
    arms, classical = plan.arms(), plan.classical()
    names = {arm.name: {arm.entry, *(row.name for row in plan.rows(arm))} for arm in arms}
    known = set().union(*names.values()) | ({classical.arm.name} if classical else set())
    for name in only:
        if name not in known:
            raise ConfigError(
                f"bench --only: {name!r} is not an arm of this suite on {plan.dataset.name}; the arms are {', '.join(sorted(known))}"
            )
    return [arm for arm in arms if not only or names[arm.name] & set(only)]


def _check_controls(arms: Sequence[Arm], refine: Refiners) -> None:
    for arm in arms:
        if arm.config.refine is not None and arm.config.refine.control not in refine:
            raise ConfigError(
                f"bench: arms.{arm.name}.refine.control is {arm.config.refine.control!r}, known here: {', '.join(refine) or 'none'}; "
                "control variants of refinement run with `python benchmarks/refinement.py`"
            )


def _run_jobs(pool: Pool, jobs: Sequence[BenchJob], state: _CallState, stage: str) -> None:
    """Run the unfinished jobs with a progress bar."""
    jobs = {job.key: job for job in jobs}
    finished = {folder for job in jobs.values() for folder in (job.key, *job.needs) if is_complete(folder)}
    left = [job for job in jobs.values() if job.key not in finished]
    if len(left) < len(jobs):
        _print(f"{stage}: {len(jobs) - len(left)} jobs were finished earlier, {len(left)} to run")
    if not left:
        return
    note: dict[str, object] = {}
    outcomes = pool.run(left, finished, state.may_start)
    for index, outcome in enumerate(track(outcomes, what=f"bench: {stage}", total=len(left), unit="jobs", note=note)):
        state.record(outcome, len(left) - index - 1)
        note["last"] = outcome.job.arm.name


def _write(plan: Plan, options: BenchOptions, bench: Bench, choice: Choice, state: _CallState) -> Path:
    """Write the JSON and Markdown tables of all finished jobs."""
    parts: tuple[Part, ...] = ("valid",) if options.part == "valid" else ("valid", "test")
    rows, differences = collect(plan, choice.trials, parts)
    suite = plan.suite
    dataset = {"name": plan.dataset.name, **dataset_facts(bench.catalog, bench.split), "split": plain(plan.dataset.catalog.split)}
    dataset["suite"] = {
        "name": options.suite_name,
        "package_version": __version__,
        "selected_by": f"valid {SELECTED_BY}",
        **plain(suite.model_dump(mode="json", include={"seeds", "claims", "baselines", "within", "trials", "model", "schedule"})),
    }
    dataset["compute"] = {
        "processes": state.workers,
        "threads_per_process": 1,
        "budget_minutes": suite.budget_minutes,
        "minutes_of_last_call": round(state.minutes, 1),
        "core_minutes_of_all_jobs": round(_job_seconds(plan.work) / 60, 1),
    }
    reasons = {outcome.job.arm.name: outcome.error or "" for outcome in (*state.not_started, *state.failed)}
    dataset["not_run"] = not_run(plan, choice, rows, reasons)
    written = {"dataset": dataset, "arms": rows, "differences": differences}
    folder = options.results or suite.results
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{plan.dataset.name}.valid" if options.part == "valid" else plan.dataset.name
    write_json(folder / f"{name}.json", written)
    (folder / f"{name}.md").write_text(bench_table(written), encoding="utf-8")
    done(f"bench: wrote {len(rows)} arms of {plan.dataset.name} ({len(dataset['not_run'])} not run) to {folder / name}.md and .json")
    return folder / f"{name}.json"


def _job_seconds(work: Path) -> float:
    """Wall seconds of all finished jobs of a suite; each runs on one thread."""
    return sum(read_manifest(path.parent)["wall_seconds"] for path in (work / "jobs").glob("*/*/manifest.json"))


def _label(job: BenchJob) -> str:
    trial = "" if job.trial is None else f", trial {job.trial}"
    return f"{job.arm.name} ({job.kind}, seed {job.seed}{trial})"


def _print(line: str) -> None:
    console.print(f"bench: {line}", markup=False, soft_wrap=True)
