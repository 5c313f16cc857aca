"""Problems of an ingested catalogue, with examples, as text."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc

from mmsid.artifacts import read_table
from mmsid.catalog.ingest.writing import PROBLEMS

_EXAMPLES = 3


def examples(folder: Path, count: int = _EXAMPLES) -> str:
    """The first `count` items of each code in `problems.parquet`, one line each. '' if there are no problems.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    problems = read_table(folder / PROBLEMS)
    lines = []
    for code in sorted(pc.unique(problems["code"]).to_pylist()):
        rows = problems.filter(pc.equal(problems["code"], code))
        lines.append(f"{code}: {rows.num_rows:,}")
        for row in rows.slice(0, count).to_pylist():
            detail = f": {row['detail']}" if row["detail"] else ""
            lines.append(f"  {row['item_id'] or 'no id'} ({row['file']}, row {row['row']}){detail}")
    return "".join(f"{line}\n" for line in lines)
