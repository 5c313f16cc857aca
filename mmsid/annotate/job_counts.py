"""Counts of an annotation job: rows by status, reason and flag, and the work of the generator."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from mmsid.annotate.job_inputs import NO_INPUT


@dataclass
class JobCounts:
    """Counts over the shards of a job.

    Attributes:
        counts: rows `in`, `ok` and `quarantined` (in = ok + quarantined).
        reasons, flags: rows per reason code and per flag.
        work: see `Annotator.work`.
        no_input: quarantined rows that had nothing to annotate; the error-rate gate leaves them out.
    """

    counts: Counter[str] = field(default_factory=lambda: Counter({"in": 0, "ok": 0, "quarantined": 0}))
    reasons: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    work: Counter[str] = field(default_factory=Counter)
    no_input: int = 0

    def add(self, rows: pa.Table) -> None:
        """Count the rows of one shard."""
        self.counts["in"] += len(rows)
        self.counts.update(_value_counts(rows["status"]))
        self.reasons.update(reasons := _value_counts(rows["reason"]))
        self.flags.update(_value_counts(pc.list_flatten(rows["flags"])))
        self.no_input += sum(count for reason, count in reasons.items() if reason in NO_INPUT)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, for another process."""
        counters = {name: dict(getattr(self, name)) for name in ("counts", "reasons", "flags", "work")}
        return counters | {"no_input": self.no_input}

    def merge(self, other: dict[str, Any]) -> None:
        """Add the counts of another process (its `to_dict`)."""
        for name in ("counts", "reasons", "flags", "work"):
            getattr(self, name).update(other[name])
        self.no_input += other["no_input"]

    def most_common(self, name: Literal["reasons", "flags"]) -> dict[str, int]:
        """Counts in descending order, ties by name. The order of the shards does not matter."""
        return dict(sorted(getattr(self, name).items(), key=lambda entry: (-entry[1], entry[0])))


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {str(entry["values"]): entry["counts"] for entry in column.value_counts().to_pylist() if entry["values"] is not None}
