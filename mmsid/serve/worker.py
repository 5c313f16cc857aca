"""One thread that owns the engine and drains a bounded queue: requests that wait are worked on together, quick ones first."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from mmsid.serve.ads import Ad
from mmsid.serve.engine import EncodedAd, Engine

_log = logging.getLogger("mmsid.serve")
Kind = Literal["encode", "recommend", "append"]


class Overloaded(Exception):
    """The queue is full."""


class Expired(Exception):
    """The time limit of the request passed before it was worked on."""


@dataclass
class Job:
    """One request.

    Attributes:
        ads: for `encode` and `append`.
        histories: for `recommend`: item ids and new ads, oldest first.
        options: of `recommend`: k, exclude_seen, only.
        deadline: on the clock `time.monotonic`.
        result: set to what the engine gives for each ad or history.
    """

    kind: Kind
    deadline: float
    ads: Sequence[Ad] = ()
    histories: Sequence[Sequence[str | Ad]] = ()
    options: dict[str, Any] = field(default_factory=dict)
    result: Future[list[Any]] = field(default_factory=Future)

    @property
    def is_quick(self) -> bool:
        """Whether no model has to read an ad for it."""
        return self.kind == "recommend" and not self.new_ads()

    def new_ads(self) -> list[Ad]:
        """The ads of the job that must be encoded."""
        if self.kind == "append":
            return []
        return [*self.ads, *(one for history in self.histories for one in history if isinstance(one, Ad))]


class Worker:
    """Runs an engine in a thread of its own.

    Args:
        make_engine: makes the engine, in the thread.
        size: jobs that wait at most.
        batch: jobs with ads that are worked on together at most. Recommendations for known ids do not wait for others.
        observe: is called with the number of jobs of every batch.
    """

    def __init__(self, make_engine: Callable[[], Engine], size: int, batch: int, observe: Callable[[int], object]) -> None:
        self._make_engine, self._batch, self._observe = make_engine, batch, observe
        self._queue: queue.Queue[Job | None] = queue.Queue(size)
        self._ready: Future[Engine] = Future()
        self._waiting: list[Job] = []  # taken from the queue, not worked on yet
        self._stopping = self._ended = False
        self._thread = threading.Thread(target=self._run, name="mmsid-engine", daemon=True)

    def start(self) -> Engine:
        """Start the thread. Returns when the engine is loaded, and raises what its constructor raises."""
        self._thread.start()
        return self._ready.result()

    @property
    def waiting(self) -> int:
        """Jobs that are not worked on yet."""
        return self._queue.qsize() + len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether jobs are accepted and worked on."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, job: Job) -> Future[list[Any]]:
        """Queue a job.

        Raises:
            Overloaded: the queue is full, or the worker is stopping.
        """
        if not self.alive:
            raise Overloaded
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise Overloaded from None
        return job.result

    def stop(self) -> None:
        """Work on what is queued, close the engine and end the thread."""
        self._stopping = True
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    # --- in the thread

    def _run(self) -> None:
        try:
            engine = self._make_engine()
            engine.warm_up()
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(engine)
        try:
            while (jobs := self._next()) is not None:
                self._observe(len(jobs))
                try:
                    self._work(engine, jobs)
                except Exception as error:  # a bug must not end the thread
                    _log.exception("a batch of %d requests failed", len(jobs))
                    for job in jobs:
                        if not job.result.done():
                            job.result.set_exception(error)
        finally:
            engine.close()

    def _next(self) -> list[Job] | None:
        """The next jobs, at least one: all that take milliseconds, and the first `batch` others. None when the worker stops."""
        self._take(wait=not self._waiting)
        while not self._waiting and not self._ended:
            self._take(wait=True)
        if not self._waiting:
            return None
        quick = [job for job in self._waiting if job.is_quick]
        others = [job for job in self._waiting if not job.is_quick]
        self._waiting = others[self._batch :]
        return [*quick, *others[: self._batch]]

    def _take(self, wait: bool) -> None:
        """Take what is in the queue; with `wait`, at least one entry."""
        while not self._ended:
            try:
                job = self._queue.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if job is None:
                self._ended = True
            else:
                self._waiting.append(job)

    def _work(self, engine: Engine, jobs: Sequence[Job]) -> None:
        live = []
        for job in jobs:
            if not job.result.set_running_or_notify_cancel():  # the client is not waiting any more
                continue
            if job.deadline < time.monotonic():
                job.result.set_exception(Expired())
            else:
                live.append(job)
        self._recommend_all(engine, [job for job in live if job.is_quick], {})
        self._append(engine, [job for job in live if job.kind == "append"])
        others = [job for job in live if job.kind != "append" and not job.is_quick]
        encoded = _encoded(engine, others)
        for job in others:
            if job.kind == "encode":
                _settle(job, lambda job=job: [_of(encoded, ad) for ad in job.ads])
        self._recommend_all(engine, [job for job in others if job.kind == "recommend"], encoded)

    def _recommend_all(self, engine: Engine, jobs: Sequence[Job], encoded: dict[int, EncodedAd | Exception]) -> None:
        """Recommend to the histories of jobs, those with equal options together."""
        groups: dict[tuple[Any, ...], list[Job]] = {}
        for job in jobs:
            groups.setdefault(tuple(sorted((name, repr(value)) for name, value in job.options.items())), []).append(job)
        for group in groups.values():
            self._recommend(engine, group, encoded)

    def _append(self, engine: Engine, jobs: Sequence[Job]) -> None:
        """Append the ads of all jobs at once: one write to the disk. If that fails, each job alone."""
        try:
            results = iter(engine.append([ad for job in jobs for ad in job.ads]) if jobs else [])
            for job in jobs:
                job.result.set_result([next(results) for _ in job.ads])
        except Exception as error:
            for job in jobs:
                if not job.result.done():
                    _settle(job, (lambda job=job: engine.append(job.ads)) if len(jobs) > 1 else _raiser(error))

    def _recommend(self, engine: Engine, jobs: Sequence[Job], encoded: dict[int, EncodedAd | Exception]) -> None:
        """Recommend to all histories of jobs with equal options at once. If that fails, to each job alone."""

        def histories(job: Job) -> list[list[str | EncodedAd]]:
            return [[_of(encoded, one) if isinstance(one, Ad) else one for one in history] for history in job.histories]

        try:
            asked = [history for job in jobs for history in histories(job)]
            results = iter(engine.recommend(asked, **jobs[0].options))
            for job in jobs:
                job.result.set_result([next(results) for _ in job.histories])
        except Exception as error:
            for job in jobs:
                alone = (lambda job=job: engine.recommend(histories(job), **job.options)) if len(jobs) > 1 else _raiser(error)
                if not job.result.done():
                    _settle(job, alone)


def _encoded(engine: Engine, jobs: Sequence[Job]) -> dict[int, EncodedAd | Exception]:
    """Encodings of the ads of all jobs by `id(ad)`. If the batch fails, each ad is encoded alone, so that one cannot spoil the others."""
    ads = [ad for job in jobs for ad in job.new_ads()]
    try:
        return {id(ad): one for ad, one in zip(ads, engine.encode(ads), strict=True)}
    except Exception as failure:
        _log.warning("a batch of %d ads could not be encoded (%s); each is tried alone", len(ads), failure)
        found: dict[int, EncodedAd | Exception] = {}
        for ad in ads:
            try:
                found[id(ad)] = engine.encode([ad])[0]
            except Exception as error:
                found[id(ad)] = error
        return found


def _of(encoded: dict[int, EncodedAd | Exception], ad: Ad) -> EncodedAd:
    found = encoded[id(ad)]
    if isinstance(found, Exception):
        raise found
    return found


def _settle(job: Job, call: Callable[[], list[Any]]) -> None:
    try:
        job.result.set_result(call())
    except Exception as error:
        job.result.set_exception(error)


def _raiser(error: Exception) -> Callable[[], list[Any]]:
    def call() -> list[Any]:
        raise error

    return call
