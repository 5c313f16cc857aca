"""The one job runner behind every annotation: units in, typed rows out, nothing lost, nothing doubled, nothing made up.

The units are cut, in the catalogue's canonical order, into shards of fixed content. A shard is annotated in batches sorted by
length and written in one atomic step, so a job killed at any moment resumes at the first missing shard and ends with the very
rows of an undisturbed run; answers given inside the lost shard are still in the cache. Accounting is exact:
in = ok + quarantined(reason).

Error-rate gate: when too many attempted units are quarantined, nothing is published and the stage fails. The draft folder
keeps every row; the next run of the same configuration tries the quarantined units again and nothing else.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pydantic import ValidationError

from mmsid.annotate.cache import AnnotationCache
from mmsid.annotate.flags import REFUSAL, evidence_flags, output_flags
from mmsid.annotate.generator import GenerationFailure, Generator, Request
from mmsid.annotate.overlays import flags_of
from mmsid.annotate.prompts import PLACEHOLDER
from mmsid.annotate.records import SCHEMA_VERSION, Record
from mmsid.annotate.units import EXCUSED, JobConfig, Task, Unit
from mmsid.artifacts import Draft, read_table, sha256, write_json, write_table
from mmsid.errors import AnnotationError, ArtifactError, PictureError
from mmsid.progress import track

GATE_FILE = "gate.json"


@dataclass
class _Outcome:
    """What became of one input: a record, or a reason. `attempts` holds each attempt's verdict ("ok" or its reason)."""

    key: str | None
    record: dict[str, Any] | None = None
    reason: str | None = None
    flags: list[str] = field(default_factory=list)
    attempts: list[str] = field(default_factory=list)
    rejected: str | None = None


def annotate(units: Sequence[Unit], task: Task, generator: Generator, config: JobConfig, draft: Draft) -> None:
    """Annotate `units` into `draft.path/shards/part-NNNNN.parquet`; fill the draft's counts.

    Args:
        units: in canonical order, (item_id, creative) unique.
        draft: opened with `resume=True`; shards that a killed run finished there are kept when they hold the same units.

    Raises:
        AnnotationError: reason `gate`, when more than `max_quarantined` of the attempted units failed (see the module's text);
            reason `cache_unreadable`.
    """
    if len({(unit.item_id, unit.creative) for unit in units}) != len(units):
        raise AnnotationError("duplicate_unit", f"{task.what}: an (item_id, creative) pair stands twice among the units; this is a bug")
    with AnnotationCache(config.cache) as cache, ThreadPoolExecutor(max_workers=4) as pool:
        job = _Job(task, generator, config, draft, cache, pool)
        for _ in track(job.run(units), what=task.what, total=len(units), unit="rows"):
            pass
        job.close()


