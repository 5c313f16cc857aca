"""Positions of the marks of the report's charts: metrics with error bars, differences with intervals, gate figures with margins.

The page draws each row as a label, an inline SVG strip and a figure. Positions are percentages of the strip's width, so that text keeps its
size on narrow screens. No chart library is used, because its script would add megabytes and external addresses to every page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FIRST_METRICS = ("NDCG@10", "HR@10", "HR@50", "NDCG@5", "HR@1", "HR@5", "HR@20")
SINGLE_SEED_NOTE = (
    "One seed on this machine: another processor changes these figures by more than many of the differences shown; "
    "run several seeds before you compare."
)


@dataclass(frozen=True)
class Mark:
    """One row of a chart.

    Attributes:
        label: name of the method.
        family: CSS class of the row's colour.
        low, mean, high: positions in percent of the strip. There is no error bar when low == high.
        text: the figure as text.
    """

    label: str
    family: str
    low: float
    mean: float
    high: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Rows with a common axis.

    Attributes:
        metric: name of the metric.
        marks: the rows.
        ticks: (position in percent, label) of each tick.
        zero: position of 0 in percent, or None when it is the left end.
    """

    metric: str
    marks: list[Mark]
    ticks: list[tuple[float, str]]
    zero: float | None = None


@dataclass(frozen=True)
class GateMark:
    """One figure of the acceptance gate.

    Attributes:
        metric: name of the figure.
        before, after, margin: values as text.
        passed: whether the figure keeps its margin.
        change: position of the change in percent of the strip. Values above 50 are better.
        limit: position of the largest allowed loss in percent of the strip.
        source: how the margin is computed.
    """

    metric: str
    before: str
    after: str
    margin: str
    passed: bool
    change: float
    limit: float
    source: str


def metric_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All metrics of the rows: those of FIRST_METRICS first, then the others in order of occurrence."""
    found = dict.fromkeys(name for row in rows for name in row["metrics"])
    return [name for name in FIRST_METRICS if name in found] + [name for name in found if name not in FIRST_METRICS]


def seed_count(rows: Iterable[Mapping[str, Any]]) -> int:
    """Largest number of seeds of a row whose figures depend on the seed, or 0 when there is no such row."""
    return max((len(row.get("seeds") or [0]) for row in rows if row["family"] not in ("classical", "best_achievable")), default=0)


def metric_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """One chart per metric, best method first. Error bars are standard deviations over seeds (none for a single seed)."""
    charts = []
    for metric in metric_names(rows):
        ranked = sorted((row for row in rows if metric in row["metrics"]), key=lambda row: (-row["metrics"][metric]["mean"], row["arm"]))
        spans = [_span(row["metrics"][metric]) for row in ranked]
        axis = _Axis.over([0.0, *(end for span in spans for end in span)])
        marks = [
            Mark(row["arm"], row["family"], *map(axis.position, span), _with_deviation(row["metrics"][metric]))
            for row, span in zip(ranked, spans, strict=True)
        ]
        charts.append(Chart(metric, marks, axis.ticks()))
    return charts


def difference_charts(differences: Iterable[Mapping[str, Any]], part: str) -> dict[str, list[Chart]]:
    """Baseline -> one chart per metric of the differences of the other methods on `part`, with 95 % paired bootstrap intervals."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in differences:
        if row["part"] == part:
            groups.setdefault((row["baseline"], row["metric"]), []).append(row)
    charts: dict[str, list[Chart]] = {}
    for (baseline, metric), rows in groups.items():
        axis = _Axis.over([0.0, *(row[end] for row in rows for end in ("low", "high"))])
        marks = [
            Mark(row["arm"], _verdict(row), *map(axis.position, (row["low"], row["mean"], row["high"])), f"{row['mean']:+.4f}")
            for row in sorted(rows, key=lambda row: (-row["mean"], row["arm"]))
        ]
        charts.setdefault(baseline, []).append(Chart(metric, marks, axis.ticks(), axis.position(0.0)))
    return charts


def gate_marks(rows: Iterable[Mapping[str, Any]]) -> list[GateMark]:
    """Change and margin of each figure of the gate. Each strip has its own scale, and positive changes are improvements."""
    marks = []
    for row in rows:
        gain = row["after"] - row["before"] if row["better"] == "higher" else row["before"] - row["after"]
        scale = max(abs(gain), row["margin"], 1e-12) * 1.1
        positions = [round(50 + 50 * value / scale, 2) for value in (gain, -row["margin"])]
        figures = [f"{row[name]:.4g}" for name in ("before", "after", "margin")]
        metric, source = row["metric"].replace("_", " "), row.get("source", "")
        marks.append(GateMark(metric, *figures, row["passed"], *positions, source))
    return marks


def _span(figure: Mapping[str, float]) -> tuple[float, float, float]:
    deviation = figure.get("std") or 0.0
    return figure["mean"] - deviation, figure["mean"], figure["mean"] + deviation


def _with_deviation(figure: Mapping[str, float]) -> str:
    return f"{figure['mean']:.4f}" + (f" ± {figure['std']:.4f}" if figure.get("std") else "")


def _verdict(row: Mapping[str, Any]) -> str:
    """`better`, `worse` or `noise`. The row's own verdict (corrected for multiple comparisons) precedes its interval."""
    above_noise = row.get("exceeds_noise", row["low"] > 0 or row["high"] < 0)
    return ("better" if row["mean"] > 0 else "worse") if above_noise else "noise"


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    step: float

    @classmethod
    def over(cls, values: Sequence[float]) -> _Axis:
        """Axis that covers all `values` with about four steps of 1, 2 or 5 times a power of ten."""
        low, high = min(values), max(values)
        rough = max(high - low, 1e-9) / 4
        power = 10.0 ** (math.log10(rough) // 1)
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first = int((low / step + 1e-9) // 1)
        return cls(first * step, max(math.ceil(high / step - 1e-9), first + 1) * step, step)

    def position(self, value: float) -> float:
        # 2 % at each end are left for the width of the marks
        return round(2 + 96 * (value - self.low) / (self.high - self.low), 2)

    def ticks(self) -> list[tuple[float, str]]:
        decimals = max(0, -int((math.log10(self.step) + 1e-9) // 1))
        count = round((self.high - self.low) / self.step)
        return [(self.position(self.low + n * self.step), f"{self.low + n * self.step + 0.0:.{decimals}f}") for n in range(count + 1)]
