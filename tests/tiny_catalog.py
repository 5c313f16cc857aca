"""Small catalogue on disk with text, categories, sequences and annotation folders, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmsid.artifacts import writing
from mmsid.catalog import CatalogConfig, SplitConfig

COLOURS, THINGS, USES = (
    ["red", "blue", "green"],
    ["shoe", "bag", "lamp", "chair"],
    ["running", "office", "home", "garden", "summer", "winter"],
)


def write_catalog(folder: Path, items: int = 64, users: int = 40, seed: int = 0, sequences: bool = True) -> CatalogConfig:
    """Write items of three colours, four things and six uses. Each user engages with one thing only."""
    rng = np.random.default_rng(seed)
    facts = [(COLOURS[i % 3], THINGS[i % 4], USES[(i // 12) % 6], i) for i in range(items)]
    rows = [
        {
            "item_id": f"i{n}",
            "title": f"{colour} {thing} {n}",
            "description": f"noble {thing} for {use} " + "sale " * int(rng.integers(0, 12)),
            "categories": ["home" if thing in ("lamp", "chair") else "wear", thing, f"{thing}s for {use}"][: 1 + n % 3],
        }
        for colour, thing, use, n in facts
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")
    if sequences:
        chosen = [rng.choice([n for *_, n in facts if n % 4 == u % 4], size=8, replace=False) for u in range(users)]
        table = {"user_id": [f"u{u}" for u in range(users)], "items": [[f"i{n}" for n in row] for row in chosen]}
        pq.write_table(pa.table(table), folder / "sequences.parquet")
    return CatalogConfig(
        items=folder / "items.parquet", sequences=folder / "sequences.parquet" if sequences else None, split=SplitConfig(seed=seed)
    )


def write_annotations(folder: Path, config: CatalogConfig, *, source: str = "llm") -> tuple[Path, Path]:
    """Write finished `caption` and `interests` folders. The last item is quarantined in both, and the first is flagged sensitive."""
    ids = pq.read_table(config.items)["item_id"].to_pylist()
    titles = pq.read_table(config.items)["title"].to_pylist()
    for stage in ("caption", "interests"):
        with writing(folder / stage, stage=stage, config={}) as draft:
            (draft.path / "shards").mkdir()
            rows = []
            for n, (item_id, title) in enumerate(zip(ids, titles)):
                row = {"item_id": item_id, "creative": 0, "status": "ok", "flags": ["sensitive"] if n == 0 else []}
                if stage == "caption":
                    row["caption"] = f"a plain {title}"
                else:
                    found = [{"descriptor": "cheap", "confidence": 0.2}, {"descriptor": f"likes {title}", "confidence": 0.9}]
                    row |= {"descriptors": json.dumps(found), "summary": f"someone who needs a {title}", "source": source}
                rows.append(row)
            rows[-1]["status"] = "quarantined"
            pq.write_table(pa.Table.from_pylist(rows), draft.path / "shards" / "part-00000.parquet")
    return folder / "caption", folder / "interests"