class _Job:
    def __init__(
        self, task: Task, generator: Generator, config: JobConfig, draft: Draft, cache: AnnotationCache, pool: ThreadPoolExecutor
    ) -> None:
        self.task, self.generator, self.config, self.draft, self.cache, self.pool = task, generator, config, draft, cache, pool
        self.shards = draft.path / "shards"
        self.identity = {
            "schema_version": SCHEMA_VERSION,
            "what": task.what,
            "prompt_sha256": task.prompt.sha256,
            "model_id": generator.model_id,
            "parameters": dict(generator.parameters),
            "decoding": {
                "temperature": config.temperature,
                "retries": config.retries,
                "retry_temperature": config.retry_temperature,
                "seed": config.seed,
                "max_side": config.max_side,
            },
        }
        self.instruction = task.prompt.text.replace(PLACEHOLDER, "")
        self.reasons: Counter[str] = Counter()
        self.flags: Counter[str] = Counter()
        self.work: Counter[str] = Counter()
        self.counts = Counter({"in": 0, "ok": 0, "quarantined": 0})
        self.excused = 0
        self.failed_before: dict[str, _Outcome] = {}

    # The walk over the shards

    def run(self, units: Sequence[Unit]) -> Iterator[None]:
        """Yield once per finished unit."""
        self.shards.mkdir(exist_ok=True)
        for torn in self.shards.glob(".*.tmp"):  # left by a kill in the middle of a write
            torn.unlink()
        again = (self.draft.path / GATE_FILE).exists()
        expected = set()
        for index, chunk in enumerate(_batched(units, self.config.shard_rows)):
            path = self.shards / f"part-{index:05d}.parquet"
            expected.add(path)
            digest = self._digest(chunk)
            rows = self._finished(path, digest)
            if rows is not None:
                self._remember(rows)
                if again and any(row["status"] != "ok" and row["reason"] not in EXCUSED for row in rows):
                    rows = None
            if rows is None:
                outcomes = yield from self._annotate(chunk)
                rows = [self._row(unit, outcome) for unit, outcome in zip(chunk, outcomes)]
                write_table(path, pa.Table.from_pylist(rows, schema=self.task.schema), {"content_sha256": digest})
            else:
                yield from (None for _ in chunk)
            self._count(rows)
        for stale in set(self.shards.glob("*.parquet")) - expected:
            stale.unlink()

    def close(self) -> None:
        """Hand the counts over and hold the gate."""
        attempted = self.counts["in"] - self.excused
        failed = self.counts["quarantined"] - self.excused
        limit = self.config.max_quarantined
        passed = failed <= limit * attempted
        self.draft.counts.update(self.counts)
        self.draft.extra.update(
            reasons=dict(self.reasons.most_common()),
            flags=dict(self.flags.most_common()),
            work=dict(self.work),
            gate={"passed": passed, "attempted": attempted, "failed": failed, "max_quarantined": limit},
        )
        gate = self.draft.path / GATE_FILE
        if passed:
            gate.unlink(missing_ok=True)
            return
        write_json(gate, {"counts": self.draft.counts, **self.draft.extra})
        top = ", ".join(f"{reason} {count:,}" for reason, count in self.reasons.most_common(5))
        raise AnnotationError(
            "gate",
            f"{self.task.what}: {failed:,} of {attempted:,} attempted rows were quarantined ({failed / attempted:.1%}, "
            f"max_quarantined is {limit:.1%}); reasons: {top}. Nothing was published; every row is kept in {self.shards}. "
            "Mend the cause and run again: only the quarantined rows are tried again. Or raise max_quarantined.",
        )

    def _finished(self, path: Path, digest: str) -> list[dict[str, Any]] | None:
        """Rows of a shard that an earlier run completed over exactly these units, else None."""
        if not path.is_file():
            return None
        try:
            table = read_table(path)
        except ArtifactError:
            return None
        if (table.schema.metadata or {}).get(b"content_sha256") != digest.encode():
            return None
        return table.to_pylist()

    def _remember(self, rows: list[dict[str, Any]]) -> None:
        """Put an earlier run's answers where this run looks for them, so that duplicates and redone shards cost nothing."""
        outcomes = {}
        for row in rows:
            if row["status"] == "ok":
                record = {name: _from_column(self.task.record, name, row[name]) for name in self.task.record.model_fields}
                outcomes[row["input_sha256"]] = {"record": record, "flags": row["flags"], "attempts": row["attempts"]}
        self.cache.put(outcomes)

    def _digest(self, chunk: Sequence[Unit]) -> str:
        """What a shard is made from. File sizes and times stand in for the pictures' bytes: a false alarm costs only cache hits."""
        units = [[u.item_id, u.creative, u.evidence, u.reason, [[str(path), *_stamp(path)] for path in u.pictures]] for u in chunk]
        return sha256({"identity": self.identity, "units": units})

    def _count(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.counts["in"] += 1
            self.counts[row["status"]] += 1
            self.excused += row["reason"] in EXCUSED
            self.flags.update(row["flags"])
            if row["reason"]:
                self.reasons[row["reason"]] += 1

    # One shard

    def _annotate(self, chunk: Sequence[Unit]) -> Iterator[None]:
        """Outcome of every unit of a shard, in its order (the generator's return value)."""
        outcomes: list[_Outcome | None] = [None] * len(chunk)
        asked: dict[str, list[int]] = {}
        failed: dict[str, tuple[Unit, _Outcome]] = {}
        pending: dict[str, tuple[Unit, Request]] = {}

        def settle(results: dict[str, _Outcome], last: bool) -> Iterator[None]:
            for key, outcome in results.items():
                if outcome.record is None and not last:
                    failed[key] = (chunk[asked[key][0]], outcome)
                    continue
                if outcome.record is None:
                    self.failed_before[key] = outcome
                for position in asked.pop(key):
                    outcomes[position] = outcome
                    yield None

        last_attempt = self.config.retries == 0
        for window in _batched(self._by_length(chunk), self.config.batch_size):
            prepared = list(self.pool.map(self._prepare, [chunk[position] for position in window]))
            keys = [ready[0] for ready in prepared if not isinstance(ready, _Outcome)]
            known = self._known(keys)
            for position, ready in zip(window, prepared):
                if isinstance(ready, _Outcome):
                    outcomes[position] = ready
                    yield None
                    continue
                key, request = ready
                if key in known:
                    outcomes[position] = known[key]
                    self.work["cache_hits"] += 1
                    yield None
                elif key in asked:
                    asked[key].append(position)
                    self.work["duplicates"] += 1
                else:
                    asked[key] = [position]
                    pending[key] = (chunk[position], request)
            while len(pending) >= self.config.batch_size:
                batch = {key: pending.pop(key) for key in list(pending)[: self.config.batch_size]}
                yield from settle(self._generate(batch, {}), last_attempt)
        if pending:
            yield from settle(self._generate(pending, {}), last_attempt)
        for attempt in range(1, self.config.retries + 1):
            earlier, failed = failed, {}
            for keys in _batched(earlier, self.config.batch_size):
                batch, gone = self._again({key: earlier[key] for key in keys}, attempt)
                yield from settle(gone, last=True)
                if batch:
                    history = {key: earlier[key][1].attempts for key in batch}
                    yield from settle(self._generate(batch, history), last=attempt == self.config.retries)
        if any(outcome is None for outcome in outcomes):
            raise AnnotationError("rows_lost", f"{self.task.what}: a shard ended with rows unanswered; this is a bug, please report it")
        return outcomes

    def _by_length(self, chunk: Sequence[Unit]) -> list[int]:
        """Longest first: batches of like length waste no padding, and a batch too large for the memory shows at once."""
        return sorted(range(len(chunk)), key=lambda at: (-len(chunk[at].pictures), -len(chunk[at].evidence), at))

    def _prepare(self, unit: Unit) -> _Outcome | tuple[str, Request]:
        """Read the unit's pictures and name its input, or say why it cannot be asked."""
        if unit.reason is not None:
            return _Outcome(key=None, reason=unit.reason)
        try:
            pictures = self._pictures(unit)
        except PictureError as error:
            return _Outcome(key=None, reason=f"picture_{error.reason}")
        seen = [sha256(f"{picture.size}".encode() + picture.tobytes()) for picture in pictures]
        key = sha256({**self.identity, "pictures": seen, "evidence": unit.evidence})
        return key, Request(self.task.prompt.render(unit.evidence), pictures, self.config.temperature, _seed(key, 0))

    def _again(
        self, failed: Mapping[str, tuple[Unit, _Outcome]], attempt: int
    ) -> tuple[dict[str, tuple[Unit, Request]], dict[str, _Outcome]]:
        """The same requests, drawn instead of greedy, each with a seed of its own; and those whose picture went away meanwhile."""
        batch, gone = {}, {}
        for key, (unit, before) in failed.items():
            try:
                pictures = self._pictures(unit)
            except PictureError as error:
                reason = f"picture_{error.reason}"
                gone[key] = _Outcome(key, reason=reason, flags=before.flags, attempts=[*before.attempts, reason])
                continue
            temperature = max(self.config.temperature, self.config.retry_temperature)
            batch[key] = (unit, Request(self.task.prompt.render(unit.evidence), pictures, temperature, _seed(key, attempt)))
        return batch, gone

    def _pictures(self, unit: Unit) -> tuple[Image.Image, ...]:
        pictures, problem = [], None
        for path in unit.pictures:
            try:
                pictures.append(self._shrunk(self.task.load_picture(path)))
            except PictureError as error:
                if not self.task.any_picture:
                    raise
                problem = problem or error
            if self.task.any_picture and pictures:
                break
        if problem and not pictures:
            raise problem
        return tuple(pictures)

    def _shrunk(self, picture: Image.Image) -> Image.Image:
        if self.config.max_side is not None and max(picture.size) > self.config.max_side:
            picture.thumbnail((self.config.max_side, self.config.max_side), Image.Resampling.LANCZOS)
        return picture

    def _known(self, keys: list[str]) -> dict[str, _Outcome]:
        """Answers at hand. An entry that no longer fits the schema (another program's, say) is treated as absent."""
        known = {key: self.failed_before[key] for key in keys if key in self.failed_before}
        for key, kept in self.cache.get(keys).items():
            try:
                record = self.task.record.model_validate(kept["record"]).model_dump()
                known[key] = _Outcome(key, record, flags=list(kept["flags"]), attempts=list(kept["attempts"]))
            except (ValidationError, KeyError, TypeError):
                continue
        return known

    def _generate(self, batch: Mapping[str, tuple[Unit, Request]], history: Mapping[str, list[str]]) -> dict[str, _Outcome]:
        """Ask for one batch and judge every answer; good ones go to the cache at once."""
        requests = [request for _, request in batch.values()]
        answers = self.generator.generate(requests)
        if len(answers) != len(requests):
            raise AnnotationError("generator_broken", f"{self.generator.model_id}: {len(requests)} requests, {len(answers)} answers")
        self.work["generated"] += len(requests)
        results = {}
        for (key, (unit, request)), answer in zip(batch.items(), answers):
            results[key] = self._judge(key, unit, request, answer, history.get(key, []))
        kept = {key: {"record": o.record, "flags": o.flags, "attempts": o.attempts} for key, o in results.items() if o.record is not None}
        self.cache.put(kept)
        return results

    def _judge(self, key: str, unit: Unit, request: Request, answer: str | GenerationFailure, history: list[str]) -> _Outcome:
        flags = evidence_flags([_unescaped(unit.evidence)]) + flags_of(request.pictures)
        if isinstance(answer, GenerationFailure):
            return _Outcome(key, reason=answer.reason, flags=flags, attempts=[*history, answer.reason], rejected=_excerpt(answer.detail))
        try:
            record = self.task.parse(answer)
        except AnnotationError as error:
            flags += [REFUSAL] if error.reason == REFUSAL else []
            return _Outcome(key, reason=error.reason, flags=flags, attempts=[*history, error.reason], rejected=_excerpt(answer))
        flags += output_flags(record.texts(), self.instruction)
        return _Outcome(key, record.model_dump(), flags=flags, attempts=[*history, "ok"])

    def _row(self, unit: Unit, outcome: _Outcome) -> dict[str, Any]:
        record = outcome.record or {}
        return {
            "item_id": unit.item_id,
            "creative": unit.creative,
            **{name: _to_column(record.get(name)) for name in self.task.record.model_fields},
            **self.task.constants,
            "status": "ok" if outcome.record is not None else "quarantined",
            "reason": outcome.reason,
            "flags": outcome.flags,
            "attempts": outcome.attempts,
            "rejected": outcome.rejected,
            "prompt_sha256": self.task.prompt.sha256,
            "model_id": self.generator.model_id,
            "input_sha256": outcome.key,
        }


def _to_column(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _from_column(record: type[Record], name: str, text: str) -> Any:
    return text if record.model_fields[name].annotation is str else json.loads(text)


def _batched(elements: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Runs of `size` elements in order, the last one shorter (itertools.batched came with Python 3.12)."""
    elements = list(elements)
    for start in range(0, len(elements), size):
        yield elements[start : start + size]


def _unescaped(evidence: str) -> str:
    """Evidence as its author wrote it (`evidence_json` escapes brackets), for the detectors."""
    return json.dumps(json.loads(evidence), ensure_ascii=False) if evidence else ""


def _seed(key: str, attempt: int) -> int:
    return int(sha256(f"{key}/{attempt}")[:15], 16)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (-1, -1)
    return status.st_size, status.st_mtime_ns


def _excerpt(text: str) -> str:
    """The start of a refused answer, made safe to print, for whoever looks into a quarantine."""
    return "".join(character if character.isprintable() else " " for character in text[:300])
