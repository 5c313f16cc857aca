"""Finished run folder with generated codes, in the format of the stages, for tests of the report without training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmsid.artifacts import write_json, write_table, writing
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.config import StageConfig
from mmsid.sids.folder import write_sid_folder
from mmsid.sids.intrinsic import intrinsic_metrics
from mmsid.sids.table import SidTable

SIZES = (8, 8, 16)
ATTACK = '</script><script>window.attacked = 1</script><img src=x onerror="window.attacked = 1"> "quoted" & \u2028 shoe'
KINDS = {"wear": ["shoe", "bag", "scarf", "glove"], "home": ["lamp", "chair", "table", "vase"]}


class SomeStage(StageConfig):
    """Stage configuration with a catalogue, for manifests."""

    catalog: CatalogConfig


def write_catalog(folder: Path, items: int, words: int = 6, pictures: int | None = None, picture_size: int = 120) -> CatalogConfig:
    """Write items of two roots and eight things. The id of item 0 is markup, and every third item has no picture."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for n in range(items):
        root = ("wear", "home")[n % 2]
        thing = KINDS[root][n // 2 % 4]
        item_id, title = (ATTACK, None) if n == 0 else (f"i{n}", f"{thing} number {n}")  # titles are read without markup
        image = f"images/{n % pictures if pictures else n}.jpg" if n % 3 else None
        if image and not (folder / image).exists():
            noise = rng.integers(0, 255, (picture_size, picture_size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / image, quality=80)
        text = " ".join(f"word{word}" for word in rng.integers(0, 5000, words))
        rows.append(
            {"item_id": item_id, "title": title, "description": text if title else None, "image": image, "categories": [root, thing]}
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")
    return CatalogConfig(items=folder / "items.parquet")


def write_run(run: Path, config: CatalogConfig, accepted: bool = True, seeds: int = 2) -> Path:
    """Write captions, interests, assign, refine and train_recommender. Codes follow the categories, and some raw codes collide."""
    catalog = read_catalog(config)
    ids = catalog.item_ids
    stage = {name: SomeStage(out=run / name, catalog=config) for name in ("caption", "interests", "assign", "refine", "train_recommender")}
    for name in ("caption", "interests"):
        with writing(run / name, stage=name, config=stage[name]) as draft:
            (draft.path / "shards").mkdir()
            rows = [{"item_id": item.item_id, "creative": 0, "status": "ok", "flags": []} for item in catalog.items]
            for row, item in zip(rows, catalog.items, strict=True):
                if name == "caption":
                    row["caption"] = f"a plain {item.title} {item.description}"
                else:
                    summary = f"someone who needs a {item.categories[-1]} {item.description}"
                    row |= {"descriptors": json.dumps([{"descriptor": "thrift", "confidence": 0.9}]), "summary": summary, "source": "llm"}
            pq.write_table(pa.Table.from_pylist(rows), draft.path / "shards" / "part-00000.parquet")
    start, refined = _tables(catalog)
    with writing(run / "assign", stage="assign", config=stage["assign"]) as draft:
        write_sid_folder(draft.path, start, intrinsic_metrics(start, content_hashes=catalog.content_hashes))
        draft.counts["items"] = len(ids)
    with writing(run / "refine", stage="refine", config=stage["refine"]) as draft:
        _write_refine(draft.path, start, refined, accepted)
    with writing(run / "train_recommender", stage="train_recommender", config=stage["train_recommender"]) as draft:
        write_json(draft.path / "metrics.json", results(seeds))
        (draft.path / "ranking.md").write_text("| arm |\n|---|\n| ours |\n")
    return run


def _tables(catalog) -> tuple[SidTable, SidTable]:
    """Initial codes (root, thing, random code), and the same codes with every tenth item moved."""
    rng = np.random.default_rng(1)
    roots = list(KINDS)
    codes = np.array(
        [
            (roots.index(item.categories[0]), 2 + KINDS[item.categories[0]].index(item.categories[1]), rng.integers(SIZES[2]))
            for item in catalog.items
        ]
    )
    raw = codes.copy()
    raw[::5, 2] = 0
    ids = catalog.item_ids
    moved = codes.copy()
    moved[::10, 1] = 7
    return SidTable.from_codes(ids, codes, SIZES, raw_codes=raw), SidTable.from_codes(ids, moved, SIZES, raw_codes=moved)


def _write_refine(folder: Path, start: SidTable, refined: SidTable, accepted: bool) -> None:
    row = {"role": "guard", "better": "higher", "passed": True}
    rows = [
        row | {"metric": "target", "role": "target", "before": 0.12, "after": 0.15, "margin": 0.0, "passed": accepted},
        row | {"metric": "lift", "before": 4.0, "after": 3.9, "margin": 0.12},
        row | {"metric": "raw_collisions", "before": 0.2, "after": 0.21, "margin": 0.02, "better": "lower"},
    ]
    reasons = [] if accepted else ["target 0.1200 -> 0.1500, gaining in 61% of the draws"]
    write_json(folder / "gate.json", {"accepted": accepted, "reasons": reasons, "rows": rows, "gain_share": 0.93 if accepted else 0.61})
    moved = np.flatnonzero((start.codes != refined.codes).any(axis=1))
    table = pa.table(
        {
            "item_id": [start.item_ids[n] for n in moved],
            "codes_before": start.codes[moved].tolist(),
            "codes_after": refined.codes[moved].tolist(),
            "reward_gained": [0.5 - 0.01 * rank for rank in range(len(moved))],
            "neighbours_gained": [0.25] * len(moved),
            "balance_gained": [-0.5] * len(moved),
            "crowding_gained": [0.0] * len(moved),
        }
    )
    write_table(folder / "moved.parquet", table)
    published = refined if accepted else start
    write_sid_folder(folder / "sids", published, intrinsic_metrics(published))


def results(seeds: int = 2) -> dict:
    """Results of four methods, with `seeds` seeds for the SIDs, as `train_recommender` and `bench` write them."""
    figures = {
        "popularity": ("classical", 0.02),
        "hybrid": ("classical", 0.081),
        "ours": ("sid", 0.074),
        "best achievable": ("best_achievable", 0.11),
    }
    arms = [
        {
            "arm": arm,
            "family": family,
            "seeds": list(range(seeds)) if family == "sid" else [0],
            "metrics": {
                metric: {"mean": factor * mean, "std": 0.004 if family == "sid" and seeds > 1 else 0.0}
                for metric, factor in (("HR@10", 1.6), ("NDCG@10", 1.0))
            },
            "collisions": 3 if family == "sid" else None,
            "seconds": 12.5,
        }
        for arm, (family, mean) in figures.items()
    ]
    differences = [
        {"arm": "hybrid", "baseline": "ours", "part": "test", "metric": "NDCG@10", "mean": 0.007, "low": 0.002, "high": 0.012, "p": 0.01},
        {
            "arm": "popularity",
            "baseline": "ours",
            "part": "test",
            "metric": "NDCG@10",
            "mean": -0.054,
            "low": -0.06,
            "high": -0.05,
            "p": 0.0,
        },
        {"arm": "hybrid", "baseline": "ours", "part": "valid", "metric": "NDCG@10", "mean": 0.5, "low": 0.4, "high": 0.6, "p": 0.0},
    ]
    return {"dataset": "drawn", "arms": arms, "differences": differences}
