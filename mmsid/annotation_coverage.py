"""How many items of a catalogue have captions or interests, told in one line; a folder of another catalogue is an error.

An item is *covered* if its row in the folder has a usable text. An item without any row was never annotated, while a row without a
usable text (no picture, quarantined, sensitive) says that the annotation was tried.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmsid.artifacts import read_manifest, read_table
from mmsid.errors import ArtifactError
from mmsid.id_columns import with_text_ids
from mmsid.progress import done

STAGES = {"captions": "caption", "interests": "interests"}  # configuration key -> stage that writes the folder


@dataclass(frozen=True)
class Coverage:
    """Coverage of a catalogue by one annotation folder.

    Attributes:
        key: "captions" or "interests".
        items: number of items of the catalogue.
        covered: number of items with a usable text.
        without_row: ids of the items that the folder has no row for, in the order of the catalogue.
    """

    key: str
    items: int
    covered: int
    without_row: tuple[str, ...]

    def line(self) -> str:
        """`captions cover 60 of 70 items (no row for 8, no usable text for 2)`."""
        tried = self.items - self.covered - len(self.without_row)
        gaps = [f"no row for {len(self.without_row):,}"] if self.without_row else []
        gaps += [f"no usable text for {tried:,}"] if tried else []
        return f"{self.key} cover {self.covered:,} of {self.items:,} items" + (f" ({', '.join(gaps)})" if gaps else "")


def report_coverage(key: str, folder: Path, item_ids: Sequence[str], usable: Collection[str]) -> Coverage:
    """Print the coverage of a catalogue by the annotation folder and return it.

    Args:
        key: "captions" or "interests".
        item_ids: ids of the catalogue's items.
        usable: ids that have a usable text in the folder.

    Raises:
        ArtifactError: the folder is unfinished or of another stage, or none of its ids is an item of the catalogue.
    """
    annotated = _annotated_ids(Path(folder), STAGES[key])
    if item_ids and annotated.keys().isdisjoint(item_ids):
        raise ArtifactError(_nothing_in_common(key, folder, item_ids, list(annotated)))
    covered = sum(item_id in usable for item_id in item_ids)
    coverage = Coverage(key, len(item_ids), covered, tuple(item_id for item_id in item_ids if item_id not in annotated))
    done(coverage.line())
    return coverage


def _annotated_ids(folder: Path, stage: str) -> dict[str, None]:
    """Ids of all rows of a finished annotation folder, in their order."""
    read_manifest(folder, stage)
    found: dict[str, None] = {}
    for path in sorted((folder / "shards").glob("part-*.parquet")):
        found |= dict.fromkeys(with_text_ids(read_table(path))["item_id"].to_pylist())
    return found


def _nothing_in_common(key: str, folder: Path, item_ids: Sequence[str], annotated: Sequence[str]) -> str:
    if not annotated:
        return f"{key}: {folder} has no row at all; run the stage {STAGES[key]} for this catalogue"
    same = {_bare(item_id) for item_id in item_ids} & {_bare(item_id) for item_id in annotated}
    cause = (
        f"the same ids are written in another way ({len(same):,} agree without leading zeros, `.0`, blanks and case); write them alike"
        if same
        else f"the folder was probably made from another catalogue; run the stage {STAGES[key]} for this catalogue, or correct the path"
    )
    return (
        f"{key} cover 0 of {len(item_ids):,} items: none of the {len(annotated):,} ids in {folder} is an item of this catalogue. "
        f"The folder has {_three(annotated)}, the catalogue {_three(item_ids)}; {cause}"
    )


def _three(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:3])) + (", ..." if len(ids) > 3 else "")


def _bare(item_id: str) -> str:
    return re.sub(r"\.0+$", "", item_id.strip().casefold()).lstrip("0")
