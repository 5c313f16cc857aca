"""Counts of an annotation job: rows by status, reason and flag, and the work of the generator."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

_COUNTERS = ("counts", "reasons", "flags", "failures", "work")


@dataclass
class JobCounts:
    """Counts over the shards of a job.

    Attributes:
        counts: rows `in`, `ok` and `quarantined` (in = ok + quarantined).
        reasons, flags: rows per reason code and per flag.
        failures: rows per reason code, only of rows that had something to ask the model for.
        work: see `Annotator.work`.
        not_asked: quarantined rows without a request: nothing to annotate, or a picture that the catalogue had refused.
        examples: reason -> the rejected text of the first row that has one.
    """

    counts: Counter[str] = field(default_factory=lambda: Counter({"in": 0, "ok": 0, "quarantined": 0}))
    reasons: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    work: Counter[str] = field(default_factory=Counter)
    not_asked: int = 0
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def asked(self) -> int:
        """Rows that the model was asked for."""
        return self.counts["in"] - self.not_asked

    @property
    def failed(self) -> int:
        """Asked rows that were quarantined."""
        return self.counts["quarantined"] - self.not_asked

    def add(self, rows: pa.Table, not_asked: Counter[str]) -> None:
        """Count the rows of one shard. `not_asked`: its rows without a request, per reason."""
        self.counts["in"] += len(rows)
        self.counts.update(_value_counts(rows["status"]))
        self.reasons.update(reasons := Counter(_value_counts(rows["reason"])))
        self.flags.update(_value_counts(pc.list_flatten(rows["flags"])))
        self.failures.update(reasons - not_asked)
        self.not_asked += not_asked.total()
        if self.failures.keys() - self.examples.keys():
            for row in rows.select(["reason", "rejected"]).filter(pc.is_valid(rows["rejected"])).to_pylist():
                self.examples.setdefault(row["reason"], row["rejected"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, for another process."""
        counters = {name: dict(getattr(self, name)) for name in _COUNTERS}
        return counters | {"not_asked": self.not_asked, "examples": self.examples}

    def merge(self, other: dict[str, Any]) -> None:
        """Add the counts of another process (its `to_dict`)."""
        for name in _COUNTERS:
            getattr(self, name).update(other[name])
        self.not_asked += other["not_asked"]
        self.examples = other["examples"] | self.examples

    def most_common(self, name: Literal["reasons", "flags", "failures"]) -> dict[str, int]:
        """Counts in descending order, ties by name. The order of the shards does not matter."""
        return dict(sorted(getattr(self, name).items(), key=lambda entry: (-entry[1], entry[0])))


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {str(entry["values"]): entry["counts"] for entry in column.value_counts().to_pylist() if entry["values"] is not None}
