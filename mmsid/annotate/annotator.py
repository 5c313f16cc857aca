"""From units to finished rows: read pictures ahead, look answers up, ask for the rest, judge what comes, ask again.

This is the part of an annotation job that is the same wherever it runs: in this process over whole shards, or in a Ray actor
over a piece of one. A row depends on its unit alone, never on what shared the chunk, the batch or the machine.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice, repeat
from types import TracebackType
from typing import Any, Protocol, TypeVar

from PIL import Image
from pydantic import ValidationError

from mmsid.annotate.generator import GenerationFailure, Generator, Request
from mmsid.annotate.job_config import JobConfig, JobInput, Task
from mmsid.annotate.prompts import PLACEHOLDER
from mmsid.annotate.records import SCHEMA_VERSION
from mmsid.annotate.text_flags import REFUSAL, evidence_flags, output_flags
from mmsid.annotate.text_overlays import flags_of
from mmsid.artifacts import sha256
from mmsid.errors import AnnotationError, PictureError

ElementT = TypeVar("ElementT")


class Cache(Protocol):
    """Where good answers are kept by content (`AnnotationCache`, or a door to one in another process)."""

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]: ...

    def put(self, outcomes: Mapping[str, Mapping[str, Any]]) -> None: ...


@dataclass
class _Outcome:
    """What became of one input: a record, or a reason. `attempts` holds each attempt's verdict ("ok" or its reason)."""

    key: str | None
    record: dict[str, Any] | None = None
    reason: str | None = None
    flags: list[str] = field(default_factory=list)
    attempts: list[str] = field(default_factory=list)
    rejected: str | None = None


@dataclass
class _PendingRequest:
    """One input that a generator is asked for: the unit it came from, the request, and what earlier attempts came to."""

    unit: JobInput
    request: Request
    history: list[str]


