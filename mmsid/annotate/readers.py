"""Readers of interests, judgements and text quality for later stages: finished folders only, rows of status `ok` only.

`read_rows` and `read_captions` are defined in `mmsid.catalog.annotations`, which the tokenizer reads from as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmsid.annotate.records import Interest
from mmsid.annotation_coverage import report_coverage
from mmsid.artifacts import read_manifest, read_table
from mmsid.catalog import Catalog
from mmsid.catalog.annotations import SENSITIVE, read_captions, read_ok_rows, read_rows
from mmsid.id_columns import with_text_ids

__all__ = [
    "ItemInterests",
    "captions_of",
    "interests_of",
    "read_captions",
    "read_interests",
    "read_judgements",
    "read_rows",
    "read_text_quality",
]


@dataclass(frozen=True)
class ItemInterests:
    """The mined interests of one item. Interests of source "coengagement" are reconstruction targets only, never encoder input."""

    descriptors: tuple[Interest, ...]
    summary: str
    source: str


def read_interests(folder: Path) -> dict[str, ItemInterests]:
    """Item id -> interests. Rows flagged `sensitive` are left out: sensitive traits must not shape a Semantic ID."""
    return {
        row["item_id"]: ItemInterests(
            descriptors=tuple(Interest.model_validate(interest) for interest in json.loads(row["descriptors"])),
            summary=row["summary"],
            source=row["source"],
        )
        for row in read_ok_rows(folder, "interests", ("item_id", "descriptors", "summary", "source"), (SENSITIVE,))
    }


def captions_of(catalog: Catalog, folder: Path | None) -> dict[str, str]:
    """`read_captions` for the items of a catalogue, {} for None. Prints how many items the captions cover.

    Raises:
        ArtifactError: the folder is unusable, or was made from another catalogue.
    """
    if folder is None:
        return {}
    captions = read_captions(folder)
    report_coverage("captions", folder, [item.item_id for item in catalog.items], captions)
    return captions


def interests_of(catalog: Catalog, folder: Path) -> dict[str, ItemInterests]:
    """`read_interests` for the items of a catalogue. Prints how many items the interests cover.

    Raises:
        ArtifactError: the folder is unusable, or was made from another catalogue.
    """
    interests = read_interests(folder)
    report_coverage("interests", folder, [item.item_id for item in catalog.items], interests)
    return interests


def read_judgements(folder: Path) -> dict[tuple[str, int], int]:
    """(item id, index of the descriptor among the item's descriptors, from 0) -> label 0 or 1; quarantined rows are left out."""
    rows = read_ok_rows(folder, "judge", ("item_id", "creative", "label"), ())
    return {(row["item_id"], row["creative"]): int(row["label"]) for row in rows}


def read_text_quality(folder: Path, item_ids: Sequence[str]) -> np.ndarray:
    """q per item of a finished `text_quality` folder, float64 (N,) in [0, 1], in the order of `item_ids`.

    An item without interests gets the mean of the others, which neither rewards nor penalises it; 1 if no item has any.

    Raises:
        ArtifactError: the folder is unfinished, or was written by another stage.
    """
    read_manifest(folder, "text_quality")
    known = {
        row["item_id"]: row["q"] for row in with_text_ids(read_table(Path(folder) / "items.parquet")).to_pylist() if row["q"] is not None
    }
    mean = sum(known.values()) / len(known) if known else 1.0
    return np.array([known.get(item_id, mean) for item_id in item_ids], dtype=np.float64)
