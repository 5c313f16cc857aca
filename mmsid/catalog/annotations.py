"""Readers of finished annotation folders: checked rows, and captions per item.

The stages that write such folders and the stages that consume them both build on these functions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmsid.artifacts import read_manifest, read_table, verify_folder
from mmsid.errors import ArtifactError
from mmsid.id_columns import with_text_ids

SENSITIVE = "sensitive"  # flag of texts about health, faith, politics and similar traits


def read_rows(folder: Path, stage: str, columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """All rows of a finished annotation folder in canonical order, quarantined rows included.

    Args:
        stage: the stage that must have written the folder.
        columns: the columns to read; all by default.

    Raises:
        ArtifactError: the folder is unfinished or was written by another stage, a file is missing or damaged, or a column is missing.
    """
    read_manifest(folder, stage)
    verify_folder(folder)
    for path in sorted((Path(folder) / "shards").glob("part-*.parquet")):
        table = with_text_ids(read_table(path))
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise ArtifactError(f"{path}: column {missing[0]!r} is missing (found {table.column_names}); run the stage {stage} again")
        yield from (table.select(list(columns)) if columns else table).to_pylist()


def read_ok_rows(folder: Path, stage: str, columns: Sequence[str], without_flags: Collection[str]) -> Iterator[dict[str, Any]]:
    """As `read_rows`, only rows of status `ok` that carry none of the flags in `without_flags`."""
    for row in read_rows(folder, stage, [*columns, "status", "flags"]):
        if row["status"] == "ok" and not set(row["flags"] or ()) & set(without_flags):
            yield row


def read_captions(folder: Path, without_flags: Collection[str] = ()) -> dict[str, str]:
    """Item id -> caption. The captions of several creatives are joined by " ; " in the order of the creatives, each text once.

    Args:
        without_flags: rows that carry one of these flags are left out.
    """
    parts: dict[str, list[tuple[int, str]]] = {}
    for row in read_ok_rows(folder, "caption", ("item_id", "creative", "caption"), without_flags):
        parts.setdefault(row["item_id"], []).append((row["creative"] or 0, row["caption"]))
    return {item_id: " ; ".join(dict.fromkeys(text for _, text in sorted(found))) for item_id, found in parts.items()}
