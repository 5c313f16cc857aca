"""Job runner of all annotation stages: inputs in, typed rows out, in shards that are written atomically.

Inputs are cut into shards in the catalogue's canonical order. A killed job resumes at the first missing shard and ends with the same
rows as an undisturbed run. Counts are exact: in = ok + quarantined. Rows are the same from one process, from `accelerate launch`
(every process takes every n-th shard) and from Ray actors (pieces of shards); any of them can resume a draft of another.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from mmsid.annotate.alike import mostly_alike
from mmsid.annotate.annotator import Annotator, Cache, batched, job_identity
from mmsid.annotate.cache import AnnotationCache
from mmsid.annotate.distributed import JobProcesses
from mmsid.annotate.gate import Gate
from mmsid.annotate.generator import TRANSIENT, Generator
from mmsid.annotate.job_config import JobConfig
from mmsid.annotate.job_counts import JobCounts
from mmsid.annotate.job_inputs import JobInput, Task, not_asked
from mmsid.annotate.records import Record
from mmsid.artifacts import Draft, read_table, sha256, write_table
from mmsid.errors import AnnotationError, ArtifactError
from mmsid.id_columns import with_id_column
from mmsid.progress import track
from mmsid.ray_pool import Engine

if TYPE_CHECKING:
    from mmsid.annotate.ray_backend import RayAnnotation


def annotate(
    inputs: Iterable[JobInput], total: int, task: Task, generator: Generator, config: JobConfig, draft: Draft, engine: Engine = "local"
) -> None:
    """Annotate `inputs` into `draft.path/shards/part-NNNNN.parquet` and fill the draft's counts.

    Error-rate gate: if more than `config.max_quarantined` of the rows that the model was asked for fail, nothing is published and
    AnnotationError is raised. The draft keeps every row. The next run tries only the failed ones again, or accepts them if the limit was
    raised. A job of which more than half of the first 200 asked rows fail stops at once.

    Args:
        inputs: in canonical order, with unique (item_id, creative). The iterable is consumed once and never held as a whole.
        total: number of inputs, for the progress bar.
        draft: opened with `resume=True`. Shards of an earlier run are kept when they were made from the same inputs.
        engine: where the rows are made: `local` or `ray`. It does not change the rows.

    Raises:
        AnnotationError: reason `gate` (see above); `cache_unreadable`, `cache_busy` or `cache_full`; `server_gone`, when a server
            stopped answering.
        ConfigError: the model cannot be used; Ray is not installed, or its cluster is too small.
    """

    def consume(steps: Iterator[int | None]) -> None:
        for _ in track(steps, what=task.stage, total=total, unit="rows", size=lambda rows: 1 if rows is None else rows):
            pass

    processes = JobProcesses(draft.path)
    if engine == "ray":
        from mmsid.annotate.ray_backend import RayAnnotation  # Ray is an extra, and its import takes a second

        with RayAnnotation(task, generator, config) as backend:
            job = _Job(task, generator, config, draft, backend.cache, processes)
            consume(job.run_on_ray(backend, inputs))
            work = backend.work
    else:
        with AnnotationCache(config.cache) as cache, Annotator(task, generator, config, cache) as annotator:
            job = _Job(task, generator, config, draft, cache, processes)
            consume(job.run(annotator, inputs))
            work = annotator.work
    job.job_counts.work.update(work)
    job.finish()


@dataclass(frozen=True)
class _Shard:
    """One output file: its path, its inputs, the hash of what it is made from, and its rows without a model call, per reason."""

    path: Path
    inputs: list[JobInput]
    digest: str
    not_asked: Counter[str]


class _Job:
    """Shards of one job: which are missing, how they are made and written, and the counts over all of them."""

    def __init__(self, task: Task, generator: Generator, config: JobConfig, draft: Draft, cache: Cache, processes: JobProcesses) -> None:
        self.task, self.config, self.draft, self.cache, self.processes = task, config, draft, cache, processes
        self.shards = draft.path / "shards"
        self.identity = job_identity(task, generator, config)
        self.job_counts = JobCounts()
        self.gate = Gate(task.stage, draft.path, config.max_quarantined)

    def run(self, annotator: Annotator, inputs: Iterable[JobInput]) -> Iterator[int | None]:
        """Yield None per finished input, and the number of rows of every shard that an earlier run finished."""
        for shard in self._pending_shards(inputs):
            if isinstance(shard, int):
                yield shard
            else:
                rows: list[dict[str, Any]] = []
                for piece in self.gate.pieces(shard.inputs):
                    made = yield from annotator.rows(piece)
                    self.gate.add(self._table(made), not_asked(piece))
                    rows += made
                self._write(shard, rows)

    def run_on_ray(self, backend: RayAnnotation, inputs: Iterable[JobInput]) -> Iterator[int]:
        """Like `run` with Ray actors. Yields numbers of rows; a shard is written when its last piece arrives."""
        finished: list[int] = []

        def pending() -> Iterator[_Shard]:
            for shard in self._pending_shards(inputs):
                if isinstance(shard, int):
                    finished.append(shard)
                else:
                    yield shard

        # shards that wait for their rows drop their inputs: memory use must not grow with the number of shards
        for piece in backend.pieces((replace(shard, inputs=[]), shard.inputs) for shard in pending()):
            yield from finished
            finished.clear()
            yield len(piece.rows)
            self.gate.add(self._table(piece.rows), piece.not_asked)
            if piece.shard_rows is not None:
                self._write(piece.shard, piece.shard_rows)
        yield from finished

    def finish(self) -> None:
        """Sum the counts of all processes and apply the error-rate gate (on rank 0).

        Raises:
            AnnotationError: reason `gate`.
        """
        counts = self.job_counts
        if not self.processes.gather(counts):
            return
        self.draft.counts.update(counts.counts)
        self.draft.extra.update(self.gate.judge(counts), processes=self.processes.count)
        alike = mostly_alike(sorted(self.shards.glob("part-*.parquet")), list(self.task.record.model_fields))
        if alike is not None:
            self.draft.extra["alike"] = alike.describe()

    def _pending_shards(self, inputs: Iterable[JobInput]) -> Iterator[_Shard | int]:
        """This process's shards in order: a shard that must be made, or the row count of one that is finished (and is counted here)."""
        self.processes.begin(self._clean_up)
        refused = self.gate.refused_before()
        shards = 0
        for index, chunk in enumerate(batched(inputs, self.config.shard_rows)):
            shards += 1
            if index % self.processes.count != self.processes.index:
                continue
            if len({(one.item_id, one.creative) for one in chunk}) != len(chunk):
                raise AnnotationError(
                    "duplicate_input", f"{self.task.stage}: an (item_id, creative) pair occurs twice in shard {index}; this is a bug"
                )
            shard = _Shard(self.shards / f"part-{index:05d}.parquet", chunk, self._digest(chunk), not_asked(chunk))
            table = self._read_finished(shard)
            if table is not None and not self._has_rows_to_retry(table, shard.not_asked, refused):
                self.job_counts.add(table, shard.not_asked)
                yield len(chunk)
            else:
                yield shard
        if self.processes.index == 0:
            for stale in set(self.shards.glob("*.parquet")) - {self.shards / f"part-{index:05d}.parquet" for index in range(shards)}:
                stale.unlink()

    def _clean_up(self) -> None:
        self.shards.mkdir(exist_ok=True)
        for partial_file in self.shards.glob(".*.tmp"):  # left by a kill during a write
            partial_file.unlink()

    def _read_finished(self, shard: _Shard) -> pa.Table | None:
        """The table of a shard that an earlier run made from the same inputs, else None.

        Its valid rows are added to the cache in any case: they stay useful where only the places of the pictures have changed.
        """
        if not shard.path.is_file():
            return None
        try:
            table = read_table(shard.path)
        except ArtifactError:
            return None
        if not {*self.task.schema.names} <= {*table.column_names}:
            return None
        self._add_to_cache(table)
        return table if (table.schema.metadata or {}).get(b"content_sha256") == shard.digest.encode() else None

    def _has_rows_to_retry(self, table: pa.Table, without_request: Counter[str], refused: bool) -> bool:
        """True if a row failed for a transient reason, or, after a refusal of the gate, if the model was asked for any failed row."""
        reasons = table["reason"].drop_null()
        return bool(set(reasons.unique().to_pylist()) & TRANSIENT) or (refused and len(reasons) > without_request.total())

    def _add_to_cache(self, table: pa.Table) -> None:
        """Add a shard's valid rows, unless the first of them is in the cache: then all of them are."""
        valid = table.filter(pc.equal(table["status"], "ok"))
        if len(valid) == 0 or self.cache.get([valid["input_sha256"][0].as_py()]):
            return
        entries = {}
        for row in valid.to_pylist():
            record = {name: _from_column(self.task.record, name, row[name]) for name in self.task.record.model_fields}
            kept = {name: row[name] for name in ("flags", "attempts", "log_probability")}
            entries[row["input_sha256"]] = {"record": record, **kept}
        self.cache.put(entries)

    def _digest(self, inputs: Sequence[JobInput]) -> str:
        """Hash of what a shard is made from. File sizes and times replace the pictures' bytes; a false mismatch costs only cache hits."""
        units = [
            [one.item_id, one.creative, one.evidence, one.reason, [[str(p), *_size_and_time(p)] for p in one.pictures]] for one in inputs
        ]
        return sha256({"identity": self.identity, "units": units})

    def _write(self, shard: _Shard, rows: list[dict[str, Any]]) -> None:
        table = self._table(rows)
        write_table(shard.path, with_id_column(table, self.task.integer_ids), {"content_sha256": shard.digest})
        self.job_counts.add(table, shard.not_asked)

    def _table(self, rows: list[dict[str, Any]]) -> pa.Table:
        return pa.Table.from_pylist(rows, schema=self.task.schema)


def _from_column(record: type[Record], name: str, text: str) -> Any:
    return text if record.model_fields[name].annotation is str else json.loads(text)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (-1, -1)
    return status.st_size, status.st_mtime_ns
