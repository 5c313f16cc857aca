"""Selection on valid: the trial of each arm, and the arms that get all seeds (finalists)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from mmsid.artifacts import is_complete, read_json
from mmsid.recommend.bench.jobs import FIGURES
from mmsid.recommend.bench.plan import Plan

SELECTED_BY = "NDCG@10"


class Choice(NamedTuple):
    """Result of the selection.

    Attributes:
        trials: arm -> best trial, for arms whose trials are all finished.
        finalists: arms that get all seeds.
    """

    trials: dict[str, int]
    finalists: set[str]


def select(plan: Plan) -> Choice:
    """Select trials and finalists by the valid figures of all finished screening jobs. A fusion has the trial and seeds of its arm."""
    trials: dict[str, int] = {}
    screened: dict[str, dict[str, float]] = {}
    for arm in plan.arms():
        fits = [plan.fit(arm, trial, plan.suite.seeds[0]) for trial in range(len(plan.suite.trials))]
        if not all(is_complete(job.folder) for job in fits):
            continue
        figures = [read_json(job.folder / FIGURES) for job in fits]
        trials[arm.name] = choose_trial(
            {job.trial: found[arm.name]["valid"][SELECTED_BY] for job, found in zip(fits, figures, strict=True)}
        )
        for row in plan.rows(arm):
            screened.setdefault(row.family, {})[row.name] = figures[trials[arm.name]][row.name]["valid"][SELECTED_BY]
    always = {*plan.suite.claims, *plan.suite.baselines}
    selected = {name for family in screened.values() for name in choose_finalists(family, plan.suite.within, always)}
    rows = [[row.name for row in plan.rows(arm)] for arm in plan.arms()]
    return Choice(trials, {name for names in rows for name in names if selected & set(names)})


def choose_trial(valid: Mapping[int, float]) -> int:
    """The trial with the best valid figure; ties go to the first trial of the suite."""
    return min(valid, key=lambda trial: (-valid[trial], trial))


def choose_finalists(screened: Mapping[str, float], within: float, always: Collection[str]) -> list[str]:
    """Arms of one family within the share `within` of the best valid figure, or listed in `always`, in the given order."""
    best = max(screened.values(), default=0.0)
    return [arm for arm, value in screened.items() if value >= (1 - within) * best or arm in always]
