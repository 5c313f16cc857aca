"""An annotation job in the actors of a Ray cluster: each holds the model and makes the rows of one piece of a shard at a time.

Only pictures must lie where every machine can read them. Rows come home and are written here, so a draft looks the same
whichever engine made it; the cache lives in one actor on this machine, so a picture answered anywhere is answered everywhere.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from mmsid.annotate.annotator import Annotator, Cache, batched, job_identity
from mmsid.annotate.cache import AnnotationCache
from mmsid.annotate.generator import Generator
from mmsid.annotate.job_config import JobConfig, JobInput, Task
from mmsid.errors import ConfigError
from mmsid.ray_pool import Worker, map_on_actors, ray_cluster

ShardT = TypeVar("ShardT")


class RayAnnotation:
    """A context manager: Ray is up, and the cache is open, while it lasts.

    Attributes:
        cache: the cache's door, for this process and for the actors.
        work: what the actors did, see `Annotator.work`.
    """

    def __init__(self, task: Task, generator: Generator, config: JobConfig) -> None:
        self._task, self._generator, self._config = task, generator, config
        self._open = contextlib.ExitStack()
        self.work: Counter[str] = Counter()

    def __enter__(self) -> RayAnnotation:
        self._ray = self._open.enter_context(ray_cluster(self._config.ray))
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=False)
        path = None if self._config.cache is None else self._config.cache.absolute()
        with AnnotationCache(path):
            pass  # a file that is no cache is told of here, by name, not by a dead actor
        actor = self._ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1)(AnnotationCache)
        self.cache: Cache = _CacheDoor(actor.remote(path))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def rows(self, shards: Iterable[tuple[ShardT, list[JobInput]]]) -> Iterator[tuple[ShardT, list[dict[str, Any]] | None, int]]:
        """(shard, its rows or None while pieces are missing, how many rows this step brought), in whatever order they are done."""
        waiting: dict[int, tuple[ShardT, list[list[dict[str, Any]] | None]]] = {}
        identity = job_identity(self._task, self._generator, self._config)
        make = partial(_make_worker, self._task, self._generator, self._config, self.cache, identity)

        def pieces() -> Iterator[tuple[int, int, list[JobInput]]]:
            for number, (shard, units) in enumerate(shards):
                parts = list(batched(units, self._config.ray.rows_per_task))
                waiting[number] = (shard, [None] * len(parts))
                yield from ((number, at, part) for at, part in enumerate(parts))

        for number, at, rows, work in map_on_actors(self._ray, make, pieces(), self._config.ray):
            self.work.update(work)
            shard, parts = waiting[number]
            parts[at] = rows
            whole = None not in parts
            yield shard, [row for part in parts for row in part] if whole else None, len(rows)
            if whole:
                del waiting[number]


class _CacheDoor:
    """The cache in its actor, as if it were here."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        import ray

        return ray.get(self._actor.get.remote(list(keys)))

    def put(self, outcomes: Mapping[str, Mapping[str, Any]]) -> None:
        import ray

        if outcomes:
            ray.get(self._actor.put.remote(dict(outcomes)))


def _make_worker(task: Task, generator: Generator, config: JobConfig, cache: Cache, identity: dict[str, Any]) -> Worker:
    """In an actor: (shard, part, units) -> (shard, part, rows, work). The model is loaded with the first piece and stays."""
    found = job_identity(task, generator, config)
    if found != identity:
        raise ConfigError(f"a machine of the cluster has another model than this one: {found} there, {identity} here; copy the model anew")
    annotator = Annotator(task, generator, config, cache)

    def work(piece: tuple[int, int, list[JobInput]]) -> tuple[int, int, list[dict[str, Any]], dict[str, int]]:
        shard, part, units = piece
        annotator.work.clear()
        making = annotator.rows(units)
        while True:
            try:
                next(making)
            except StopIteration as end:
                return shard, part, end.value, dict(annotator.work)

    return work
