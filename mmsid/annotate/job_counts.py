"""The exact account of a job: how many rows came to what, and how much work it was."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from mmsid.annotate.job_config import EXCUSED


@dataclass
class JobCounts:
    """`counts` of rows (in = ok + quarantined), `reasons` and `flags` of rows, `work` of the generator; `excused` are no failures."""

    counts: Counter[str] = field(default_factory=lambda: Counter({"in": 0, "ok": 0, "quarantined": 0}))
    reasons: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    work: Counter[str] = field(default_factory=Counter)
    excused: int = 0

    def add(self, rows: pa.Table) -> None:
        """Count the rows of one shard."""
        self.counts["in"] += len(rows)
        self.counts.update(_counted(rows["status"]))
        self.reasons.update(reasons := _counted(rows["reason"]))
        self.flags.update(_counted(pc.list_flatten(rows["flags"])))
        self.excused += sum(count for reason, count in reasons.items() if reason in EXCUSED)

    def plain(self) -> dict[str, Any]:
        """As JSON-able data, for another process."""
        counters = {name: dict(getattr(self, name)) for name in ("counts", "reasons", "flags", "work")}
        return counters | {"excused": self.excused}

    def merge(self, other: dict[str, Any]) -> None:
        """Add what another process counted (its `plain`)."""
        for name in ("counts", "reasons", "flags", "work"):
            getattr(self, name).update(other[name])
        self.excused += other["excused"]

    def most_common(self, name: Literal["reasons", "flags"]) -> dict[str, int]:
        """Counts, the largest first, ties by name: the order in which shards came does not matter."""
        return dict(sorted(getattr(self, name).items(), key=lambda entry: (-entry[1], entry[0])))


def _counted(column: pa.ChunkedArray) -> dict[str, int]:
    return {str(entry["values"]): entry["counts"] for entry in column.value_counts().to_pylist() if entry["values"] is not None}
