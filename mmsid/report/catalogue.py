"""The section of the page on the ingested catalogue: counts, problems with examples, a contact sheet of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmsid.artifacts import is_complete, read_manifest
from mmsid.catalog import Catalog, CatalogConfig
from mmsid.catalog.ingest.problems import Problem, problems
from mmsid.report.thumbnails import thumbnails

PICTURES = 48


def catalogue_section(run: Path, catalog: Catalog, config: CatalogConfig) -> dict[str, Any] | None:
    """Data of the section, or None for a run without the stage `ingest`. The pictures are spread evenly over the catalogue."""
    folder = run / "ingest"
    if not is_complete(folder):
        return None
    counts = read_manifest(folder, "ingest")["counts"]
    rows = np.unique(np.linspace(0, len(catalog.items) - 1, min(PICTURES, len(catalog.items))).astype(int)).tolist()
    items = [catalog.items[row] for row in rows]
    shown = thumbnails(items, range(len(items)), config)
    found: list[Problem] = problems(folder)
    return {
        "counts": {name: counts[name] for name in ("in", "ok", "quarantined", "items")},
        "notes": list(catalog.notes),
        "not_read": list(catalog.not_read),
        "problems": [{"code": one.code, "count": one.count, "examples": "; ".join(one.examples)} for one in found],
        "pictures": [{"title": items[row].title or items[row].item_id, "data": picture} for row, picture in sorted(shown.items())],
    }
