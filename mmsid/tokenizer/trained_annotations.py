"""Annotations that a tokenizer was trained with, and the check that the items to encode have them, too.

A tokenizer folder does not hold the annotations, but its manifest records the folders that training (or refinement) read. A bundle
copies that record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmsid.annotation_coverage import STAGES, Coverage
from mmsid.artifacts import is_complete, manifest_folder, read_manifest
from mmsid.errors import ConfigError
from mmsid.tokenizer.inputs import FieldName

RECORD = "annotations"  # key of a manifest's `extra`
_FIELDS: dict[str, FieldName] = {"captions": "caption", "interests": "interests"}


def coverage_record(coverage: Sequence[Coverage]) -> dict[str, Any]:
    """Coverage of the training catalogue, for the manifest of a tokenizer."""
    return {
        one.key: {"covered": one.covered, "items": one.items, "without_row": len(one.without_row)} for one in coverage if one.covered > 0
    }


def trained_annotations(tokenizer: Path, use: Sequence[FieldName]) -> dict[str, Mapping[str, int]]:
    """Annotations that a tokenizer was trained with and reads: configuration key -> coverage at training ({} if not recorded).

    Args:
        tokenizer: tokenizer folder, also inside the folder of a refinement, or a bundle. Others, such as hub models, give {}.
        use: the fields that the tokenizer reads.
    """
    folder = manifest_folder(tokenizer)
    if not is_complete(folder):
        return {}
    manifest = read_manifest(folder)
    recorded = manifest.get("extra", {}).get(RECORD)
    if recorded is None:  # written by an earlier version, or by a stage that changes a tokenizer
        recorded = {key: {} for key in _FIELDS if key in manifest["inputs"]}
    earlier = manifest["input_paths"].get("tokenizer")
    if earlier is not None and Path(earlier).is_dir() and Path(earlier).resolve() != folder.resolve():
        recorded = recorded | trained_annotations(Path(earlier), use)
    return {key: known for key, known in recorded.items() if _FIELDS[key] in use}


def check_annotations(
    trained: Mapping[str, Mapping[str, int]],
    given: Mapping[str, Path | None],
    coverage: Mapping[str, Coverage],
    new: Sequence[str],
    appending: bool,
) -> None:
    """Refuse to encode items without an annotation that the tokenizer was trained with.

    A new item needs a row in the annotation folder; the row may lack a usable text. When a whole catalogue is encoded, as many items may
    lack a row as did in training.

    Args:
        trained: as `trained_annotations`.
        given: configuration key -> annotation folder of the catalogue.
        coverage: configuration key -> coverage of the catalogue by that folder.
        new: ids of the items to encode.
        appending: whether published codes stay and `new` are only the new items.

    Raises:
        ConfigError: too many items lack a row. The message gives three of them and the remedy.
    """
    for key, known in trained.items():
        without = frozenset(coverage[key].without_row if key in coverage else new)
        lacking = [item_id for item_id in new if item_id in without]
        allowed = 0 if appending or key not in coverage else known.get("without_row", len(lacking))
        if len(lacking) <= allowed:
            continue
        where = f"have no row in {given[key]} (assign.{key})" if given[key] is not None else f"have none, because assign.{key} is not set"
        examples = ", ".join(map(repr, lacking[:3])) + (", ..." if len(lacking) > 3 else "")
        raise ConfigError(
            f"assign: the tokenizer was trained with {key}, but {len(lacking):,} of {len(new):,} {'new ' if appending else ''}items "
            f"{where}: {examples}. Their codes would differ from those made with {key}, and published codes stay. Run the stage "
            f"{STAGES[key]} for this catalogue first (earlier answers come from its cache) and set assign.{key} to its folder, or set "
            "assign.allow_missing_annotations=true"
        )
