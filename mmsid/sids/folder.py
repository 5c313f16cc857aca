"""SID folders: a SID table, its intrinsic metrics and its exports, as written by the stages assign, baselines and refine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmsid.artifacts import write_json
from mmsid.sids.exports import write_index_json
from mmsid.sids.table import FILE_NAME, SidTable
from mmsid.sids.trie import Trie

INTRINSIC = "intrinsic.json"


def write_sid_folder(path: Path, table: SidTable, metrics: Mapping[str, Any]) -> None:
    """Write sids.parquet, intrinsic.json, index.json and trie.safetensors into `path`, which is created if absent."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / INTRINSIC, metrics)
    write_index_json(path / "index.json", table)
    Trie.from_table(table).save(path / "trie.safetensors")
    table.save(path / FILE_NAME)
