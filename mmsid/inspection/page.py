"""The audit as one self-contained HTML file in the look of the report. It has no script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmsid.inspection.tables import audit_tables, summary
from mmsid.report.render import page_style, policy_hash, template
from mmsid.sids.table import SidTable

WIDTH, HEIGHT = 100.0, 64.0  # of a curve, in its own units
_POINTS = 200
_HIGHEST = 4.0  # of the interactions, in units of the largest share of items; higher ones are cut off


class Curve(NamedTuple):
    """Codes of one level, from the most to the least used, as polylines of an SVG of WIDTH x HEIGHT.

    Attributes:
        title: for example "Level 1". items, interactions: points of the shares; interactions may be "".
        uniform: height of even use.
        top: the share at the upper edge, as text.
    """

    title: str
    items: str
    interactions: str
    uniform: float
    top: str


def render_page(audit: Mapping[str, Any], table: SidTable, counts: np.ndarray | None) -> str:
    """HTML of an audit.

    Args:
        counts: (N,) interactions of each item, or None.
    """
    style = page_style()
    return template("mmsid.inspection", "page.html.j2").render(
        title=Path(audit["file"]).name,
        style=style,
        style_hash=policy_hash(style),
        summary=summary(audit),
        tables=audit_tables(audit),
        notes=audit["notes"],
        curves=_curves(table, counts),
        width=WIDTH,
        height=HEIGHT,
    )


def _curves(table: SidTable, counts: np.ndarray | None) -> list[Curve]:
    curves = []
    for level, size in enumerate(table.codebook_sizes):
        items = np.sort(np.bincount(table.codes[:, level], minlength=size))[::-1] / len(table)
        traffic = None
        if counts is not None and counts.any():
            traffic = np.sort(np.bincount(table.codes[:, level], weights=counts, minlength=size))[::-1] / counts.sum()
        top = float(items[0] if traffic is None else max(items[0], min(traffic[0], _HIGHEST * items[0])))
        curves.append(
            Curve(
                f"Level {level + 1}",
                _points(items, top),
                "" if traffic is None else _points(traffic, top),
                round(HEIGHT - HEIGHT / size / top, 2),
                f"{top:.2%}",
            )
        )
    return curves


def _points(shares: np.ndarray, top: float) -> str:
    """Corners of a step curve, thinned to `_POINTS` codes."""
    at = np.unique(np.linspace(0, len(shares) - 1, min(len(shares), _POINTS)).astype(int))
    x = np.append(at, len(shares)) * WIDTH / len(shares)
    y = np.maximum(HEIGHT - HEIGHT * shares[at] / top, 0.0)
    corners = [f"{x[n]:.2f},{y[n]:.2f} {x[n + 1]:.2f},{y[n]:.2f}" for n in range(len(at))]
    return " ".join(corners)
