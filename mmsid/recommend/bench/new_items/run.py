"""`mmsid bench --suite new_items`: run the jobs of the new-item benchmark and update its result files.

Finished jobs are kept between calls. A failed job is reported and the others continue.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmsid.artifacts import is_complete, read_json, write_json, write_text
from mmsid.errors import CatalogError, ConfigError, MmsidError
from mmsid.progress import done, track
from mmsid.progress_bar import console
from mmsid.recommend.bench.config import DatasetConfig
from mmsid.recommend.bench.new_items.config import NewItemsSuite, Protocol
from mmsid.recommend.bench.new_items.jobs import NewItemBench, Peer, Prepare
from mmsid.recommend.bench.new_items.plan import Draw, NewItemJob
from mmsid.recommend.bench.new_items.results import entry_of, table_of
from mmsid.recommend.bench.pool import Outcome, Pool
from mmsid.recommend.bench.run import BenchOptions
from mmsid.tokenizer.inputs import read_mined_interests


def run_new_items(dataset: DatasetConfig, suite: NewItemsSuite, options: BenchOptions, peers: Mapping[str, Peer] | None = None) -> Path:
    """Run the jobs of the suite and write new_items.json and new_items.md. Returns the path of the JSON file.

    Args:
        options: stage `screen` runs the first draw only; `only` names methods.
        peers: name -> further method (`mmsid.recommend.bench.new_items.jobs.Peer`), added to those of the suite.

    Raises:
        ConfigError: an unknown name in `only`, `--part valid`, or interests that were mined from co-engagement.
        CatalogError: the data set supports none of the protocols.
        MmsidError: a job failed; raised at the end, after the results are written. The message lists all failed jobs.
    """
    if options.part == "valid":
        raise ConfigError("bench --part valid: the new-item benchmark ranks test users only; new items have no valid users")
    if any(mined.source != "llm" for mined in read_mined_interests(dataset.interests).values()):
        raise ConfigError(
            f"dataset.interests: {dataset.interests} was mined from co-engagement, which includes that of new items; leave it out"
        )
    work = options.runs / "bench" / dataset.name / options.suite_name
    bench = NewItemBench(dataset, suite, work, peers)
    draws, unsupported = _supported_draws(bench, suite)
    jobs = _jobs(bench, draws, options)
    if any(job.kind in ("cosine", "hybrid", "peer") or job.name == "balanced_rq_text" for job in jobs):
        _ = bench.sources.text  # computed once and cached on disk for all processes
    failed: list[Outcome] = []
    left = [job for job in jobs if not is_complete(job.folder)]
    if len(left) < len(jobs):
        _print(f"{len(jobs) - len(left)} jobs were finished earlier, {len(left)} to run")
    if left:
        with Pool(Prepare(dataset, suite, work, peers), suite.jobs or os.cpu_count() or 1, work / "logs") as pool:
            outcomes = pool.run(left, {job.key for job in jobs} - {job.key for job in left})
            note: dict[str, object] = {}
            for outcome in track(outcomes, what="bench: new items", total=len(left), unit="jobs", note=note):
                note["last"] = str(outcome.job)
                if outcome.error is not None:
                    failed.append(outcome)
                    _print(f"{outcome.job} failed: {outcome.error}")
    path = _write(bench, list(draws), options, failed)
    if unsupported:
        _print("; ".join(unsupported))
    if failed:
        errors = "; ".join(f"{outcome.job}: {outcome.error}" for outcome in failed)
        raise MmsidError(f"bench: {len(failed)} jobs failed (the results of the others are in {path}): {errors}")
    return path


def _supported_draws(bench: NewItemBench, suite: NewItemsSuite) -> tuple[dict[Protocol, list[Draw]], list[str]]:
    """Draws of each protocol that the catalogue supports, and the reasons why it does not support the others."""
    draws: dict[Protocol, list[Draw]] = {}
    unsupported = []
    for protocol in suite.protocols:
        try:
            for draw in bench.plan.draws(protocol):
                bench.world(draw)
            draws[protocol] = bench.plan.draws(protocol)
        except CatalogError as error:
            unsupported.append(f"protocol {protocol} was not run: {error}")
    if not draws:
        raise CatalogError(f"bench: {bench.dataset.name}: {'; '.join(unsupported)}")
    return draws, unsupported


def _jobs(bench: NewItemBench, draws: Mapping[Protocol, Sequence[Draw]], options: BenchOptions) -> list[NewItemJob]:
    """Jobs of the methods in `options.only` (all, if it is empty) in the draws of this call. Tokenizers first: they take longest."""
    known = {method for protocol in draws for method in bench.plan.methods(protocol)}
    for name in options.only:
        if name not in known:
            raise ConfigError(
                f"bench --only: {name!r} is not a method of this suite on {bench.dataset.name}; these are {', '.join(sorted(known))}"
            )
    found: dict[Path, NewItemJob] = {}
    for protocol, of_protocol in draws.items():
        methods = [method for method in bench.plan.methods(protocol) if not options.only or method in options.only]
        for draw in of_protocol[:1] if options.stage == "screen" else of_protocol:
            found |= {job.folder: job for job in bench.plan.jobs(draw, methods)}
    return list(found.values())


def _write(bench: NewItemBench, protocols: Sequence[Protocol], options: BenchOptions, failed: Sequence[Outcome]) -> Path:
    """Update the entries of this data set in new_items.json, and write the table of all data sets."""
    folder = options.results or bench.suite.results
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "new_items.json"
    written: dict[str, Any] = read_json(path) if path.is_file() else {"datasets": {}}
    errors = {f"{method} {outcome.job.draw}": outcome.error or "" for outcome in failed for method in outcome.job.methods}
    for protocol in protocols:
        entry = entry_of(bench.plan, protocol, bench.world, errors)
        if entry is not None:
            name = bench.dataset.name
            written["datasets"][name if protocol == "hidden" else f"{name} ({protocol})"] = entry
    write_json(path, written)
    write_text(folder / "new_items.md", table_of(written))
    done(f"bench: wrote the new-item results of {bench.dataset.name} to {folder / 'new_items'}.md and .json")
    return path


def _print(line: str) -> None:
    console.print(f"bench: {line}", markup=False, soft_wrap=True)
