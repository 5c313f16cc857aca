"""Problems of an ingested catalogue, counted by code, with examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc

from mmsid.artifacts import read_table
from mmsid.catalog.ingest.writing import PROBLEMS

_EXAMPLES = 3


@dataclass(frozen=True)
class Problem:
    """One code of `Catalog.problems`: how often it occurs, and the first items with file, row and detail."""

    code: str
    count: int
    examples: tuple[str, ...]


def problems(folder: Path, examples: int = _EXAMPLES) -> list[Problem]:
    """Problems of the items in `folder`, sorted by code. Problems of histories are only counted, and are not in this list.

    Raises:
        ArtifactError: problems.parquet is missing or damaged.
    """
    table = read_table(folder / PROBLEMS)
    found = []
    for code in sorted(pc.unique(table["code"]).to_pylist()):
        rows = table.filter(pc.equal(table["code"], code))
        found.append(Problem(code, rows.num_rows, tuple(map(_text, rows.slice(0, examples).to_pylist()))))
    return found


def text(found: list[Problem]) -> str:
    """The problems as lines of text."""
    return "".join(f"{one.code}: {one.count:,}\n" + "".join(f"  {example}\n" for example in one.examples) for one in found)


def _text(row: dict) -> str:
    detail = f": {row['detail']}" if row["detail"] else ""
    return f"{row['item_id'] or 'no id'} ({row['file']}, row {row['row']}){detail}"
