"""What the story of the demo says, read from the folders of its two runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mmsid.annotate.readers import read_captions, read_interests
from mmsid.artifacts import read_json, read_manifest, read_table
from mmsid.catalog import Catalog, read_catalog
from mmsid.config import StageConfig
from mmsid.recommend.hybrid import hybrid_name
from mmsid.sids import SidTable

EXAMPLES = 3  # ads that are shown, of the known and of the new ones
TOP = 10
_ROWS = {  # rows of the table, by the name of the method
    "random": "random codes",
    "ours": "content alone",
    "ours_refined": "refined on the logs",
    "balanced_rq": "clustering of content and behaviour",
    "popularity": "no Semantic IDs: popularity",
    "hybrid_knn": "no Semantic IDs: item-kNN and TF-IDF",
    hybrid_name("ours_refined"): "hybrid recommender",
    "best achievable": "best achievable",
}


@dataclass(frozen=True)
class Ad:
    """An ad in the story. `codes_before` is empty where the codes did not move. `shown_to`: users whose best `TOP` items hold it."""

    item_id: str
    title: str
    picture: str | None
    caption: str
    interests: str
    codes: tuple[int, ...]
    codes_before: tuple[int, ...] = ()
    shown_to: int = 0
    alike: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Facts:
    """Figures and examples of a finished demo.

    Attributes:
        known, new, users: numbers of ads and users.
        moved: known ads whose codes refinement moved; `moved_later`: known ads whose codes the new ads moved.
        accepted, reasons: the verdict of the acceptance gate.
        rows: the table: name, and (mean, deviation over seeds) of HR@10 and NDCG@10. `seeds`: recommenders per row.
        asked: users whose next item is a new ad. `answered`: those who find it among their best `TOP`.
        chance: the share that a random order would answer.
        reached: share of all users with a new ad among their best `TOP`.
    """

    known: int
    new: int
    users: int
    moved: int
    moved_later: int
    accepted: bool
    reasons: list[str]
    rows: list[tuple[str, dict[str, tuple[float, float]]]]
    seeds: int
    asked: int
    answered: int
    chance: float
    reached: float
    refined: list[Ad]
    arrived: list[Ad]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `answered / asked`."""
        return wilson(self.answered, self.asked)


def collect(configs: Mapping[str, StageConfig], new: Mapping[str, StageConfig], catalog_folder: Path, known_folder: Path) -> Facts:
    """Facts of the run `configs` on the known ads and the run `new` on all ads."""
    before, after = SidTable.load(configs["assign"].out), SidTable.load(configs["refine"].out / "sids")
    grown = SidTable.load(new["assign"].out)
    catalog = read_catalog(new["assign"].catalog)
    arrived = [item_id for item_id in catalog.item_ids if item_id not in after.row_of]
    gate = read_json(configs["refine"].out / "gate.json")
    metrics = read_json(configs["train_recommender"].out / "metrics.json")
    best = _recommended(new["recommend"].out)
    targets = read_table(known_folder / "next_items.parquet").to_pylist()
    asked = [row for row in targets if row["is_new"]]
    shown = _counted(best)
    moved = [item_id for item_id in after.item_ids if _codes(before, item_id) != _codes(after, item_id)]
    gained = {row["item_id"]: row["reward_gained"] for row in read_table(configs["refine"].out / "moved.parquet").to_pylist()}
    moved.sort(key=lambda item_id: (-gained.get(item_id, -math.inf), item_id))
    describe = _Describer(catalog, new, catalog_folder)
    counts = read_manifest(known_folder, "demo_new_ads")["counts"]
    return Facts(
        known=counts["known"],
        new=counts["new"],
        users=counts["users"],
        moved=len(moved),
        moved_later=sum(_codes(after, item_id) != _codes(grown, item_id) for item_id in after.item_ids),
        accepted=gate["accepted"],
        reasons=gate["reasons"],
        rows=[
            (_ROWS[name], _figures(row))
            for name in _ROWS
            for row in metrics["arms"]
            if row["arm"] == name and (gate["accepted"] or name != "ours_refined")
        ],
        seeds=max(len(row["seeds"]) for row in metrics["arms"]),
        asked=len(asked),
        answered=sum(row["item_id"] in best[row["user_id"]][:TOP] for row in asked),
        chance=TOP / len(catalog.item_ids),
        reached=float(np.mean([not set(arrived).isdisjoint(items[:TOP]) for items in best.values()])),
        refined=[describe(item_id, after, before) for item_id in moved[:EXAMPLES]],
        arrived=[
            describe(item_id, grown, shown=shown) for item_id in sorted(arrived, key=lambda each: (-shown.get(each, 0), each))[:EXAMPLES]
        ],
    )


def wilson(hits: int, number: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of the share `hits / number` (Wilson 1927)."""
    if not number:
        return 0.0, 1.0
    share, spread = hits / number, z * z / number
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / number + spread / (4 * number)) / (1 + spread)
    return centre - half, centre + half


class _Describer:
    """Makes the `Ad` of an item."""

    def __init__(self, catalog: Catalog, new: Mapping[str, StageConfig], catalog_folder: Path) -> None:
        self._catalog, self._folder = catalog, catalog_folder
        self._captions, self._interests = read_captions(new["caption"].out), read_interests(new["interests"].out)

    def __call__(self, item_id: str, table: SidTable, before: SidTable | None = None, shown: Mapping[str, int] | None = None) -> Ad:
        item = self._catalog.items[self._catalog.row_of[item_id]]
        mined = self._interests.get(item_id)
        prefix = _codes(table, item_id)[:2]
        alike = [other for other in table.item_ids if other != item_id and _codes(table, other)[:2] == prefix]
        return Ad(
            item_id=item_id,
            title=item.title or item_id,
            picture=None if not item.images else str(item.images[0]),
            caption=self._captions.get(item_id, ""),
            interests=mined.summary if mined else "",
            codes=_codes(table, item_id),
            codes_before=() if before is None else _codes(before, item_id),
            shown_to=0 if shown is None else shown.get(item_id, 0),
            alike=[self._catalog.items[self._catalog.row_of[other]].title for other in alike[:EXAMPLES]],
        )


def _codes(table: SidTable, item_id: str) -> tuple[int, ...]:
    return tuple(int(code) for code in table.codes[table.row_of[item_id]])


def _figures(row: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    return {name: (row["metrics"][name]["mean"], row["metrics"][name]["std"]) for name in ("HR@10", "NDCG@10")}


def _recommended(folder: Path) -> dict[str, list[str]]:
    """User id -> recommended items, best first."""
    table = pq.read_table(folder / "recommendations")
    return dict(zip(table["user_id"].to_pylist(), table["item_ids"].to_pylist(), strict=True))


def _counted(best: Mapping[str, list[str]]) -> dict[str, int]:
    """Item id -> users whose best `TOP` items hold it."""
    counts: dict[str, int] = {}
    for items in best.values():
        for item_id in items[:TOP]:
            counts[item_id] = counts.get(item_id, 0) + 1
    return counts
