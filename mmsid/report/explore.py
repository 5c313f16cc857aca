"""What the page's explorers walk through: items with their texts and pictures, every arm's codes, collisions, moved items.

Columns rather than records, and text clipped to a budget of bytes: 10,000 items with pictures must stay well under 20 MB.
A larger catalogue shows its first `most_items` in canonical order, which is an even sample of it; counts per code are of all items.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmsid.annotate.readers import read_captions, read_interests
from mmsid.artifacts import is_complete, read_table
from mmsid.catalog import Catalog, CatalogConfig, Item
from mmsid.report.thumbnails import thumbnails
from mmsid.sids.folder import read_sid_folder
from mmsid.sids.table import SidTable

MOST_ITEMS = 10_000
MOST_TEXT_BYTES = 6_000_000
MOST_BUCKETS = 60
MOST_MOVED = 200
# share of an item's bytes that each of its texts may take
SHARES = {"id": 0.1, "title": 0.25, "caption": 0.4, "interest": 0.25}


def explore(run: Path, catalog: Catalog, config: CatalogConfig, arms: Mapping[str, Path], most_items: int = MOST_ITEMS) -> dict[str, Any]:
    """Everything that the page's script needs, ready for JSON; the last arm is the one shown first.

    Raises:
        ArtifactError: an arm lacks a SID for an item of the catalogue, or a folder is damaged.
    """
    items = catalog.items[:most_items]
    tables = {arm: read_sid_folder(folder).align([item.item_id for item in catalog.items]) for arm, folder in arms.items()}
    hashes = [item.content_sha256 for item in catalog.items]
    pictures = thumbnails(items, spread(list(tables.values())[-1].codes[: len(items)]).tolist(), config)
    return {
        "total": len(catalog.items),
        "items": _texts(run, items),
        "categories": _categories(items),
        "arms": [{"name": arm, **_arm(table, hashes, len(items))} for arm, table in tables.items()],
        "moved": _moved(run, items),
        "thumbnails": pictures,
    }


def spread(codes: np.ndarray) -> np.ndarray:
    """Rows in an order that visits every branch before it visits one twice, so that a capped number of pictures reaches all.

    Branches are the prefixes of L-1 codes of `codes` (N, L); inside a branch the rows keep their order.
    """
    _, branch = np.unique(codes[:, : max(codes.shape[1] - 1, 1)], axis=0, return_inverse=True)
    branch = branch.reshape(-1)
    by_branch = np.argsort(branch, kind="stable")
    starts = np.searchsorted(branch[by_branch], branch[by_branch])
    visit = np.empty(len(codes), dtype=np.int64)
    visit[by_branch] = np.arange(len(codes)) - starts
    return np.argsort(visit, kind="stable")


def collisions(table: SidTable, content_hashes: Sequence[str], shown: int) -> dict[str, Any]:
    """Buckets of raw codes and what became of them.

    Returns:
        raw, published: size of a bucket in items of distinct content -> number of buckets of that size, sizes above 1 only;
        duplicates: items whose content another item has too; changed: items whose published codes are not their raw codes;
        buckets: the largest raw ones as lists of rows, of the first `shown` items.
    """
    kinds = np.unique(np.asarray(content_hashes), return_inverse=True)[1]
    repeats = np.bincount(kinds)
    raw_bucket = np.unique(table.raw_codes, axis=0, return_inverse=True)[1].reshape(-1)
    rows_of: dict[int, list[int]] = {}
    for row, bucket in enumerate(raw_bucket[:shown].tolist()):
        rows_of.setdefault(bucket, []).append(row)
    crowded = [rows for rows in rows_of.values() if len(set(kinds[rows].tolist())) > 1]
    return {
        "raw": _sizes(table.raw_codes, kinds),
        "published": _sizes(table.full_codes(), kinds),
        "duplicates": int((repeats[kinds] > 1).sum()),
        "changed": int((table.codes != table.raw_codes).any(axis=1).sum()),
        "buckets": sorted(crowded, key=lambda rows: (-len(rows), rows[0]))[:MOST_BUCKETS],
    }


def _sizes(codes: np.ndarray, kinds: np.ndarray) -> dict[str, int]:
    distinct = np.unique(np.concatenate([codes, kinds[:, None]], axis=1), axis=0)
    _, sizes = np.unique(distinct[:, :-1], axis=0, return_counts=True)
    return {str(size): count for size, count in sorted(Counter(sizes.tolist()).items()) if size > 1}


def _arm(table: SidTable, hashes: Sequence[str], shown: int) -> dict[str, Any]:
    changed = np.flatnonzero((table.raw_codes != table.codes).any(axis=1)[:shown])
    return {
        "sizes": list(table.codebook_sizes),
        "codes": table.codes[:shown].tolist(),
        "raw": {int(row): table.raw_codes[row].tolist() for row in changed},
        "suffix": None if table.suffix is None else table.suffix[:shown].tolist(),
        "counts": [np.bincount(table.codes[:, level], minlength=size).tolist() for level, size in enumerate(table.codebook_sizes)],
        "collisions": collisions(table, hashes, shown),
    }


def _texts(run: Path, items: Sequence[Item]) -> dict[str, list[str]]:
    captions = read_captions(run / "caption") if is_complete(run / "caption") else {}
    mined = read_interests(run / "interests") if is_complete(run / "interests") else {}
    texts = {
        "id": [item.item_id for item in items],
        "title": [item.title or item.description for item in items],
        "caption": [captions.get(item.item_id, "") for item in items],
        "interest": [mined[item.item_id].summary if item.item_id in mined else "" for item in items],
    }
    budget = min(1200, MOST_TEXT_BYTES // max(len(items), 1))
    return {name: [clip(text, int(budget * SHARES[name])) for text in column] for name, column in texts.items()}


def clip(text: str, most_bytes: int) -> str:
    """`text`, or its beginning and an ellipsis, so that it takes at most `most_bytes` in the page's JSON."""
    size, kept = len(embedded_json(text).encode()), text
    while size > most_bytes and kept:
        kept = kept[: min(len(kept) - 1, len(kept) * most_bytes // size)].rstrip()
        size = len(embedded_json(kept + "…").encode())
    return text if kept == text else kept + "…"


def embedded_json(value: Any) -> str:
    """JSON that may stand inside a script element: no character in it can end the element or begin markup."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate in a stranger's title has no UTF-8


def _categories(items: Sequence[Item]) -> dict[str, list]:
    """Distinct category paths, and the number of each item's path: names repeat too often to be written with every item."""
    paths: dict[tuple[str, ...], int] = {}
    of_item = [paths.setdefault(tuple(clip(name, 40) for name in item.categories[:6]), len(paths)) for item in items]
    return {"paths": [list(path) for path in paths], "of": of_item}


def _moved(run: Path, items: Sequence[Item]) -> dict[str, Any] | None:
    """Items that refinement moved, or would have moved, those with the largest gain of reward first."""
    if not is_complete(run / "refine"):
        return None
    table = read_table(run / "refine" / "moved.parquet")
    row_of = {item.item_id: row for row, item in enumerate(items)}
    moved = table.to_pylist()
    gains = [row["reward_gained"] for row in moved]
    shown = sorted((row for row in moved if row["item_id"] in row_of), key=lambda row: (-row["reward_gained"], row_of[row["item_id"]]))
    return {
        "count": len(moved),
        "share_gaining": sum(gain > 0 for gain in gains) / max(len(gains), 1),
        "mean_gain": math.fsum(gains) / max(len(gains), 1),
        "first_level": sum(row["codes_before"][0] != row["codes_after"][0] for row in moved),
        "rows": [
            {
                "row": row_of[row["item_id"]],
                "before": row["codes_before"],
                "after": row["codes_after"],
                "gain": round(row["reward_gained"], 4),
            }
            for row in shown[:MOST_MOVED]
        ],
    }
