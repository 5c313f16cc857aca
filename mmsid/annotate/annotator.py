"""Turn job inputs into finished rows: read pictures ahead, look up the cache, generate in batches, validate, retry.

An annotation job uses this class in its own process for whole shards, or in a Ray actor for pieces of a shard.
A row depends on its own input only, never on the batch, the shard or the machine.
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

from mmsid.annotate.answer_text import excerpt
from mmsid.annotate.confidence import CUT_SHORT, LOW_CONFIDENCE, rounded
from mmsid.annotate.generator import DEFAULT_BATCH_SIZE, FINAL, GenerationFailure, Generator, Request
from mmsid.annotate.job_config import JobConfig
from mmsid.annotate.job_inputs import JobInput, Task
from mmsid.annotate.prompts import PLACEHOLDER
from mmsid.annotate.records import SCHEMA_VERSION
from mmsid.annotate.text_flags import PROMPT_EXAMPLE, REFUSAL, echoes_prompt, evidence_flags, output_flags
from mmsid.annotate.text_overlays import picture_flags
from mmsid.artifacts import sha256
from mmsid.errors import AnnotationError, PictureError

ElementT = TypeVar("ElementT")


class Cache(Protocol):
    """Store of valid results by `input_sha256`: `AnnotationCache`, or a proxy of one in another process."""

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]: ...

    def put(self, results: Mapping[str, Mapping[str, Any]]) -> None: ...


@dataclass
class _Result:
    """Result of one input: a record, or the reason why there is none. `attempts` holds "ok" or a reason code per attempt."""

    key: str | None
    record: dict[str, Any] | None = None
    reason: str | None = None
    flags: list[str] = field(default_factory=list)
    attempts: list[str] = field(default_factory=list)
    rejected: str | None = None
    log_probability: float | None = None

    def to_cache(self) -> dict[str, Any]:
        """The cache entry of a valid result."""
        return {"record": self.record, "flags": self.flags, "attempts": self.attempts, "log_probability": self.log_probability}


@dataclass
class _PendingRequest:
    """A request to the generator, the input that it belongs to, and the reason codes of earlier attempts."""

    input: JobInput
    request: Request
    earlier_attempts: list[str]
    words: Future[list[str]] | None = None  # lines in the pictures, read while the model generates


def job_identity(task: Task, generator: Generator, config: JobConfig) -> dict[str, Any]:
    """Everything except picture and text that can change an answer. It is part of every cache key."""
    checks = {} if task.words is None else {"check_words": True}
    return {
        **checks,
        "schema_version": SCHEMA_VERSION,
        "what": task.stage,
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
    """Makes rows from job inputs with a generator and a cache. Leaving the context cancels pending calls.

    Attributes:
        work: number of inputs that were `generated`, found in the cache (`cache_hits`), or equal to another input (`duplicates`), and
            the notes of the generator.
    """

    def __init__(self, task: Task, generator: Generator, config: JobConfig, cache: Cache) -> None:
        self.task, self.generator, self.config, self.cache = task, generator, config, cache
        self.identity = job_identity(task, generator, config)
        self.work: Counter[str] = Counter()
        self._instruction = task.prompt.text.replace(PLACEHOLDER, "")
        self.batch_size: int = config.batch_size or getattr(generator, "batch_size", DEFAULT_BATCH_SIZE)
        self._failures: dict[str, _Result] = {}
        self._max_calls = getattr(generator, "max_concurrent_calls", 1)
        self._take_notes = getattr(generator, "take_notes", Counter)
        self._generate_pool = ThreadPoolExecutor(self._max_calls, "generate")
        self._reader_pool = ThreadPoolExecutor(config.readers, "read")

    def __enter__(self) -> Annotator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._generate_pool.shutdown(wait=False, cancel_futures=True)
        close = getattr(self.generator, "close", None)
        if close is not None:
            close()  # before the pools are joined, so that an interrupted job does not wait for a server
        self._reader_pool.shutdown(cancel_futures=True)
        self._generate_pool.shutdown()

    def rows(self, inputs: Sequence[JobInput]) -> Iterator[None]:
        """Yield once per finished input. The generator's return value is the list of rows, in the order of `inputs`."""
        results = yield from _AnnotationRun(self, inputs).results()
        return [self._row(one, result) for one, result in zip(inputs, results)]

    def prepare(self, inputs: Sequence[JobInput]) -> Iterator[tuple[int, _Result | tuple[str, Request]]]:
        """Read pictures ahead of the generator. Yields the position of each input with its (key, request), or with a failure.

        The longest inputs come first: batches of equal length need little padding, and an oversized batch fails early.
        """
        order = iter(sorted(range(len(inputs)), key=lambda at: (-len(inputs[at].pictures), -len(inputs[at].evidence), at)))
        reading: deque[tuple[int, Future]] = deque()
        while True:
            for at in islice(order, 2 * self.batch_size - len(reading)):
                reading.append((at, self._reader_pool.submit(self._prepare, inputs[at])))
            if not reading:
                return
            at, prepared = reading.popleft()
            yield at, prepared.result()

    def lookup(self, keys: list[str]) -> dict[str, _Result]:
        """Results that are known already: earlier failures of this job, and cache entries that fit the record's schema."""
        found = {key: self._failures[key] for key in keys if key in self._failures}
        for key, entry in self.cache.get(keys).items():
            try:
                record = self.task.record.model_validate(entry["record"]).model_dump()
                kept = {"flags": list(entry["flags"]), "attempts": list(entry["attempts"])}
                found[key] = _Result(key, record, log_probability=entry.get("log_probability"), **kept)
            except (ValidationError, KeyError, TypeError):
                continue
        return found

    def record_failure(self, key: str, result: _Result) -> None:
        """Keep a final failure, so that later exact duplicates are not generated again."""
        self._failures[key] = result

    def generate(self, batches: Iterable[dict[str, _PendingRequest]]) -> Iterator[dict[str, _Result]]:
        """Validated results per batch, in order of completion. Valid ones are written to the cache at once.

        At most `generator.max_concurrent_calls` batches are in flight.
        """
        in_flight: dict[Future, dict[str, _PendingRequest]] = {}
        for batch in batches:
            requests = [pending.request for pending in batch.values()]
            if self.task.words is not None:
                for pending in batch.values():
                    pending.words = self._reader_pool.submit(self.task.words.read, pending.request.pictures)
            in_flight[self._generate_pool.submit(self.generator.generate, requests)] = batch
            if len(in_flight) >= self._max_calls:
                yield from self._completed(in_flight)
        while in_flight:
            yield from self._completed(in_flight)

    def retry_batch(
        self, failed: Mapping[str, tuple[JobInput, _Result]], attempt: int
    ) -> tuple[dict[str, _PendingRequest], dict[str, _Result]]:
        """Requests of failed inputs for another attempt, sampled with a seed per input; and results of pictures that became unreadable."""
        batch, unreadable = {}, {}
        temperature = max(self.config.temperature, self.config.retry_temperature)
        prepared_inputs = self._reader_pool.map(self._prepare, [one for one, _ in failed.values()])
        for (key, (one, before)), prepared in zip(failed.items(), prepared_inputs):
            if isinstance(prepared, _Result):
                attempts = [*before.attempts, str(prepared.reason)]
                unreadable[key] = _Result(key, reason=prepared.reason, flags=before.flags, attempts=attempts)
                continue
            request = Request(prepared[1].prompt, prepared[1].pictures, temperature, _seed(key, attempt))
            batch[key] = _PendingRequest(one, request, before.attempts)
        return batch, unreadable

    def _completed(self, in_flight: dict[Future, dict[str, _PendingRequest]]) -> Iterator[dict[str, _Result]]:
        for call in wait(in_flight, return_when=FIRST_COMPLETED).done:
            batch, answers = in_flight.pop(call), call.result()
            if len(answers) != len(batch):
                raise AnnotationError("generator_broken", f"{self.generator.model_id}: {len(batch)} requests, {len(answers)} answers")
            self.work["generated"] += len(batch)
            self.work.update(self._take_notes())
            results = {key: self._validate(key, pending, answer) for (key, pending), answer in zip(batch.items(), answers)}
            self.cache.put({key: result.to_cache() for key, result in results.items() if result.record is not None})
            yield results

    def _prepare(self, one: JobInput) -> _Result | tuple[str, Request]:
        """Read the input's pictures and compute its cache key. Returns (key, request), or the failure."""
        if one.reason is not None:
            return _Result(key=None, reason=one.reason)
        try:
            pictures = self._load_pictures(one)
        except PictureError as error:
            return _Result(key=None, reason=f"picture_{error.reason}")
        hashes = [sha256(f"{picture.size}".encode() + picture.tobytes()) for picture in pictures]
        key = sha256({**self.identity, "pictures": hashes, "evidence": one.evidence})
        return key, Request(self.task.prompt.render(one.evidence), pictures, self.config.temperature, _seed(key, 0))

    def _load_pictures(self, one: JobInput) -> tuple[Image.Image, ...]:
        pictures, first_error = [], None
        for path in one.pictures:
            try:
                pictures.append(self._shrink(self.task.load_picture(path)))
            except PictureError as error:
                if not self.task.any_picture:
                    raise
                first_error = first_error or error
            if self.task.any_picture and pictures:
                break
        if first_error and not pictures:
            raise first_error
        return tuple(pictures)

    def _shrink(self, picture: Image.Image) -> Image.Image:
        if self.config.max_side is not None and max(picture.size) > self.config.max_side:
            picture.thumbnail((self.config.max_side, self.config.max_side), Image.Resampling.LANCZOS)
        return picture

    def _validate(self, key: str, pending: _PendingRequest, answer: str | GenerationFailure) -> _Result:
        flags = evidence_flags([_unescaped(pending.input.evidence)]) + picture_flags(pending.request.pictures)
        if isinstance(answer, GenerationFailure):
            attempts = [*pending.earlier_attempts, answer.reason]
            return _Result(key, reason=answer.reason, flags=flags, attempts=attempts, rejected=excerpt(answer.detail))
        log_probability = rounded(getattr(answer, "log_probability", None))

        def rejected(reason: str, text: str) -> _Result:
            attempts = [*pending.earlier_attempts, reason]
            return _Result(key, reason=reason, flags=flags, attempts=attempts, rejected=text, log_probability=log_probability)

        try:
            record = self.task.parse(answer)
        except AnnotationError as error:
            flags += [REFUSAL] if error.reason == REFUSAL else []
            return rejected(error.reason, excerpt(answer))
        if echoes_prompt(record.texts(), self._instruction, _unescaped(pending.input.evidence)):
            return rejected(PROMPT_EXAMPLE, excerpt(answer))
        uncertain = self.task.confidence.uncertain(log_probability)
        if uncertain and self.task.confidence.refusal:
            return rejected(LOW_CONFIDENCE, f"{self.task.confidence.refusal}. It wrote: {excerpt(answer)}")
        flags += output_flags(record.texts(), self._instruction)
        if self.task.words is not None and pending.words is not None:
            flags += self.task.words.flags(record.texts(), pending.words.result())
        flags += [LOW_CONFIDENCE] * uncertain + [CUT_SHORT] * getattr(answer, "cut_short", False)
        attempts = [*pending.earlier_attempts, "ok"]
        return _Result(key, record.model_dump(), flags=flags, attempts=attempts, log_probability=log_probability)

    def _row(self, one: JobInput, result: _Result) -> dict[str, Any]:
        record = result.record or {}
        return {
            "item_id": one.item_id,
            "creative": one.creative,
            **{name: _to_column(record.get(name)) for name in self.task.record.model_fields},
            **self.task.constants,
            "status": "ok" if result.record is not None else "quarantined",
            "reason": result.reason,
            "flags": result.flags,
            "attempts": result.attempts,
            "rejected": result.rejected,
            "log_probability": result.log_probability,
            "prompt_sha256": self.task.prompt.sha256,
            "model_id": self.generator.model_id,
            "input_sha256": result.key,
        }


