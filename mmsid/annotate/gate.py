"""Error-rate gate of an annotation job: it judges the rows that the model was asked for, early in the job and at its end.

A row that the catalogue knew to be unusable (no text, a missing picture) is quarantined without a request and never counts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmsid.annotate.job_counts import JobCounts
from mmsid.annotate.job_inputs import JobInput
from mmsid.artifacts import write_json
from mmsid.errors import AnnotationError

GATE_FILE = "gate.json"
EARLY_ROWS = 200  # asked rows after which a job is stopped if most of them failed
EARLY_SHARE = 0.5  # that must fail for it, unless `max_quarantined` allows more
_QUOTED = 100  # characters of a rejected text in a message


class Gate:
    """The gate of one job in one process.

    Args:
        stage: name of the stage, for messages.
        draft: folder of the draft; a refusal is recorded there in `gate.json`.
        limit: largest share of the asked rows that may fail.
    """

    def __init__(self, stage: str, draft: Path, limit: float) -> None:
        self.stage, self.limit, self._file, self._kept = stage, limit, draft / GATE_FILE, draft / "shards"
        self._early: JobCounts | None = JobCounts()  # None after the decision

    def refused_before(self) -> bool:
        """True if an earlier run was refused and its rows would be refused under the present limit, too."""
        try:
            gate = json.loads(self._file.read_text(encoding="utf-8"))["gate"]
            return not self._passes(gate["failed"], gate["attempted"])
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError):
            return True

    def pieces(self, inputs: Sequence[JobInput]) -> Iterator[Sequence[JobInput]]:
        """The inputs in one piece, or in two pieces of which the first ends where the early decision is due."""
        end = len(inputs)
        if self._early is not None:
            missing = EARLY_ROWS - self._early.asked
            for at, one in enumerate(inputs):
                missing -= one.reason is None
                if missing == 0:
                    end = at + 1
                    break
        yield inputs[:end]
        if end < len(inputs):
            yield inputs[end:]

    def add(self, rows: pa.Table, not_asked: Counter[str]) -> None:
        """Count new rows until the early decision. `not_asked`: those without a request, per reason.

        Raises:
            AnnotationError: reason `gate`, if most of the first `EARLY_ROWS` asked rows failed and the limit does not allow it.
        """
        if self._early is None:
            return
        self._early.add(rows, not_asked)
        if self._early.asked < EARLY_ROWS:
            return
        counts, self._early = self._early, None
        if counts.failed > max(EARLY_SHARE, self.limit) * counts.asked:
            write_json(self._file, {"stopped_early": True, **self._report(counts)})
            raise AnnotationError(
                "gate",
                f"{self.stage}: {counts.failed:,} of the first {counts.asked:,} rows that the model was asked for failed "
                f"({counts.failed / counts.asked:.1%}), so the job stopped early; reasons: {_reasons(counts)}. Nothing was published; "
                f"finished rows are kept in {self._kept}. Fix the cause and run again, or raise max_quarantined above that share.",
            )

    def judge(self, counts: JobCounts) -> dict[str, Any]:
        """The report of the finished job for its manifest.

        Raises:
            AnnotationError: reason `gate`, if more than the limit of the asked rows failed.
        """
        report = self._report(counts)
        if report["gate"]["passed"]:
            self._file.unlink(missing_ok=True)
            return report
        write_json(self._file, {"counts": dict(counts.counts), **report})
        raise AnnotationError(
            "gate",
            f"{self.stage}: {counts.failed:,} of {counts.asked:,} attempted rows were quarantined ({counts.failed / counts.asked:.1%}, "
            f"max_quarantined is {self.limit:.1%}); reasons: {_reasons(counts)}. Nothing was published; every row is kept in {self._kept}. "
            "Fix the cause and run again (only the quarantined rows are tried again), or raise max_quarantined (the rows are then accepted "
            "as they are).",
        )

    def _passes(self, failed: int, asked: int) -> bool:
        return failed <= self.limit * asked

    def _report(self, counts: JobCounts) -> dict[str, Any]:
        gate = {"passed": self._passes(counts.failed, counts.asked), "attempted": counts.asked, "failed": counts.failed}
        return {
            "reasons": counts.most_common("reasons"),
            "flags": counts.most_common("flags"),
            "work": dict(counts.work),
            "gate": gate | {"not_asked": counts.not_asked, "max_quarantined": self.limit},
        }


def _reasons(counts: JobCounts) -> str:
    """The five most frequent reasons of the failed rows with their counts and the start of one rejected text each."""
    found = []
    for reason, count in counts.most_common("failures").items():
        example = " ".join(counts.examples.get(reason, "").split())
        quoted = f" ({example[:_QUOTED].rstrip()}{'...' if len(example) > _QUOTED else ''})" if example else ""
        found.append(f"{reason} {count:,}{quoted}")
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return ", ".join(found[:5]) + more
