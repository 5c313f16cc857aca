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
from typing import Any, Literal

import numpy as np

import mmsid
from mmsid.artifacts import is_complete, plain, read_manifest, write_json
from mmsid.catalog import Catalog, Split
from mmsid.config import Section
from mmsid.errors import ConfigError, MmsidError
from mmsid.progress import console, done, track
from mmsid.recommend.bench.config import DatasetConfig, SuiteConfig
from mmsid.recommend.bench.plan import Arm, BenchJob, Plan, choose_finalists, choose_trial
from mmsid.recommend.bench.pool import Outcome, Pool
from mmsid.recommend.bench.results import SELECTED_BY, collect, valid_figure
from mmsid.recommend.bench.tables import bench_table
from mmsid.recommend.bench.worker import Bench, Prepare
from mmsid.recommend.evaluate import Part
from mmsid.recommend.rows import dataset_facts


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
    finished: int = 0
    fit_seconds: list[float] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)
    unstarted: list[Outcome] = field(default_factory=list)

    @property
    def minutes(self) -> float:
        """Wall time of this call so far."""
        return (time.monotonic() - self.since) / 60

    def may_start(self) -> bool:
        """Whether one more fit of the usual length would end within the budget."""
        usual = float(np.mean(self.fit_seconds)) if self.fit_seconds else 0.0
        return self.minutes + usual / 60 <= self.budget_minutes

    def note(self, outcome: Outcome, remaining: int) -> None:
        """Take an outcome down; the first finished fit gives the estimate."""
        if outcome.error is not None:
            (self.failed if outcome.started or "needs" in outcome.error else self.unstarted).append(outcome)
            return
        self.finished += 1
        if outcome.job.kind == "fit":
            self.fit_seconds.append(outcome.seconds)
            if len(self.fit_seconds) == 1:
                minutes = remaining * outcome.seconds / self.workers / 60
                console.print(
                    f"bench: the first recommender took {outcome.seconds:.0f} s; the {remaining} jobs left of this stage at that rate on "
                    f"{self.workers} processes: {minutes:.0f} minutes, budget {self.budget_minutes:g} minutes, {self.minutes:.0f} spent",
                    soft_wrap=True,
                )


def run(dataset: DatasetConfig, suite: SuiteConfig, options: BenchOptions) -> Path:
    """Bring a suite as far as the budget goes and write its table; returns the JSON written.

    Raises:
        ConfigError: an arm of `only` is none, the data set has nobody to rank, and what is wrong with the catalogue's configuration.
        MmsidError: at the end, after everything is written, if a job failed; names each.
    """
    work = options.runs / "bench" / dataset.name / options.suite_name
    bench = Bench(dataset, work / "inputs")
    if not len(bench.split.users("valid")) or not len(bench.split.users("test")):
        raise ConfigError(f"bench: {dataset.name} has no user with a valid and a test item; give catalog.sequences of 3 items or more")
    plan = Plan(dataset, suite, bench.catalog.sha256, work)
    arms = _asked_for(plan, options.only)
    if any(arm.config.sids is not None and arm.config.sids.method not in ("random", "category_path") for arm in arms):
        _ = bench.sources.text  # embedded once, kept on disk for all processes
    ledger = _Ledger(suite.budget_minutes, suite.jobs or len(os.sched_getaffinity(0)))
    first, *others = suite.seeds
    with Pool(Prepare(dataset, work / "inputs"), ledger.workers, work / "logs") as pool:
        floors = plan.floors() if not options.only or set(options.only) & _floor_names(plan) else None
        jobs = [plan.sids(arm, first) for arm in arms]
        jobs += [plan.fit(arm, trial, first) for trial in range(len(suite.trials)) for arm in arms]
        _run_jobs(pool, [*([floors] if floors else []), *jobs], ledger, "screen")
        chosen, screened = _judge(plan)
        if options.stage == "full":
            always = {*suite.claims, *suite.baselines}
            finalists = choose_finalists(screened, suite.within, always)
            jobs = []
            for seed in others:
                for arm in (arm for arm in arms if arm.name in finalists):
                    jobs += [plan.sids(arm, seed), plan.fit(arm, chosen[arm.name], seed)]
            _run_jobs(pool, jobs, ledger, "all seeds")
    path = _write(plan, options, bench.catalog, bench.split, chosen, ledger)
    if ledger.failed:
        told = "; ".join(f"{_label(outcome.job)}: {outcome.error}" for outcome in ledger.failed)
        raise MmsidError(f"bench: {len(ledger.failed)} jobs failed, the others are in {path}. {told}")
    return path


def _asked_for(plan: Plan, only: Sequence[str]) -> list[Arm]:
    arms = plan.arms()
    groups = {arm.name: arm.name.removesuffix(f"_{arm.column}") for arm in arms}
    known = {*groups, *groups.values(), *_floor_names(plan)}
    for name in only:
        if name not in known:
            raise ConfigError(f"bench --only: {name!r} is no arm of this suite on {plan.dataset.name}; there are {', '.join(sorted(known))}")
    return [arm for arm in arms if not only or arm.name in only or groups[arm.name] in only]


def _floor_names(plan: Plan) -> set[str]:
    floors = plan.floors()
    return {floors.arm.name} if floors else set()


