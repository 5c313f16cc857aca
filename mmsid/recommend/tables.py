"""The ranking table as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmsid.recommend.metrics import COVERAGE_CUTOFF, HIT_CUTOFFS, NDCG_CUTOFFS

COLUMNS = [f"HR@{k}" for k in HIT_CUTOFFS] + [f"NDCG@{k}" for k in NDCG_CUTOFFS] + ["MRR", f"coverage@{COVERAGE_CUTOFF}"]


def ranking_table(rows: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row per arm (test figures; valid where test was not ranked), then the paired differences."""
    tested = any(row["metrics"] for row in rows if row["family"] != "optimum")
    key, part = ("metrics", "test") if tested else ("valid", "valid")
    lines = [
        f"Item-level ranking of the full catalogue on {part}; seen items masked, a bucket of n items takes n ranks at expectation.",
        "",
        f"| arm | family | {' | '.join(COLUMNS)} | valid NDCG@10 | items lost to collisions | seconds |",
        f"|---|---|{'---|' * (len(COLUMNS) + 3)}",
    ]
    for row in rows:
        figures = " | ".join(_figure(row[key].get(name)) for name in COLUMNS)
        lost = "" if row["collisions"] is None else f"{row['collisions']:,}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        lines.append(f"| {row['arm']} | {row['family']} | {figures} | {_figure(row['valid'].get('NDCG@10'))} | {lost} | {seconds} |")
    shown = [row for row in differences if row["part"] == part]
    if shown:
        lines += [
            "",
            f"Difference from `{shown[0]['baseline']}` on {part}, paired bootstrap over users and seeds:",
            "",
            "| arm | metric | difference | 95 % interval | p | smallest effect it could have seen |",
            "|---|---|---|---|---|---|",
        ]
        for row in shown:
            interval = f"{row['low']:+.4f} .. {row['high']:+.4f}"
            lines.append(f"| {row['arm']} | {row['metric']} | {row['mean']:+.4f} | {interval} | {row['p']:.3f} | {row['detectable']:.4f} |")
    return "\n".join(lines) + "\n"


def _figure(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.4f}" + (f" ± {value['std']:.4f}" if value["std"] else "")
