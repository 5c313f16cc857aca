"""The story of the demo as one self-contained HTML file, in the look of the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsid.artifacts import write_text
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.demo.facts import Ad, Facts
from mmsid.demo.text import figure, new_ads, refinement, table_note
from mmsid.report.render import page_style, policy_hash, template
from mmsid.report.thumbnails import thumbnails
from mmsid.sids.table import token


def write_page(facts: Facts, catalog: CatalogConfig, report: Path, out: Path) -> Path:
    """Write the page to `out`.

    Args:
        catalog: of all ads, for the pictures.
        report: the report of the run on the known ads; the page links to it.
    """
    pictures = _pictures([*facts.refined, *facts.arrived], catalog)
    style = page_style()
    page = template("mmsid.demo", "story.html.j2").render(
        facts=facts,
        refinement=refinement(facts),
        table_note=table_note(facts),
        new_ads=new_ads(facts),
        rows=[(name, figure(metrics["HR@10"]), figure(metrics["NDCG@10"])) for name, metrics in facts.rows],
        refined=[_card(ad, pictures) for ad in facts.refined],
        arrived=[_card(ad, pictures) for ad in facts.arrived],
        report=Path(os.path.relpath(report, out.parent)).as_posix(),
        style=style,
        style_hash=policy_hash(style),
    )
    write_text(out, page)
    return out


def _card(ad: Ad, pictures: dict[str, str]) -> dict[str, Any]:
    return {
        "ad": ad,
        "picture": pictures.get(ad.item_id),
        "before": _codes(ad.codes_before, ad.codes),
        "after": _codes(ad.codes, ad.codes_before),
    }


def _codes(codes: Sequence[int], others: Sequence[int]) -> list[tuple[str, bool]]:
    """Each code as a token, and whether the other Semantic ID has another one at this level."""
    return [(token(level, code), bool(others) and others[level] != code) for level, code in enumerate(codes)]


def _pictures(ads: Sequence[Ad], config: CatalogConfig) -> dict[str, str]:
    """Item id -> thumbnail as base64 WebP."""
    catalog = read_catalog(config)
    rows = [catalog.row_of[ad.item_id] for ad in ads]
    return {catalog.item_ids[row]: picture for row, picture in thumbnails(catalog.items, rows, config).items()}