def _run_jobs(pool: Pool, jobs: Sequence[BenchJob], ledger: _Ledger, stage: str) -> None:
    """Those that are not finished yet, under one progress line."""
    finished = {job.key for job in jobs if is_complete(job.folder)}
    left = list({job.key: job for job in jobs if job.key not in finished}.values())
    if len(left) < len(jobs):
        console.print(f"bench: {stage}: {len(finished)} jobs were finished earlier, {len(left)} to run")
    if not left:
        return
    note: dict[str, object] = {}
    outcomes = pool.run(left, finished, ledger.may_start)
    for place, outcome in enumerate(track(outcomes, what=f"bench: {stage}", total=len(left), unit="jobs", note=note)):
        ledger.note(outcome, len(left) - place - 1)
        if outcome.error is not None and outcome.started:
            console.print(f"bench: {_label(outcome.job)} failed: {outcome.error}", markup=False, soft_wrap=True)
        note["last"] = _label(outcome.job)


def _judge(plan: Plan) -> tuple[dict[str, int], dict[str, float]]:
    """Arm -> best trial, and arm -> its valid figure, of every arm whose trials are all there; it is valid that decides."""
    chosen, screened = {}, {}
    for arm in plan.arms():
        fits = [plan.fit(arm, trial, plan.suite.seeds[0]) for trial in range(len(plan.suite.trials))]
        if all(is_complete(job.folder) for job in fits):
            valid = {job.trial: valid_figure(job) for job in fits}
            chosen[arm.name] = choose_trial(valid)
            screened[arm.name] = valid[chosen[arm.name]]
    return chosen, screened


def _write(plan: Plan, options: BenchOptions, catalog: Catalog, split: Split, chosen: dict[str, int], ledger: _Ledger) -> Path:
    parts: tuple[Part, ...] = ("valid",) if options.part == "valid" else ("valid", "test")
    rows, differences = collect(plan, chosen, parts)
    suite = plan.suite
    dataset = {"name": plan.dataset.name, **dataset_facts(catalog, split), "split": plain(plan.dataset.catalog.split)}
    dataset["suite"] = {
        "name": options.suite_name,
        "seeds": suite.seeds,
        "claims": suite.claims,
        "within": suite.within,
        "selected_by": f"valid {SELECTED_BY}",
        "trials": plain([trial.model_dump() for trial in suite.trials]),
        "model": plain(suite.model),
        "schedule": plain(suite.schedule),
        "package_version": mmsid.__version__,
    }
    dataset["compute"] = {
        "processes": ledger.workers,
        "threads_per_process": 1,
        "budget_minutes": suite.budget_minutes,
        "minutes_of_last_call": round(ledger.minutes, 1),
        "core_minutes_of_all_jobs": round(_core_seconds(plan.work) / 60, 1),
    }
    dataset["not_run"] = _not_run(plan, rows, chosen, ledger)
    folder = options.results or suite.results
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{plan.dataset.name}.valid" if options.part == "valid" else plan.dataset.name
    written = {"dataset": dataset, "arms": rows, "differences": differences}
    write_json(folder / f"{name}.json", written)
    (folder / f"{name}.md").write_text(bench_table(written), encoding="utf-8")
    done(f"bench: wrote {len(rows)} arms of {plan.dataset.name} ({len(dataset['not_run'])} not run) to {folder / name}.md and .json")
    return folder / f"{name}.json"


def _core_seconds(work: Path) -> float:
    """Wall seconds of every finished job, tokenizers trained for them included in their job; each ran on one thread."""
    manifests = (read_manifest(path.parent) for path in (work / "jobs").glob("*/*/manifest.json"))
    return sum(manifest["wall_seconds"] for manifest in manifests if manifest["stage"].startswith("bench_"))


def _not_run(plan: Plan, rows: list[dict[str, Any]], chosen: dict[str, int], ledger: _Ledger) -> list[dict[str, Any]]:
    """Arms without a row, and seeds that an arm was to get and lacks, each with its reason."""
    reasons: dict[str, str] = {}
    for outcome in (*ledger.unstarted, *ledger.failed):
        reasons[outcome.job.arm.name] = outcome.error or ""
    found = [{"arm": name, "reason": why} for name, why in plan.left_out().items()]
    there = {row["arm"]: row["seeds"] for row in rows}
    screened = {arm: valid for arm, valid in _judge(plan)[1].items() if arm in chosen}
    finalists = choose_finalists(screened, plan.suite.within, {*plan.suite.claims, *plan.suite.baselines})
    for arm in plan.arms():
        if arm.name not in there:
            found.append({"arm": arm.name, "reason": reasons.get(arm.name, "not asked for yet")})
        elif arm.name in finalists and len(there[arm.name]) < len(plan.suite.seeds):
            missing = [seed for seed in plan.suite.seeds if seed not in there[arm.name]]
            found.append({"arm": arm.name, "seeds": missing, "reason": reasons.get(arm.name, "not asked for yet")})
    return found


def _label(job: BenchJob) -> str:
    trial = "" if job.trial is None else f", trial {job.trial}"
    return f"{job.arm.name} ({job.kind}, seed {job.seed}{trial})"
