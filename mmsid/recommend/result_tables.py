"""Ranking tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmsid.recommend.metrics import COVERAGE_CUTOFF, HIT_CUTOFFS, MRR_CUTOFF, NDCG_CUTOFFS, SID_LEVEL_GAIN, WEIGHTED

COLUMNS = [f"HR@{k}" for k in HIT_CUTOFFS] + [f"NDCG@{k}" for k in NDCG_CUTOFFS] + [f"MRR@{MRR_CUTOFF}", f"coverage@{COVERAGE_CUTOFF}"]
WEIGHTED_COLUMNS = [f"{WEIGHTED} HR@10", f"{WEIGHTED} NDCG@10"]  # only where events have different weights
FAMILIES = ("classical", "sid", "fusion", "best_achievable")


def ranking_table(rows: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row per method in the given order, then the paired differences on the same part."""
    return method_table(rows) + difference_table(differences, _part(rows))


def method_table(rows: Sequence[dict[str, Any]], *, best_first: bool = False) -> str:
    """Markdown with one row per method: test metrics, or valid metrics if test was not ranked.

    Args:
        best_first: sort by family, then by NDCG@10, and print the best value of each family in bold. Otherwise rows keep their order.
    """
    part = _part(rows)
    key = "metrics" if part == "test" else "valid"
    if best_first:
        rows = sorted(rows, key=lambda row: (FAMILIES.index(row["family"]), -_mean(row, key, "NDCG@10")))
    columns = COLUMNS + [name for name in WEIGHTED_COLUMNS if any(name in row[key] for row in rows)]
    lines = [
        f"Item-level ranking of the full catalogue on {part}. Seen items are masked; a SID shared by n items takes n expected ranks. "
        "SID-level HR@10 counts a hit if the target's SID is among the 10 best distinct SIDs; its lead over item-level HR@10 is what "
        "collisions inflate.",
        "",
        f"| method | family | seeds | {' | '.join(columns)} | valid NDCG@10 | items lost to collisions | {SID_LEVEL_GAIN} | seconds |",
        f"|---|---|---|{'---|' * (len(columns) + 4)}",
    ]
    for row in rows:
        rivals = [other for other in rows if other["family"] == row["family"]] if best_first and row["family"] != "best_achievable" else []
        figures = " | ".join(_marked(row, key, name, rivals) for name in columns)
        lost = "" if row["collisions"] is None else f"{row['collisions']:,}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        seeds = len(row["seeds"]) or ""
        valid = _figure(row["valid"].get("NDCG@10"))
        gain = _figure(row[key].get(SID_LEVEL_GAIN))
        lines.append(f"| {row['arm']} | {row['family']} | {seeds} | {figures} | {valid} | {lost} | {gain} | {seconds} |")
    return "\n".join(lines) + "\n"


def difference_table(differences: Sequence[dict[str, Any]], part: str) -> str:
    """Markdown with one table per baseline; empty if nothing was compared on this part."""
    lines: list[str] = []
    shown = [row for row in differences if row["part"] == part]
    for baseline in dict.fromkeys(row["baseline"] for row in shown):
        lines += [
            "",
            f"Difference from `{baseline}` on {part}, paired bootstrap over users and seeds. p is uncorrected; p (Holm) is corrected for "
            f"all {len(shown) // len({row['metric'] for row in shown})} comparisons of a metric, and a difference exceeds noise where it "
            "is below 0.05. A method that was trained with one seed only is compared over users alone, which understates the noise.",
            "",
            "| method | metric | seeds | difference | 95 % interval | p | p (Holm) | exceeds noise | smallest detectable effect |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in (row for row in shown if row["baseline"] == baseline):
            interval = f"{row['low']:+.4f} .. {row['high']:+.4f}"
            verdict = "yes" if row["exceeds_noise"] else "no"
            figures = f"{row['mean']:+.4f} | {interval} | {row['p']:.4f} | {row['p_holm']:.4f} | {verdict} | {row['detectable']:.4f}"
            lines.append(f"| {row['arm']} | {row['metric']} | {row['seeds'] or ''} | {figures} |")
    return "\n".join(lines) + "\n" if lines else ""


def _part(rows: Sequence[dict[str, Any]]) -> str:
    return "test" if any(row["metrics"] for row in rows if row["family"] != "best_achievable") else "valid"


def _mean(row: dict[str, Any], key: str, name: str) -> float:
    return row[key].get(name, {"mean": 0.0})["mean"]


def _marked(row: dict[str, Any], key: str, name: str, rivals: Sequence[dict[str, Any]]) -> str:
    text = _figure(row[key].get(name))
    return f"**{text}**" if text and rivals and _mean(row, key, name) >= max(_mean(other, key, name) for other in rivals) else text


def _figure(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.4f}" + (f" ± {value['std']:.4f}" if value["std"] else "")
