"""The one job runner behind every annotation: units in, typed rows out, nothing lost, nothing doubled, nothing made up.

The units are cut, in the catalogue's canonical order, into shards of fixed content. A shard is annotated in batches sorted by
length and written in one atomic step, so a job killed at any moment resumes at the first missing shard and ends with the very
rows of an undisturbed run; answers given inside the lost shard are still in the cache. Accounting is exact:
in = ok + quarantined(reason). Only one shard's rows are held at a time (on Ray: those that are under way).

Where the work is done changes nothing about the rows: in this process, in every process of `accelerate launch` (each takes
every n-th shard), or in the actors of a Ray cluster (each takes pieces of shards); a draft begun by one is finished by another.

Error-rate gate: when too many attempted units are quarantined, nothing is published and the stage fails. The draft folder
keeps every row; the next run of the same configuration tries the quarantined units again and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from mmsid.annotate.annotator import Annotator, Cache, batched, job_identity
from mmsid.annotate.cache import AnnotationCache
from mmsid.annotate.distributed import JobProcesses
from mmsid.annotate.generator import PASSING, Generator
from mmsid.annotate.job_config import EXCUSED, JobConfig, JobInput, Task
from mmsid.annotate.job_counts import JobCounts
from mmsid.annotate.records import Record
from mmsid.artifacts import Draft, read_table, sha256, write_json, write_table
from mmsid.errors import AnnotationError, ArtifactError
from mmsid.progress import track
from mmsid.ray_pool import Engine

if TYPE_CHECKING:
    from mmsid.annotate.ray_backend import RayAnnotation

GATE_FILE = "gate.json"


def annotate(
    units: Iterable[JobInput], total: int, task: Task, generator: Generator, config: JobConfig, draft: Draft, engine: Engine = "local"
) -> None:
    """Annotate `units` into `draft.path/shards/part-NNNNN.parquet`; fill the draft's counts.

    Args:
        units: in canonical order, (item_id, creative) unique; read once, never held.
        total: how many they are, for the progress bar.
        draft: opened with `resume=True`; shards that a killed run finished there are kept when they hold the same units.
        engine: where the rows are made (see the module's text); not part of what they are.

    Raises:
        AnnotationError: reason `gate`, when more than `max_quarantined` of the attempted units failed (see the module's text);
            reason `cache_unreadable`; reason `server_gone`, when a server stopped answering altogether.
        ConfigError: the model cannot be used; Ray is asked for and not installed, or its cluster is too small.
    """
    ranks = JobProcesses(draft.path)
    if engine == "ray":
        from mmsid.annotate.ray_backend import RayAnnotation  # Ray is an extra, and takes a second to import

        with RayAnnotation(task, generator, config) as fleet:
            job = _Job(task, generator, config, draft, fleet.cache, ranks)
            _watch(job.run_on(fleet, units), task, total)
            work = fleet.work
    else:
        with AnnotationCache(config.cache) as cache, Annotator(task, generator, config, cache) as annotator:
            job = _Job(task, generator, config, draft, cache, ranks)
            _watch(job.run(annotator, units), task, total)
            work = annotator.work
    job.tally.work.update(work)
    job.close()


def _watch(steps: Iterator[int | None], task: Task, total: int) -> None:
    for _ in track(steps, what=task.what, total=total, unit="rows", size=lambda rows: 1 if rows is None else rows):
        pass


@dataclass(frozen=True)
class _Shard:
    """One file to be: its place, its units, and the hash of what it is made from."""

    path: Path
    units: list[JobInput]
    digest: str


class _Job:
    def __init__(self, task: Task, generator: Generator, config: JobConfig, draft: Draft, cache: Cache, ranks: JobProcesses) -> None:
        self.task, self.config, self.draft, self.cache, self.ranks = task, config, draft, cache, ranks
        self.shards = draft.path / "shards"
        self.identity = job_identity(task, generator, config)
        self.tally = JobCounts()

    def run(self, annotator: Annotator, units: Iterable[JobInput]) -> Iterator[int | None]:
        """Yield once per finished unit (None), and once per shard that was finished earlier (its rows)."""
        for shard in self._missing(units):
            if isinstance(shard, int):
                yield shard
            else:
                self._write(shard, (yield from annotator.rows(shard.units)))

    def run_on(self, fleet: RayAnnotation, units: Iterable[JobInput]) -> Iterator[int]:
        """The same over the actors of a `RayAnnotation`, yielding numbers of rows; shards are written as their last piece comes home."""
        finished: list[int] = []

        def to_do() -> Iterator[_Shard]:
            for shard in self._missing(units):
                if isinstance(shard, int):
                    finished.append(shard)
                else:
                    yield shard

        # what waits for its rows keeps its name only: the units of all shards at once would not be flat memory
        for shard, rows, advanced in fleet.rows((replace(shard, units=[]), shard.units) for shard in to_do()):
            yield from finished
            finished.clear()
            yield advanced
            if rows is not None:
                self._write(shard, rows)
        yield from finished

    def close(self) -> None:
        """Bring the ranks together, hand the counts over and hold the gate (rank 0 does)."""
        if not self.ranks.gather(self.tally):
            return
        tally, limit = self.tally, self.config.max_quarantined
        attempted = tally.counts["in"] - tally.excused
        failed = tally.counts["quarantined"] - tally.excused
        passed = failed <= limit * attempted
        self.draft.counts.update(tally.counts)
        self.draft.extra.update(
            reasons=tally.most_common("reasons"),
            flags=tally.most_common("flags"),
            work=dict(tally.work),
            processes=self.ranks.count,
            gate={"passed": passed, "attempted": attempted, "failed": failed, "max_quarantined": limit},
        )
        gate = self.draft.path / GATE_FILE
        if passed:
            gate.unlink(missing_ok=True)
            return
        write_json(gate, {"counts": self.draft.counts, **self.draft.extra})
        top = ", ".join(f"{reason} {count:,}" for reason, count in list(tally.most_common("reasons").items())[:5])
        raise AnnotationError(
            "gate",
            f"{self.task.what}: {failed:,} of {attempted:,} attempted rows were quarantined ({failed / attempted:.1%}, "
            f"max_quarantined is {limit:.1%}); reasons: {top}. Nothing was published; every row is kept in {self.shards}. "
            "Mend the cause and run again: only the quarantined rows are tried again. Or raise max_quarantined.",
        )

    # The walk over the shards

    def _missing(self, units: Iterable[JobInput]) -> Iterator[_Shard | int]:
        """This rank's shards in order: what must still be made, or how many rows an earlier run finished (they are counted here)."""
        self.ranks.begin(self._tidy)
        again = (self.draft.path / GATE_FILE).exists()
        shards = 0
        for index, chunk in enumerate(batched(units, self.config.shard_rows)):
            shards += 1
            if index % self.ranks.count != self.ranks.index:
                continue
            if len({(unit.item_id, unit.creative) for unit in chunk}) != len(chunk):
                what = self.task.what
                raise AnnotationError("duplicate_unit", f"{what}: an (item_id, creative) pair stands twice among the units; this is a bug")
            shard = _Shard(self.shards / f"part-{index:05d}.parquet", chunk, self._digest(chunk))
            table = self._finished(shard)
            if table is not None and not self._worth_another_try(table, again):
                self.tally.add(table)
                yield len(chunk)
            else:
                yield shard
        if self.ranks.index == 0:
            for stale in set(self.shards.glob("*.parquet")) - {self.shards / f"part-{index:05d}.parquet" for index in range(shards)}:
                stale.unlink()

    def _tidy(self) -> None:
        self.shards.mkdir(exist_ok=True)
        for torn in self.shards.glob(".*.tmp"):  # left by a kill in the middle of a write
            torn.unlink()

    def _finished(self, shard: _Shard) -> pa.Table | None:
        """A shard that an earlier run completed over exactly these units, else None. Its answers go where this run looks for them."""
        if not shard.path.is_file():
            return None
        try:
            table = read_table(shard.path)
        except ArtifactError:
            return None
        if (table.schema.metadata or {}).get(b"content_sha256") != shard.digest.encode():
            return None
        self._remember(table)
        return table

    def _worth_another_try(self, table: pa.Table, again: bool) -> bool:
        """Whether a row was quarantined for a reason that may have passed, or for any at all after a gate that did not open."""
        reasons = set(table["reason"].unique().to_pylist()) - {None}
        return bool(reasons & PASSING) or (again and bool(reasons - EXCUSED))

    def _remember(self, table: pa.Table) -> None:
        """Duplicates and redone shards shall cost nothing. A cache that has the shard's first answer has had them all."""
        good = table.filter(pc.equal(table["status"], "ok"))
        if len(good) == 0 or self.cache.get([good["input_sha256"][0].as_py()]):
            return
        outcomes = {}
        for row in good.to_pylist():
            record = {name: _from_column(self.task.record, name, row[name]) for name in self.task.record.model_fields}
            outcomes[row["input_sha256"]] = {"record": record, "flags": row["flags"], "attempts": row["attempts"]}
        self.cache.put(outcomes)

    def _digest(self, chunk: Sequence[JobInput]) -> str:
        """What a shard is made from. File sizes and times stand in for the pictures' bytes: a false alarm costs only cache hits."""
        units = [[u.item_id, u.creative, u.evidence, u.reason, [[str(path), *_stamp(path)] for path in u.pictures]] for u in chunk]
        return sha256({"identity": self.identity, "units": units})

    def _write(self, shard: _Shard, rows: list[dict[str, Any]]) -> None:
        table = pa.Table.from_pylist(rows, schema=self.task.schema)
        write_table(shard.path, table, {"content_sha256": shard.digest})
        self.tally.add(table)


def _from_column(record: type[Record], name: str, text: str) -> Any:
    return text if record.model_fields[name].annotation is str else json.loads(text)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (-1, -1)
    return status.st_size, status.st_mtime_ns