def job_identity(task: Task, generator: Generator, config: JobConfig) -> dict[str, Any]:
    """Everything but picture and text that an answer hangs on: the first part of every cache key."""
    return {
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


class Annotator:
    """Makes rows of units. A context manager: leaving it, for whatever reason, ends what is still under way.

    Attributes:
        work: how many inputs were `generated`, taken from the cache (`cache_hits`), or the same as another's (`duplicates`).
    """

    def __init__(self, task: Task, generator: Generator, config: JobConfig, cache: Cache) -> None:
        self.task, self.generator, self.config, self.cache = task, generator, config, cache
        self.identity = job_identity(task, generator, config)
        self.work: Counter[str] = Counter()
        self._instruction = task.prompt.text.replace(PLACEHOLDER, "")
        self._failed_before: dict[str, _Outcome] = {}
        self._calls_at_once = getattr(generator, "calls_at_once", 1)
        self._calls = ThreadPoolExecutor(self._calls_at_once, "generate")
        self._readers = ThreadPoolExecutor(config.readers, "read")

    def __enter__(self) -> Annotator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._calls.shutdown(wait=False, cancel_futures=True)
        close = getattr(self.generator, "close", None)
        if close is not None:
            close()  # first, so that a server's answer is not waited for when the job was interrupted
        self._readers.shutdown(cancel_futures=True)
        self._calls.shutdown()

    def rows(self, chunk: Sequence[JobInput]) -> Iterator[None]:
        """Yield once per finished unit; the generator's return value is the rows, in the order of `chunk`."""
        outcomes = yield from _Chunk(self, chunk).outcomes()
        return [self._row(unit, outcome) for unit, outcome in zip(chunk, outcomes)]

    # What a chunk asks of it

    def prepared(self, chunk: Sequence[JobInput]) -> Iterator[tuple[int, _Outcome | tuple[str, Request]]]:
        """Positions in `chunk` with their requests, or why there is none; read ahead, so that no generator waits for a picture.

        Longest first: batches of like length waste no padding, and a batch too large for the memory shows at once.
        """
        order = iter(sorted(range(len(chunk)), key=lambda at: (-len(chunk[at].pictures), -len(chunk[at].evidence), at)))
        reading: deque[tuple[int, Future]] = deque()
        while True:
            for at in islice(order, 2 * self.config.batch_size - len(reading)):
                reading.append((at, self._readers.submit(self._prepare, chunk[at])))
            if not reading:
                return
            at, ready = reading.popleft()
            yield at, ready.result()

    def known(self, keys: list[str]) -> dict[str, _Outcome]:
        """Answers at hand. An entry that no longer fits the schema (another program's, say) is treated as absent."""
        known = {key: self._failed_before[key] for key in keys if key in self._failed_before}
        for key, kept in self.cache.get(keys).items():
            try:
                record = self.task.record.model_validate(kept["record"]).model_dump()
                known[key] = _Outcome(key, record, flags=list(kept["flags"]), attempts=list(kept["attempts"]))
            except (ValidationError, KeyError, TypeError):
                continue
        return known

    def give_up(self, key: str, outcome: _Outcome) -> None:
        """Remember a failure, so that an exact duplicate later on is not tried in vain."""
        self._failed_before[key] = outcome

    def ask(self, batches: Iterable[dict[str, _PendingRequest]]) -> Iterator[dict[str, _Outcome]]:
        """Judged answers, batch by batch as they come; good ones go to the cache at once.

        A generator that works at several calls at once gets the next batch before it has answered the last.
        """
        flying: dict[Future, dict[str, _PendingRequest]] = {}
        for batch in batches:
            flying[self._calls.submit(self.generator.generate, [asking.request for asking in batch.values()])] = batch
            if len(flying) >= self._calls_at_once:
                yield from self._landed(flying)
        while flying:
            yield from self._landed(flying)

    def again(
        self, failed: Mapping[str, tuple[JobInput, _Outcome]], attempt: int
    ) -> tuple[dict[str, _PendingRequest], dict[str, _Outcome]]:
        """The same requests, drawn instead of greedy, each with a seed of its own; and those whose picture went away meanwhile."""
        batch, gone = {}, {}
        temperature = max(self.config.temperature, self.config.retry_temperature)
        for (key, (unit, before)), ready in zip(failed.items(), self._readers.map(self._prepare, [unit for unit, _ in failed.values()])):
            if isinstance(ready, _Outcome):
                gone[key] = _Outcome(key, reason=ready.reason, flags=before.flags, attempts=[*before.attempts, str(ready.reason)])
                continue
            request = Request(ready[1].prompt, ready[1].pictures, temperature, _seed(key, attempt))
            batch[key] = _PendingRequest(unit, request, before.attempts)
        return batch, gone

    def _landed(self, flying: dict[Future, dict[str, _PendingRequest]]) -> Iterator[dict[str, _Outcome]]:
        for call in wait(flying, return_when=FIRST_COMPLETED).done:
            batch, answers = flying.pop(call), call.result()
            if len(answers) != len(batch):
                raise AnnotationError("generator_broken", f"{self.generator.model_id}: {len(batch)} requests, {len(answers)} answers")
            self.work["generated"] += len(batch)
            results = {key: self._judge(key, asking, answer) for (key, asking), answer in zip(batch.items(), answers)}
            good = {key: outcome for key, outcome in results.items() if outcome.record is not None}
            self.cache.put({key: {"record": o.record, "flags": o.flags, "attempts": o.attempts} for key, o in good.items()})
            yield results

    def _prepare(self, unit: JobInput) -> _Outcome | tuple[str, Request]:
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

    def _pictures(self, unit: JobInput) -> tuple[Image.Image, ...]:
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

    def _judge(self, key: str, asking: _PendingRequest, answer: str | GenerationFailure) -> _Outcome:
        flags = evidence_flags([_unescaped(asking.unit.evidence)]) + flags_of(asking.request.pictures)
        if isinstance(answer, GenerationFailure):
            attempts = [*asking.history, answer.reason]
            return _Outcome(key, reason=answer.reason, flags=flags, attempts=attempts, rejected=_excerpt(answer.detail))
        try:
            record = self.task.parse(answer)
        except AnnotationError as error:
            flags += [REFUSAL] if error.reason == REFUSAL else []
            return _Outcome(key, reason=error.reason, flags=flags, attempts=[*asking.history, error.reason], rejected=_excerpt(answer))
        flags += output_flags(record.texts(), self._instruction)
        return _Outcome(key, record.model_dump(), flags=flags, attempts=[*asking.history, "ok"])

    def _row(self, unit: JobInput, outcome: _Outcome) -> dict[str, Any]:
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


class _Chunk:
    """The units of one chunk on their way to an outcome each. Exact duplicates wait for the one of them that is asked."""

    def __init__(self, annotator: Annotator, chunk: Sequence[JobInput]) -> None:
        self.annotator, self.chunk = annotator, chunk
        self.found: list[_Outcome | None] = [None] * len(chunk)
        self.asked: dict[str, list[int]] = {}
        self.failed: dict[str, tuple[JobInput, _Outcome]] = {}
        self.finished = 0

    def outcomes(self) -> Iterator[None]:
        """Yield once per finished unit; returns the outcomes in the chunk's order."""
        annotator, size, retries = self.annotator, self.annotator.config.batch_size, self.annotator.config.retries
        told = 0
        for _ in self._attempts(size, retries):
            yield from repeat(None, self.finished - told)
            told = self.finished
        if told != len(self.chunk):
            what = annotator.task.what
            raise AnnotationError("rows_lost", f"{what}: a shard ended with rows unanswered; this is a bug, please report it")
        return self.found

    def _attempts(self, size: int, retries: int) -> Iterator[None]:
        """Yield after every batch of answers."""
        for results in self.annotator.ask(self._first(size)):
            self._settle(results, last=retries == 0)
            yield
        yield  # whatever needed no answer
        for attempt in range(1, retries + 1):
            failed, self.failed = self.failed, {}
            for results in self.annotator.ask(self._again(failed, attempt, size)):
                self._settle(results, last=attempt == retries)
                yield
        yield

    def _first(self, size: int) -> Iterator[dict[str, _PendingRequest]]:
        """Batches of inputs that no answer is known to."""
        annotator, pending = self.annotator, {}
        for window in batched(annotator.prepared(self.chunk), size):
            known = annotator.known([ready[0] for _, ready in window if not isinstance(ready, _Outcome)])
            for at, ready in window:
                if isinstance(ready, _Outcome):
                    self._finish(at, ready)
                    continue
                key, request = ready
                if key in known:
                    self._finish(at, known[key])
                    annotator.work["cache_hits"] += 1
                elif key in self.asked:
                    self.asked[key].append(at)
                    annotator.work["duplicates"] += 1
                else:
                    self.asked[key] = [at]
                    pending[key] = _PendingRequest(self.chunk[at], request, [])
            while len(pending) >= size:
                yield {key: pending.pop(key) for key in list(islice(pending, size))}
        if pending:
            yield pending

    def _again(self, failed: dict[str, tuple[JobInput, _Outcome]], attempt: int, size: int) -> Iterator[dict[str, _PendingRequest]]:
        for keys in batched(failed, size):
            batch, gone = self.annotator.again({key: failed[key] for key in keys}, attempt)
            self._settle(gone, last=True)
            if batch:
                yield batch

    def _settle(self, results: Mapping[str, _Outcome], last: bool) -> None:
        for key, outcome in results.items():
            if outcome.record is None and not last:
                self.failed[key] = (self.chunk[self.asked[key][0]], outcome)
                continue
            if outcome.record is None:
                self.annotator.give_up(key, outcome)
            for at in self.asked.pop(key):
                self._finish(at, outcome)

    def _finish(self, at: int, outcome: _Outcome) -> None:
        self.found[at] = outcome
        self.finished += 1


def batched(elements: Iterable[ElementT], size: int) -> Iterator[list[ElementT]]:
    """Runs of `size` elements in order, the last one shorter (itertools.batched came with Python 3.12)."""
    elements = iter(elements)
    while batch := list(islice(elements, size)):
        yield batch


def _to_column(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _unescaped(evidence: str) -> str:
    """Evidence as its author wrote it (`evidence_json` escapes brackets), for the detectors."""
    return json.dumps(json.loads(evidence), ensure_ascii=False) if evidence else ""


def _seed(key: str, attempt: int) -> int:
    return int(sha256(f"{key}/{attempt}")[:15], 16)


def _excerpt(text: str) -> str:
    """The start of a refused answer, made safe to print, for whoever looks into a quarantine."""
    return "".join(character if character.isprintable() else " " for character in text[:300])
