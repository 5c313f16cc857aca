"""`mmsid bench`: screen every arm at one seed, tune on valid, give the contenders all seeds, write one table.

Screening runs all trials of every arm at the first seed. The best trial on valid is kept for that arm's other seeds. Arms within a
share of the best of their family on valid, and those that the suite's claims and baselines name, get all seeds. Finished jobs are
kept between calls; a job that fails is reported and the others go on; what the budget leaves no time for is listed as not run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

import mmsid
from mmsid.artifacts import is_complete, plain, read_manifest, write_json
from mmsid.config import Section
from mmsid.errors import ConfigError, MmsidError
from mmsid.progress import console, done, track
from mmsid.recommend.bench.config import DatasetConfig, SuiteConfig
from mmsid.recommend.bench.jobs import Bench, Prepare, Refine
from mmsid.recommend.bench.plan import Arm, BenchJob, Plan
from mmsid.recommend.bench.pool import Outcome, Pool
from mmsid.recommend.bench.results import collect, not_run
from mmsid.recommend.bench.selection import SELECTED_BY, Choice, judge
from mmsid.recommend.bench.tables import bench_table
from mmsid.recommend.evaluate import Part
from mmsid.recommend.result_rows import dataset_facts


class BenchOptions(Section):
    """What one call does of a suite.

    Attributes:
        suite_name: names the folder of the jobs.
        only: arms whose jobs run now; the tables hold every arm that has finished jobs.
        stage: `screen` stops after the first seed.
        part: `valid` opens no test ranks and writes `<dataset>.valid.json` and `.md`; `test` reads both parts.
        results: instead of the suite's.
    """

    suite_name: str
    only: tuple[str, ...] = ()
    stage: Literal["screen", "full"] = "full"
    part: Literal["valid", "test"] = "test"
    results: Path | None = None
    runs: Path = Path("runs")


@dataclass
class _Ledger:
    """What a call has done: how jobs ended, and how long finished fits took."""

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
        """Whether one more fit of the usual length would end within the budget."""
        usual = float(np.mean(self.fit_seconds)) if self.fit_seconds else 0.0
        return self.minutes + usual / 60 <= self.budget_minutes

    def note(self, outcome: Outcome, remaining: int) -> None:
        """Take an outcome down, and tell of it what a person should know at once."""
        if outcome.error is not None:
            (self.failed if outcome.started else self.not_started).append(outcome)
            if outcome.started:
                _say(f"{_label(outcome.job)} failed: {outcome.error}")
        elif outcome.job.kind == "fit":
            self.fit_seconds.append(outcome.seconds)
            if len(self.fit_seconds) == 1:
                minutes = remaining * outcome.seconds / self.workers / 60
                _say(
                    f"the first recommender took {outcome.seconds:.0f} s; at that rate the {remaining} jobs left of this stage take "
                    f"{minutes:.0f} minutes on {self.workers} processes; budget {self.budget_minutes:g} minutes, {self.minutes:.0f} spent"
                )


def run(dataset: DatasetConfig, suite: SuiteConfig, options: BenchOptions, refine: Refine | None = None) -> Path:
    """Bring a suite as far as the budget goes and write its table; returns the JSON written.

    Args:
        refine: makes the arms of kind `refine`; handed in, because the rooms do not know each other.

    Raises:
        ConfigError: an arm of `only` is none, the data set has nobody to rank, and what is wrong with the catalogue's configuration.
        MmsidError: at the end, after everything is written, if a job failed; names each.
    """
    work = options.runs / "bench" / dataset.name / options.suite_name
    bench = Bench(dataset, work / "inputs", refine)
    if not len(bench.split.users("valid")) or not len(bench.split.users("test")):
        raise ConfigError(f"bench: {dataset.name} has no user with a valid and a test item; give catalog.sequences of 3 items or more")
    plan = Plan(dataset, suite, bench.catalog.sha256, work)
    arms = _asked_for(plan, options.only)
    if any(arm.config.sids is not None and arm.config.sids.method not in ("random", "category_path") for arm in arms):
        _ = bench.sources.text  # embedded once, kept on disk for all processes
    ledger = _Ledger(suite.budget_minutes, suite.jobs or os.cpu_count() or 1)
    first, *others = suite.seeds
    with Pool(Prepare(dataset, work / "inputs", refine), ledger.workers, work / "logs") as pool:
        classical, with_sids = plan.classical(), [arm for arm in arms if arm.config.kind != "sasrec"]
        wanted = classical is not None and (not options.only or classical.arm.name in options.only or any(map(plan.fusion, arms)))
        jobs = [classical] if wanted else []
        jobs += [job for arm in with_sids for job in plan.sid_jobs(arm, first)]
        jobs += [plan.fit(arm, trial, first) for trial in range(len(suite.trials)) for arm in arms]
        _run_jobs(pool, jobs, ledger, "screen")
        choice = judge(plan)
        if options.stage == "full":
            jobs = []
            for seed in others:
                jobs += [job for arm in with_sids if arm.name in choice.finalists for job in plan.sid_jobs(arm, seed)]
                jobs += [plan.fit(arm, choice.trials[arm.name], seed) for arm in arms if arm.name in choice.finalists]
            _run_jobs(pool, jobs, ledger, "all seeds")
    path = _write(plan, options, bench, choice, ledger)
    if ledger.failed:
        told = "; ".join(f"{_label(outcome.job)}: {outcome.error}" for outcome in ledger.failed)
        raise MmsidError(f"bench: {len(ledger.failed)} jobs failed (all the others are in {path}): {told}")
    return path


def _asked_for(plan: Plan, only: Sequence[str]) -> list[Arm]:
    """The arms of `only`, by their own name or that of their entry in the suite; all where nothing is asked for."""
    arms, classical = plan.arms(), plan.classical()
    names = {arm.name: {arm.entry, *(row.name for row in plan.rows(arm))} for arm in arms}
    known = set().union(*names.values()) | ({classical.arm.name} if classical else set())
    for name in only:
        if name not in known:
            raise ConfigError(
                f"bench --only: {name!r} is no arm of this suite on {plan.dataset.name}; there are {', '.join(sorted(known))}"
            )
    return [arm for arm in arms if not only or names[arm.name] & set(only)]


def _run_jobs(pool: Pool, jobs: Sequence[BenchJob], ledger: _Ledger, stage: str) -> None:
    """Those that are not finished yet, under one progress line."""
    jobs = {job.key: job for job in jobs}
    finished = {folder for job in jobs.values() for folder in (job.key, *job.needs) if is_complete(folder)}
    left = [job for job in jobs.values() if job.key not in finished]
    if len(left) < len(jobs):
        _say(f"{stage}: {len(jobs) - len(left)} jobs were finished earlier, {len(left)} to run")
    if not left:
        return
    note: dict[str, object] = {}
    outcomes = pool.run(left, finished, ledger.may_start)
    for place, outcome in enumerate(track(outcomes, what=f"bench: {stage}", total=len(left), unit="jobs", note=note)):
        ledger.note(outcome, len(left) - place - 1)
        note["last"] = outcome.job.arm.name


def _write(plan: Plan, options: BenchOptions, bench: Bench, choice: Choice, ledger: _Ledger) -> Path:
    """The JSON and the Markdown table of all finished jobs."""
    parts: tuple[Part, ...] = ("valid",) if options.part == "valid" else ("valid", "test")
    rows, differences = collect(plan, choice.trials, parts)
    suite = plan.suite
    dataset = {"name": plan.dataset.name, **dataset_facts(bench.catalog, bench.split), "split": plain(plan.dataset.catalog.split)}
    dataset["suite"] = {
        "name": options.suite_name,
        "package_version": mmsid.__version__,
        "selected_by": f"valid {SELECTED_BY}",
        **plain(suite.model_dump(mode="json", include={"seeds", "claims", "baselines", "within", "trials", "model", "schedule"})),
    }
    dataset["compute"] = {
        "processes": ledger.workers,
        "threads_per_process": 1,
        "budget_minutes": suite.budget_minutes,
        "minutes_of_last_call": round(ledger.minutes, 1),
        "core_minutes_of_all_jobs": round(_job_seconds(plan.work) / 60, 1),
    }
    why = {outcome.job.arm.name: outcome.error or "" for outcome in (*ledger.not_started, *ledger.failed)}
    dataset["not_run"] = not_run(plan, choice, rows, why)
    written = {"dataset": dataset, "arms": rows, "differences": differences}
    folder = options.results or suite.results
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{plan.dataset.name}.valid" if options.part == "valid" else plan.dataset.name
    write_json(folder / f"{name}.json", written)
    (folder / f"{name}.md").write_text(bench_table(written), encoding="utf-8")
    done(f"bench: wrote {len(rows)} arms of {plan.dataset.name} ({len(dataset['not_run'])} not run) to {folder / name}.md and .json")
    return folder / f"{name}.json"


def _job_seconds(work: Path) -> float:
    """Wall seconds of every finished job of a suite; each ran on one thread."""
    return sum(read_manifest(path.parent)["wall_seconds"] for path in (work / "jobs").glob("*/*/manifest.json"))


def _label(job: BenchJob) -> str:
    trial = "" if job.trial is None else f", trial {job.trial}"
    return f"{job.arm.name} ({job.kind}, seed {job.seed}{trial})"


def _say(line: str) -> None:
    console.print(f"bench: {line}", markup=False, soft_wrap=True)
