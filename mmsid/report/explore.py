"""Data of the page's explorers: items with texts and pictures, the codes of every method, collisions, moved items.

Items are stored as columns, and texts are clipped to a byte budget, so that a page of 10,000 items with pictures stays under 20 MB.
A larger catalogue shows its first MAX_ITEMS items in canonical order, which is a uniform sample. Counts per code are of all items.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmsid.artifacts import is_complete, read_table
from mmsid.catalog import Catalog, CatalogConfig, Item
from mmsid.id_columns import with_text_ids
from mmsid.report.run_folder import annotations
from mmsid.report.thumbnails import thumbnails
from mmsid.sids.table import SidTable

MAX_ITEMS = 10_000
MAX_TEXT_BYTES = 6_000_000
MAX_BUCKETS = 60
MAX_MOVED = 200
# share of an item's bytes for each of its texts
SHARES = {"id": 0.1, "title": 0.25, "caption": 0.4, "interest": 0.25}


def explore(run: Path, catalog: Catalog, config: CatalogConfig, folders: Mapping[str, Path]) -> dict[str, Any]:
    """JSON-serialisable data for the page's script.

    Args:
        folders: method -> SID folder. The page first shows the last method.

    Raises:
        ArtifactError: a method has no SID for an item of the catalogue, or a folder is damaged.
    """
    items = catalog.items[:MAX_ITEMS]
    tables = {name: SidTable.load(folder).align(catalog.item_ids) for name, folder in folders.items()}
    hashes = catalog.content_hashes
    pictures = thumbnails(items, spread(list(tables.values())[-1].codes[: len(items)]).tolist(), config)
    return {
        "total": len(catalog.items),
        "items": _texts(run, items),
        "categories": _categories(items),
        "methods": [{"name": name, **_method(table, hashes, len(items))} for name, table in tables.items()],
        "moved": _moved(run, items),
        "thumbnails": pictures,
    }


def spread(codes: np.ndarray) -> np.ndarray:
    """Rows in round-robin order over the branches of the SID tree, so that a limited number of pictures covers all branches.

    Branches are the prefixes of L-1 codes of `codes` (N, L). Rows of one branch keep their order.
    """
    _, branch = np.unique(codes[:, : max(codes.shape[1] - 1, 1)], axis=0, return_inverse=True)
    branch = branch.reshape(-1)
    by_branch = np.argsort(branch, kind="stable")
    starts = np.searchsorted(branch[by_branch], branch[by_branch])
    rank_in_branch = np.empty(len(codes), dtype=np.int64)
    rank_in_branch[by_branch] = np.arange(len(codes)) - starts
    return np.argsort(rank_in_branch, kind="stable")


def collisions(table: SidTable, content_hashes: Sequence[str], shown: int) -> dict[str, Any]:
    """Buckets (items with equal codes) before and after collision handling.

    Returns:
        `raw`, `published`: bucket size in items of distinct content -> number of buckets of that size, for sizes above 1.
        `duplicates`: number of items whose content another item has as well.
        `changed`: number of items whose published codes differ from their raw codes.
        `buckets`: the largest raw buckets as lists of rows of the first `shown` items.
    """
    contents = np.unique(np.asarray(content_hashes), return_inverse=True)[1]
    copies = np.bincount(contents)
    raw_bucket = np.unique(table.raw_codes, axis=0, return_inverse=True)[1].reshape(-1)
    rows_of: dict[int, list[int]] = {}
    for row, bucket in enumerate(raw_bucket[:shown].tolist()):
        rows_of.setdefault(bucket, []).append(row)
    collided = [rows for rows in rows_of.values() if len(set(contents[rows].tolist())) > 1]
    return {
        "raw": _sizes(table.raw_codes, contents),
        "published": _sizes(table.full_codes(), contents),
        "duplicates": int((copies[contents] > 1).sum()),
        "changed": int((table.codes != table.raw_codes).any(axis=1).sum()),
        "buckets": sorted(collided, key=lambda rows: (-len(rows), rows[0]))[:MAX_BUCKETS],
    }


def _sizes(codes: np.ndarray, contents: np.ndarray) -> dict[str, int]:
    distinct = np.unique(np.concatenate([codes, contents[:, None]], axis=1), axis=0)
    _, sizes = np.unique(distinct[:, :-1], axis=0, return_counts=True)
    return {str(size): count for size, count in sorted(Counter(sizes.tolist()).items()) if size > 1}


def _method(table: SidTable, hashes: Sequence[str], shown: int) -> dict[str, Any]:
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
    captions, mined = annotations(run)
    texts = {
        "id": [item.item_id for item in items],
        "title": [item.title or item.description or item.item_id for item in items],
        "caption": [captions.get(item.item_id, "") for item in items],
        "interest": [mined[item.item_id].summary if item.item_id in mined else "" for item in items],
    }
    budget = min(1200, MAX_TEXT_BYTES // max(len(items), 1))
    return {name: [clip(text, int(budget * SHARES[name])) for text in column] for name, column in texts.items()}


def clip(text: str, max_bytes: int) -> str:
    """`text`, shortened with an ellipsis where needed, so that it takes at most `max_bytes` in the page's JSON."""
    size, kept = len(embedded_json(text).encode()), text
    while size > max_bytes and kept:
        kept = kept[: min(len(kept) - 1, len(kept) * max_bytes // size)].rstrip()
        size = len(embedded_json(kept + "…").encode())
    return text if kept == text else kept + "…"


def embedded_json(value: Any) -> str:
    """JSON for a script element. It contains no character that can end the element or begin markup."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates have no UTF-8


def _categories(items: Sequence[Item]) -> dict[str, list]:
    """Distinct category paths, and the index of each item's path. Writing the names once keeps the page small."""
    paths: dict[tuple[str, ...], int] = {}
    of_item = [paths.setdefault(tuple(clip(name, 40) for name in item.categories[:6]), len(paths)) for item in items]
    return {"paths": [list(path) for path in paths], "of": of_item}


def reward_parts(moved: Mapping[str, Any]) -> str:
    """What a row of `moved.parquet` gained of each reward component besides `sid_reward`, those that changed, largest first."""
    parts = {name.removesuffix("_gained"): value for name, value in moved.items() if name.endswith("_gained") and name != "reward_gained"}
    changed = sorted(((name, value) for name, value in parts.items() if abs(value) >= 0.005), key=lambda part: (-abs(part[1]), part[0]))
    return ", ".join(f"{name} {value:+.2f}" for name, value in changed)


def _moved(run: Path, items: Sequence[Item]) -> dict[str, Any] | None:
    """Items whose codes refinement changed, or would have changed, sorted by decreasing gain in reward."""
    if not is_complete(run / "refine"):
        return None
    table = with_text_ids(read_table(run / "refine" / "moved.parquet"))
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
                "parts": reward_parts(row),
            }
            for row in shown[:MAX_MOVED]
        ],
    }
