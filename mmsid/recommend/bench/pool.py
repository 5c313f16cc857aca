"""Process pool with dependencies between jobs, one thread per process. A killed process fails its own job only.

`concurrent.futures` and pebble lose all running jobs when one process is killed, for example by the out-of-memory killer.
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

BUDGET_SPENT = "the time budget was spent"


class Job(Protocol):
    """A job: its key, and the keys of the jobs that must finish before it."""

    key: Hashable
    needs: tuple[Hashable, ...]


@dataclass(frozen=True)
class Outcome:
    """Result of a job. `error` is None on success; `started` is False if the job never ran."""

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
    """Context manager of up to `workers` processes. Each calls `prepare()` once, and the returned function with every job.

    Args:
        prepare: picklable; returns the function that runs a job.
        logs: folder of one log file per process, with its output and the tracebacks of failed jobs.
    """

    def __init__(self, prepare: Callable[[], Callable[[Any], None]], workers: int, logs: Path) -> None:
        self._prepare, self._count, self._logs = prepare, workers, logs
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *caught: object) -> None:
        for worker in self._workers:
            worker.connection.close()  # an idle process exits at the end of its pipe
            if worker.job is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
        self._workers = []

    def run(self, jobs: Sequence[Any], done: set[Hashable], may_start: Callable[[], bool] = lambda: True) -> Iterator[Outcome]:
        """Run the jobs in the order of their dependencies and yield their outcomes as they finish.

        Args:
            done: keys of finished jobs; updated in place.
            may_start: called before each start. After it returned False, the remaining jobs are yielded as not started.
        """
        waiting, failed, accepting = list(jobs), {}, True
        while waiting or any(worker.job is not None for worker in self._workers):
            for job in [job for job in waiting if any(key in failed for key in job.needs)]:
                waiting.remove(job)
                failed[job.key] = next(failed[key] for key in job.needs if key in failed)
                yield Outcome(job, error=f"a job that it depends on failed: {failed[job.key]}", started=False)
            for job in [job for job in waiting if done.issuperset(job.needs)]:
                worker = self._idle() if accepting else None
                if worker is None:
                    break
                accepting = may_start()
                if accepting:
                    waiting.remove(job)
                    worker.job, worker.since = job, time.perf_counter()
                    worker.connection.send(job)
            busy = [worker for worker in self._workers if worker.job is not None]
            if not busy:
                if waiting:  # nothing runs, so their dependencies will not finish
                    why = "a job that it depends on was not run" if accepting else BUDGET_SPENT
                    yield from (Outcome(job, error=why, started=False) for job in waiting)
                return
            wait([worker.connection for worker in busy] + [worker.process.sentinel for worker in busy])
            for worker in busy:
                if outcome := self._ended(worker):
                    if outcome.error is None:
                        done.add(outcome.job.key)
                    else:
                        failed[outcome.job.key] = outcome.error
                    yield outcome

    def _idle(self) -> _Worker | None:
        """An idle process, started if fewer than `workers` exist; None if all are busy."""
        self._workers = [worker for worker in self._workers if worker.job is not None or worker.process.is_alive()]
        for worker in self._workers:
            if worker.job is None:
                return worker
        if len(self._workers) == self._count:
            return None
        context = get_context("spawn")
        connection, remote = context.Pipe()
        log = self._logs / f"worker-{os.getpid()}-{len(self._workers)}.log"
        process = context.Process(target=_serve, args=(remote, self._prepare, log), daemon=True)
        with _one_thread():
            process.start()
        remote.close()
        self._workers.append(_Worker(process, connection))
        return self._workers[-1]

    def _ended(self, worker: _Worker) -> Outcome | None:
        """Outcome of the worker's job; None while it runs."""
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
    """Set the environment of a single-threaded process. OpenMP reads it when it is loaded, so it is set before the start."""
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
    """Main loop of a process: run jobs until the pipe ends. The answer is None or an error message."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)  # only the parent prints to the terminal
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
        except OSError:  # the parent has ended; the output of this job is kept
            return
