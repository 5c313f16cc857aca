"""Annotation job on the actors of a Ray cluster: each actor holds the model and makes the rows of pieces of shards.

Pictures must be readable from every machine. Rows return to this process, which writes the shards; so a draft does not depend on the
engine. One actor on this machine holds the cache, so that every actor uses all earlier results.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

from mmsid.annotate.annotator import Annotator, Cache, batched, job_identity
from mmsid.annotate.cache import AnnotationCache
from mmsid.annotate.generator import Generator
from mmsid.annotate.job_config import JobConfig
from mmsid.annotate.job_inputs import JobInput, Task, not_asked
from mmsid.errors import ConfigError
from mmsid.ray_pool import Worker, map_on_actors, ray_cluster

ShardT = TypeVar("ShardT")


@dataclass(frozen=True)
class FinishedPiece(Generic[ShardT]):
    """Rows of a piece of a shard; `not_asked` of them per reason are without a model call. `shard_rows`: all rows, with the last piece."""

    shard: ShardT
    rows: list[dict[str, Any]]
    not_asked: Counter[str]
    shard_rows: list[dict[str, Any]] | None


class RayAnnotation:
    """Context manager that connects to Ray and opens the cache actor.

    Attributes:
        cache: proxy of the cache actor, for this process and for the other actors.
        work: counts over all actors, see `Annotator.work`.
    """

    def __init__(self, task: Task, generator: Generator, config: JobConfig) -> None:
        self._task, self._generator, self._config = task, generator, config
        self._open = contextlib.ExitStack()
        self.work: Counter[str] = Counter()

    def __enter__(self) -> RayAnnotation:
        self._ray = self._open.enter_context(ray_cluster(self._config.ray))
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        this_node = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=False)
        path = None if self._config.cache is None else self._config.cache.absolute()
        with AnnotationCache(path):
            pass  # an unusable cache file raises its error here, not in an actor
        actor = self._ray.remote(num_cpus=0, scheduling_strategy=this_node, max_restarts=-1, max_task_retries=-1)(AnnotationCache)
        self.cache: Cache = _RemoteCache(actor.remote(path))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def pieces(self, shards: Iterable[tuple[ShardT, list[JobInput]]]) -> Iterator[FinishedPiece[ShardT]]:
        """Yield the finished pieces of all shards, in order of completion."""
        waiting: dict[int, tuple[ShardT, list[list[dict[str, Any]] | None], list[Counter[str]]]] = {}
        identity = job_identity(self._task, self._generator, self._config)
        make_worker = partial(_make_worker, self._task, self._generator, self._config, self.cache, identity)

        def tasks() -> Iterator[tuple[int, int, list[JobInput]]]:
            for number, (shard, inputs) in enumerate(shards):
                parts = list(batched(inputs, self._config.ray.rows_per_task))
                waiting[number] = (shard, [None] * len(parts), [not_asked(part) for part in parts])
                yield from ((number, at, part) for at, part in enumerate(parts))

        for number, at, rows, work in map_on_actors(self._ray, make_worker, tasks(), self._config.ray):
            self.work.update(work)
            shard, parts, without_request = waiting[number]
            parts[at] = rows
            complete = None not in parts
            yield FinishedPiece(shard, rows, without_request[at], [row for part in parts for row in part] if complete else None)
            if complete:
                del waiting[number]


class _RemoteCache:
    """Proxy of the `AnnotationCache` in its actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        import ray

        return ray.get(self._actor.get.remote(list(keys)))

    def put(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        import ray

        if results:
            ray.get(self._actor.put.remote(dict(results)))


def _make_worker(task: Task, generator: Generator, config: JobConfig, cache: Cache, identity: dict[str, Any]) -> Worker:
    """In an actor: a function (shard, part, inputs) -> (shard, part, rows, work). The first piece loads the model.

    Raises:
        ConfigError: the actor's machine has other model files than the machine that started the job.
    """
    found = job_identity(task, generator, config)
    if found != identity:
        raise ConfigError(
            f"a machine of the cluster has another model: {found}, but {identity} where the job started; copy the model again"
        )
    annotator = Annotator(task, generator, config, cache)

    def work(piece: tuple[int, int, list[JobInput]]) -> tuple[int, int, list[dict[str, Any]], dict[str, int]]:
        shard, part, inputs = piece
        annotator.work.clear()
        steps = annotator.rows(inputs)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return shard, part, end.value, dict(annotator.work)

    return work
