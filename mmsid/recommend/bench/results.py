"""Results of finished jobs: one row per arm, figures of its SIDs, and differences between arms with their significance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmsid.artifacts import is_complete, read_json
from mmsid.recommend.bench.jobs import FIGURES, ranks_path
from mmsid.recommend.bench.plan import Arm, BenchJob, Plan
from mmsid.recommend.bench.selection import Choice
from mmsid.recommend.classical import CLASSICAL_NAMES
from mmsid.recommend.evaluate import Part
from mmsid.recommend.metrics import Ranks, over_seeds
from mmsid.recommend.result_rows import ReadRanks, best_achievable_row, difference_rows, read_ranks


def collect(plan: Plan, chosen: Mapping[str, int], parts: tuple[Part, ...]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and differences of all finished jobs: the chosen trial of every arm at every finished seed, and the classical baselines.

    Args:
        chosen: arm -> trial.
        parts: parts whose ranks are read; without `test`, files of test ranks are not opened.
    """
    rows, ranks = [], {part: {} for part in parts}
    classical = plan.classical()
    if classical is not None and is_complete(classical.folder):
        for name in CLASSICAL_NAMES:
            read = _read(classical.folder, name, parts)
            rows.append(_classical_row(classical, name, read))
            for part in parts:
                ranks[part][name] = {None: read[part].ranks}
    for arm in plan.arms():
        fits = [plan.fit(arm, chosen[arm.name], seed) for seed in plan.suite.seeds] if arm.name in chosen else []
        fits = [job for job in fits if is_complete(job.folder)]
        if not fits:
            continue
        for row in plan.rows(arm):
            read = [_read(job.folder, row.name, parts) for job in fits]
            rows.append(_arm_row(plan, row, fits, read))
            for part in parts:
                ranks[part][row.name] = {job.seed: one[part].ranks for job, one in zip(fits, read, strict=True)}
    if plan.dataset.best_achievable is not None:
        best_achievable = best_achievable_row(plan.dataset.best_achievable)
        rows.append(best_achievable if "test" in parts else best_achievable | {"metrics": {}})
    return rows, _differences(plan, ranks)


def not_run(plan: Plan, choice: Choice, rows: list[dict[str, Any]], reasons: Mapping[str, str]) -> list[dict[str, Any]]:
    """Arms of the suite without a row, and selected arms with missing seeds, each with the reason.

    Args:
        reasons: arm -> error of a job in this call.
    """
    found: list[dict[str, Any]] = [{"arm": name, "reason": reason} for name, reason in plan.left_out().items()]
    seeds = {row["arm"]: row["seeds"] for row in rows}
    classical = plan.classical()
    names = [classical.arm.name] if classical is not None and not is_complete(classical.folder) else []
    names += [row.name for arm in plan.arms() for row in plan.rows(arm)]
    for name in names:
        missing = [seed for seed in plan.suite.seeds if seed not in seeds.get(name, [])]
        if name not in seeds:
            found.append({"arm": name, "reason": reasons.get(name, "not requested in this call")})
        elif name in choice.finalists and missing:
            found.append({"arm": name, "seeds": missing, "reason": reasons.get(name, "not requested in this call")})
    return found


def _read(folder: Path, name: str, parts: tuple[Part, ...]) -> dict[Part, ReadRanks]:
    return {part: read_ranks(ranks_path(folder, name, part), part) for part in parts}


def _differences(plan: Plan, ranks: Mapping[Part, Mapping[str, Mapping[int | None, Ranks]]]) -> list[dict[str, Any]]:
    return [row for part, arms in ranks.items() for row in difference_rows(arms, plan.suite.baselines, part)]


def _figures(read: list[dict[Part, ReadRanks]]) -> dict[str, Any]:
    """`metrics` (test) and `valid`: mean and standard deviation over seeds; empty if the part was not read."""
    found = {}
    for part, key in (("test", "metrics"), ("valid", "valid")):
        found[key] = over_seeds([one[part].summary() for one in read]) if part in read[0] else {}
    return found


def _classical_row(job: BenchJob, name: str, read: dict[Part, ReadRanks]) -> dict[str, Any]:
    figures = read_json(job.folder / FIGURES)[name]
    row = {"arm": name, "family": "classical", "seeds": [], **_figures([read]), "collisions": None}
    return row | {"seconds": round(figures["seconds"], 2), "parameters": figures["parameters"], "varies": "nothing (deterministic)"}


def _arm_row(plan: Plan, arm: Arm, fits: list[BenchJob], read: list[dict[Part, ReadRanks]]) -> dict[str, Any]:
    """Row of a trained arm or its fusion. Figures of its SIDs are means over the tables of all seeds."""
    figures = [read_json(job.folder / FIGURES)[arm.name] for job in fits]
    row = {
        "arm": arm.name,
        "family": arm.family,
        "seeds": [job.seed for job in fits],
        **_figures(read),
        "collisions": None,
        "seconds": _mean([one["seconds"] for one in figures]),
        "epochs": _mean([one["epochs"] for one in figures]),
        "trial": plan.suite.trials[fits[0].trial].model_dump(),
        "varies": "recommender seed",
    }
    if arm.config.fusion is not None:
        return row | {"varies": f"as {arm.config.fusion}", "parameters": [one["parameters"] for one in figures]}
    return row if fits[0].sids is None else row | _sid_figures(arm, fits)


def _sid_figures(arm: Arm, fits: list[BenchJob]) -> dict[str, Any]:
    tables = [read_json(job.sids / FIGURES) for job in fits]
    lifts = [table["level_1_lift"] for table in tables]
    v_measures = [table["v_measure"] for table in tables]
    return {
        "collisions": _mean([table["collisions"] for table in tables]),
        "sid_seconds": _mean([table["seconds"] for table in tables]),
        "intrinsic": {
            "codebook_sizes": tables[0]["codebook_sizes"],
            "perplexity": [round(float(level), 2) for level in np.mean([table["perplexity"] for table in tables], axis=0)],
            "level_1_lift": None if None in lifts else _mean(lifts),
            "v_measure": None if None in v_measures else [round(float(level), 4) for level in np.mean(v_measures, axis=0)],
        },
        "varies": "tokenizer and recommender seed, paired"
        if arm.sids_seeded
        else "recommender seed (published SIDs have no tokenizer seed)",
    }


def _mean(values: list[float]) -> float | int:
    """Rounded mean; an integer if the values are integers with an integer mean."""
    mean = round(float(np.mean(values)), 2)
    return int(mean) if mean.is_integer() and all(isinstance(value, int) for value in values) else mean
