"""Where the marks of a chart stand: arms with error bars, differences with intervals, gate figures against their margins.

The page draws each row as a label, a strip and a figure; the strip is an inline SVG whose places are percentages of its width, so that
text keeps its size on a telephone and colours follow the reader's light or dark theme. A chart library's script would be 4.8 MB in every
page and carry some forty addresses of tile servers and shops into a file that must hold none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FIRST_METRICS = ("NDCG@10", "HR@10", "HR@50", "NDCG@5", "HR@1", "HR@5", "HR@20")


@dataclass(frozen=True)
class Mark:
    """One row of figure `text`: `low`, `at`, `high` in percent of the strip (low == high: no error bar), `family` names its colour."""

    label: str
    family: str
    low: float
    at: float
    high: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Rows under one axis. `ticks` are (place in percent, label); `zero` is the place of 0, or None when it is the left edge."""

    metric: str
    marks: list[Mark]
    ticks: list[tuple[float, str]]
    zero: float | None = None


@dataclass(frozen=True)
class GateMark:
    """One figure of the gate. `at`: its change in percent of the strip, right of 50 is better; `limit`: how far left it may fall;
    `source`: where the margin comes from."""

    metric: str
    before: str
    after: str
    margin: str
    passed: bool
    at: float
    limit: float
    source: str


def metric_names(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every metric that an arm has: the familiar ones first, the rest in their own order."""
    found = dict.fromkeys(name for arm in arms for name in arm["metrics"])
    return [name for name in FIRST_METRICS if name in found] + [name for name in found if name not in FIRST_METRICS]


def metric_charts(arms: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """One chart per metric, the best arm on top; error bars are the deviation over seeds (none for a single seed)."""
    charts = []
    for metric in metric_names(arms):
        rows = sorted((arm for arm in arms if metric in arm["metrics"]), key=lambda arm: (-arm["metrics"][metric]["mean"], arm["arm"]))
        spans = [_span(arm["metrics"][metric]) for arm in rows]
        axis = _Axis.over([0.0, *(end for span in spans for end in span)])
        marks = [
            Mark(arm["arm"], arm["family"], *map(axis.place, (low, mean, high)), _with_deviation(arm["metrics"][metric]))
            for arm, (low, mean, high) in zip(rows, spans, strict=True)
        ]
        charts.append(Chart(metric, marks, axis.ticks()))
    return charts


def difference_charts(differences: Iterable[Mapping[str, Any]], part: str) -> dict[str, list[Chart]]:
    """Baseline -> one chart per metric of the other arms' differences to it on `part`, with 95 % intervals of the paired bootstrap."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in differences:
        if row["part"] == part:
            groups.setdefault((row["baseline"], row["metric"]), []).append(row)
    charts: dict[str, list[Chart]] = {}
    for (baseline, metric), rows in groups.items():
        axis = _Axis.over([0.0, *(row[end] for row in rows for end in ("low", "high"))])
        marks = [
            Mark(row["arm"], _verdict(row), *map(axis.place, (row["low"], row["mean"], row["high"])), f"{row['mean']:+.4f}")
            for row in sorted(rows, key=lambda row: (-row["mean"], row["arm"]))
        ]
        charts.setdefault(baseline, []).append(Chart(metric, marks, axis.ticks(), axis.place(0.0)))
    return charts


def gate_marks(rows: Iterable[Mapping[str, Any]]) -> list[GateMark]:
    """Each figure on a strip of its own scale: what it gained or lost, and the margin that it had to keep."""
    marks = []
    for row in rows:
        gained = row["after"] - row["before"] if row["better"] == "higher" else row["before"] - row["after"]
        scale = max(abs(gained), row["margin"], 1e-12) * 1.1
        places = [50 + 50 * value / scale for value in (gained, -row["margin"])]
        figures = [f"{row[name]:.4g}" for name in ("before", "after", "margin")]
        metric, source = row["metric"].replace("_", " "), row.get("source", "")
        marks.append(GateMark(metric, *figures, row["passed"], *(round(place, 2) for place in places), source))
    return marks


def _span(figure: Mapping[str, float]) -> tuple[float, float, float]:
    deviation = figure.get("std") or 0.0
    return figure["mean"] - deviation, figure["mean"], figure["mean"] + deviation


def _with_deviation(figure: Mapping[str, float]) -> str:
    return f"{figure['mean']:.4f}" + (f" ± {figure['std']:.4f}" if figure.get("std") else "")


def _verdict(row: Mapping[str, Any]) -> str:
    """Above noise by the verdict that comes with the row (corrected for many comparisons), else when the interval leaves out 0."""
    above_noise = row.get("exceeds_noise", row["low"] > 0 or row["high"] < 0)
    return ("better" if row["mean"] > 0 else "worse") if above_noise else "noise"


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    step: float

    @classmethod
    def over(cls, values: Sequence[float]) -> _Axis:
        """An axis with about four steps of 1, 2 or 5 times a power of ten that covers all `values`."""
        low, high = min(values), max(values)
        rough = max(high - low, 1e-9) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        return cls(math.floor(low / step + 1e-9) * step, max(math.ceil(high / step - 1e-9), math.floor(low / step + 1e-9) + 1) * step, step)

    def place(self, value: float) -> float:
        # the outermost marks need room for their own width
        return round(2 + 96 * (value - self.low) / (self.high - self.low), 2)

    def ticks(self) -> list[tuple[float, str]]:
        decimals = max(0, -math.floor(math.log10(self.step) + 1e-9))
        count = round((self.high - self.low) / self.step)
        return [(self.place(self.low + n * self.step), f"{self.low + n * self.step + 0.0:.{decimals}f}") for n in range(count + 1)]