class _AnnotationRun:
    """State of one pass over a list of inputs. Exact duplicates share the request of their first occurrence."""

    def __init__(self, annotator: Annotator, inputs: Sequence[JobInput]) -> None:
        self.annotator, self.inputs = annotator, inputs
        self.found: list[_Result | None] = [None] * len(inputs)
        self.positions: dict[str, list[int]] = {}  # of the inputs that wait for a key's result
        self.failed: dict[str, tuple[JobInput, _Result]] = {}
        self.finished = 0

    def results(self) -> Iterator[None]:
        """Yield once per finished input. The generator's return value is the list of results, in the order of the inputs."""
        reported = 0
        for _ in self._attempts(self.annotator.batch_size, self.annotator.config.retries):
            yield from repeat(None, self.finished - reported)
            reported = self.finished
        if reported != len(self.inputs):
            stage = self.annotator.task.stage
            raise AnnotationError(
                "rows_lost", f"{stage}: only {reported} of {len(self.inputs)} rows of a shard were made; this is a bug, please report it"
            )
        return self.found

    def _attempts(self, size: int, retries: int) -> Iterator[None]:
        """Yield after every batch of results."""
        for results in self.annotator.generate(self._first_batches(size)):
            self._store(results, last=retries == 0)
            yield
        yield  # results that needed no generation
        for attempt in range(1, retries + 1):
            failed, self.failed = self.failed, {}
            for results in self.annotator.generate(self._retry_batches(failed, attempt, size)):
                self._store(results, last=attempt == retries)
                yield
        yield

    def _first_batches(self, size: int) -> Iterator[dict[str, _PendingRequest]]:
        """Batches of the requests whose result is not known yet."""
        annotator, pending = self.annotator, {}
        for window in batched(annotator.prepare(self.inputs), size):
            known = annotator.lookup([prepared[0] for _, prepared in window if not isinstance(prepared, _Result)])
            for at, prepared in window:
                if isinstance(prepared, _Result):
                    self._finish(at, prepared)
                    continue
                key, request = prepared
                if key in known:
                    self._finish(at, known[key])
                    annotator.work["cache_hits"] += 1
                elif key in self.positions:
                    self.positions[key].append(at)
                    annotator.work["duplicates"] += 1
                else:
                    self.positions[key] = [at]
                    pending[key] = _PendingRequest(self.inputs[at], request, [])
            while len(pending) >= size:
                yield {key: pending.pop(key) for key in list(islice(pending, size))}
        if pending:
            yield pending

    def _retry_batches(self, failed: dict[str, tuple[JobInput, _Result]], attempt: int, size: int) -> Iterator[dict[str, _PendingRequest]]:
        for keys in batched(failed, size):
            batch, unreadable = self.annotator.retry_batch({key: failed[key] for key in keys}, attempt)
            self._store(unreadable, last=True)
            if batch:
                yield batch

    def _store(self, results: Mapping[str, _Result], last: bool) -> None:
        for key, result in results.items():
            if result.record is None and not last and result.reason not in FINAL:
                self.failed[key] = (self.inputs[self.positions[key][0]], result)
                continue
            if result.record is None:
                self.annotator.record_failure(key, result)
            for at in self.positions.pop(key):
                self._finish(at, result)

    def _finish(self, at: int, result: _Result) -> None:
        self.found[at] = result
        self.finished += 1


def batched(elements: Iterable[ElementT], size: int) -> Iterator[list[ElementT]]:
    """Lists of `size` elements in order, the last one shorter (like itertools.batched of Python 3.12)."""
    elements = iter(elements)
    while batch := list(islice(elements, size)):
        yield batch


def _to_column(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _unescaped(evidence: str) -> str:
    """Evidence without the escapes of `evidence_json`, as the detectors need it."""
    return json.dumps(json.loads(evidence), ensure_ascii=False) if evidence else ""


def _seed(key: str, attempt: int) -> int:
    return int(sha256(f"{key}/{attempt}")[:15], 16)
