"""Markdown table of the intrinsic metrics of several SID tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def intrinsic_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Format intrinsic metrics as Markdown, one row per method.

    Args:
        metrics: method name -> result of `intrinsic_metrics`.
    """
    shown = intrinsic_columns(metrics)
    lines = ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*shown.values(), strict=True)]
    return "\n".join(lines) + "\n"


def intrinsic_columns(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Column name -> one cell per method; method names come first. A missing figure is "-"; columns without any figure are left out."""
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("items", lambda m: f"{m['published']['items']:,}"),
        ("unique", lambda m: f"{m['published']['uniqueness']:.3f}"),
        ("items lost (raw)", lambda m: f"{m['published']['items_lost']:,} ({m['raw']['items_lost']:,})"),
        ("max bucket", lambda m: f"{m['published']['max_bucket']:,}"),
        ("perplexity", lambda m: "/".join(f"{level['perplexity']:.0f}" for level in m["levels"])),
        ("max Gini", lambda m: f"{m['max_gini']:.2f}"),
        ("lift", lambda m: _lifts(m["coengagement"]["lift"])),
        ("code lift", lambda m: _lifts(m["coengagement"]["code_lift"])),
        ("LCP co-engaged (chance)", lambda m: f"{m['coengagement']['lcp']:.3f} ({m['coengagement']['lcp_chance']:.3f})"),
        ("V-measure by depth", lambda m: _v_measures(m["categories"])),
        ("R2", lambda m: "/".join(f"{level['r2']:.2f}" for level in m["fidelity"])),
        ("R@10 full / 1+999", lambda m: f"{m['retrieval']['full']['10']:.3f} / {m['retrieval']['sampled']['10']:.3f}"),
        ("codes changed", lambda m: f"{100 * m['changed']['any']:.1f} %"),
    ]
    cells = {name: [_cell(render, figures) for figures in metrics.values()] for name, render in columns}
    return {"SIDs": list(metrics)} | {name: values for name, values in cells.items() if any(value != "-" for value in values)}


def _cell(render: Callable[[Mapping[str, Any]], str], metrics: Mapping[str, Any]) -> str:
    try:
        return render(metrics) or "-"
    except KeyError:
        return "-"


def _lifts(lifts: Sequence[float | None]) -> str:
    return "/".join("-" if lift is None else f"{lift:.1f}" for lift in lifts)


def _v_measures(records: list[Mapping[str, Any]]) -> str:
    """V-measure of level l at category depth l; deeper categories use the last level."""
    deepest = max((record["level"] for record in records), default=0)
    return "/".join(f"{record['v_measure']:.2f}" for record in records if record["level"] == min(record["depth"], deepest))
