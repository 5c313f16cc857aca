"""How later stages read annotations: finished folders only, good rows only."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmsid.annotate.records import Interest
from mmsid.annotate.text_flags import SENSITIVE
from mmsid.artifacts import read_manifest, read_table, verify_folder


@dataclass(frozen=True)
class ItemInterests:
    """The mined interests of one item. Rows of source "coengagement" may be reconstructed but never read by an encoder."""

    descriptors: tuple[Interest, ...]
    summary: str
    source: str


def read_rows(folder: Path, stage: str) -> Iterator[dict[str, Any]]:
    """Every row of a finished annotation folder, quarantined ones included, in canonical order.

    Raises:
        ArtifactError: the folder is unfinished, was written by another stage, or a file of it is missing or damaged.
    """
    read_manifest(folder, stage)
    verify_folder(folder)
    for shard in sorted((Path(folder) / "shards").glob("part-*.parquet")):
        yield from read_table(shard).to_pylist()


def read_captions(folder: Path, without_flags: Collection[str] = ()) -> dict[str, str]:
    """item id -> caption; those of several creatives are joined by " ; ", the same text only once.

    Args:
        without_flags: rows that carry one of these flags are left out.
    """
    captions: dict[str, list[str]] = {}
    for row in _good(folder, "caption", without_flags):
        known = captions.setdefault(row["item_id"], [])
        if row["caption"] not in known:
            known.append(row["caption"])
    return {item_id: " ; ".join(found) for item_id, found in captions.items()}


def read_interests(folder: Path, without_flags: Collection[str] = (SENSITIVE,)) -> dict[str, ItemInterests]:
    """item id -> interests. Rows flagged `sensitive` are left out unless asked for: such words must not shape a Semantic ID."""
    return {
        row["item_id"]: ItemInterests(
            descriptors=tuple(Interest.model_validate(interest) for interest in json.loads(row["descriptors"])),
            summary=row["summary"],
            source=row["source"],
        )
        for row in _good(folder, "interests", without_flags)
    }


def read_judgements(folder: Path) -> dict[tuple[str, int], int]:
    """(item id, place of the descriptor among the item's, from 0) -> label 0 or 1; quarantined ones are left out."""
    return {(row["item_id"], row["creative"]): int(row["label"]) for row in _good(folder, "judge", ())}


def read_text_quality(folder: Path, item_ids: Sequence[str]) -> np.ndarray:
    """q per item of a finished `text_quality` folder, float64 (N,) in [0, 1], in the order of `item_ids`.

    An item whose interests are missing gets the mean of the others, so that it is neither favoured nor punished; 1 where none has any.

    Raises:
        ArtifactError: the folder is unfinished, or was written by another stage.
    """
    read_manifest(folder, "text_quality")
    known = {row["item_id"]: row["q"] for row in read_table(Path(folder) / "items.parquet").to_pylist() if row["q"] is not None}
    mean = sum(known.values()) / len(known) if known else 1.0
    return np.array([known.get(item_id, mean) for item_id in item_ids], dtype=np.float64)


def _good(folder: Path, stage: str, without_flags: Collection[str]) -> Iterator[dict[str, Any]]:
    for row in read_rows(folder, stage):
        if row["status"] == "ok" and not set(row["flags"]) & set(without_flags):
            yield row
