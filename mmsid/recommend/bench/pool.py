"""Jobs in parallel processes, one thread each. A process that dies takes its own job with it and nothing else.

The standard pools lose every running job when one process is killed (out of memory, say) and do not tell which job it was.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch

from mmsid.errors import MmsidError

BUDGET_SPENT = "no time was left in the budget"


class Job(Protocol):
    """What the pool knows of a job: a key, and the keys of jobs that must be done before."""

    key: Hashable
    needs: tuple[Hashable, ...]


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `error` is None where it is done; `started` is False where it never ran."""

    job: Any
    seconds: float = 0.0
    error: str | None = None
    started: bool = True


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    job: Any = None
    since: float = 0.0


class Pool:
    """A context manager with `workers` processes. Each calls `prepare()` once and its result with every job that it is given.

    Args:
        prepare: picklable; returns the function of a job that does the work.
        logs: folder of one log per process: what libraries print, and the tracebacks of failed jobs.
    """

    def __init__(self, prepare: Callable[[], Callable[[Any], None]], workers: int, logs: Path) -> None:
        self._prepare, self._count, self._logs = prepare, workers, logs
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *caught: object) -> None:
        for worker in self._workers:
            worker.connection.close()  # an idle process reads the end of its pipe and leaves
            if worker.job is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
        self._workers = []

    def run(self, jobs: Sequence[Any], done: set[Hashable], may_start: Callable[[], bool] = lambda: True) -> Iterator[Outcome]:
        """Run the jobs, each after those that it needs, and yield how each ended, as it ends.

        Args:
            done: keys of jobs finished before; those that finish here are added.
            may_start: asked before each start; once it says no, nothing more is started and what is left is yielded as not started.
        """
        waiting, broken, open_for_more = list(jobs), {}, True
        while waiting or any(worker.job is not None for worker in self._workers):
            for job in [job for job in waiting if any(key in broken for key in job.needs)]:
                waiting.remove(job)
                broken[job.key] = next(broken[key] for key in job.needs if key in broken)
                yield Outcome(job, error=f"a job that it needs failed: {broken[job.key]}", started=False)
            for job in [job for job in waiting if done.issuperset(job.needs)]:
                worker = self._idle() if open_for_more else None
                if worker is None:
                    break
                open_for_more = may_start()
                if open_for_more:
                    waiting.remove(job)
                    worker.job, worker.since = job, time.perf_counter()
                    worker.connection.send(job)
            busy = [worker for worker in self._workers if worker.job is not None]
            if not busy:
                if waiting:  # nothing runs, so what these wait for will not come
                    why = "a job that it needs was not run" if open_for_more else BUDGET_SPENT
                    yield from (Outcome(job, error=why, started=False) for job in waiting)
                return
            wait([worker.connection for worker in busy] + [worker.process.sentinel for worker in busy])
            for worker in busy:
                if outcome := self._ended(worker):
                    if outcome.error is None:
                        done.add(outcome.job.key)
                    else:
                        broken[outcome.job.key] = outcome.error
                    yield outcome

    def _idle(self) -> _Worker | None:
        """A process without a job, started now if there are fewer than there may be."""
        self._workers = [worker for worker in self._workers if worker.job is not None or worker.process.is_alive()]
        for worker in self._workers:
            if worker.job is None:
                return worker
        if len(self._workers) == self._count:
            return None
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        log = self._logs / f"worker-{os.getpid()}-{len(self._workers)}.log"
        process = context.Process(target=_serve, args=(theirs, self._prepare, log), daemon=True)
        with _one_thread():
            process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def _ended(self, worker: _Worker) -> Outcome | None:
        """The outcome of the worker's job; None while it runs."""
        seconds = time.perf_counter() - worker.since
        job, error = worker.job, None
        try:
            if not worker.connection.poll():
                if worker.process.is_alive():
                    return None
                raise EOFError
            error = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            self._workers.remove(worker)
            code = worker.process.exitcode
            reason = f"by signal {-code}; out of memory?" if code is not None and code < 0 else f"with exit code {code}"
            error = f"its process ended {reason}"
        worker.job = None
        return Outcome(job, seconds, error)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Environment of a process that computes on one thread: OpenMP reads it when it is loaded, so it must stand before the start."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ |= dict.fromkeys(names, "1")
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ |= before


def _serve(connection: Connection, prepare: Callable[[], Callable[[Any], None]], log: Path) -> None:
    """A process' life: one job after the other until the pipe ends. Answers None, or what went wrong."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)  # the terminal belongs to the bench's own line
    torch.set_num_threads(1)
    work = None
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            work = work or prepare()
            work(job)
            answer = None
        except Exception as error:
            traceback.print_exc()
            answer = str(error) if isinstance(error, MmsidError) else f"{type(error).__name__}: {error} (see {log})"
        try:
            connection.send(answer)
        except OSError:  # the bench is gone; what this job wrote is kept
            return
