"""A pool of Ray Data actors that applies a worker to pieces of work (extra `ray`).

Each actor builds its worker once. A piece is the unit of work that is repeated when an actor or its machine fails.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from pydantic import Field

from mmsid.config import Section
from mmsid.errors import ConfigError, MmsidError

Worker = Callable[[Any], Any]
Engine = Literal["local", "ray"]


class RayConfig(Section):
    """Resources of a stage on a Ray cluster. They do not change the output and are not part of the manifest.

    Attributes:
        address: of a running cluster. None: the environment variable RAY_ADDRESS, or a local Ray that is started for the stage.
        actors: number of actors. None: as many as fit.
        cpus_per_actor: CPU slots of each actor. Pictures are decoded there too: 2 to 4 slots per 100 pictures per second.
        gpus_per_actor: GPU slots of each actor. None: 1 if the cluster has GPUs, else 0.
        rows_per_task: rows per piece; a piece is repeated when its actor fails.
    """

    address: str | None = None
    actors: int | None = Field(default=None, ge=1)
    cpus_per_actor: float = Field(default=1.0, gt=0.0)
    gpus_per_actor: float | None = Field(default=None, ge=0.0)
    rows_per_task: int = Field(default=256, ge=1)


@contextlib.contextmanager
def ray_cluster(config: RayConfig) -> Iterator[Any]:
    """Connect to Ray and yield the module `ray`. A Ray that was started here is shut down at the end.

    Raises:
        ConfigError: the extra `ray` is not installed, no cluster answers at the address, or Ray does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError("the engine ray needs Ray Data; install it with: pip install 'mmsid[ray]'") from error
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=config.address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # Ray raises untyped exceptions
            where = f"no Ray cluster answers at {config.address!r}" if config.address else "Ray does not start here"
            raise ConfigError(f"{where} ({str(error).splitlines()[0]}); start the cluster or use the local engine") from error
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def map_on_actors(ray: Any, make_worker: Callable[[], Worker], pieces: Iterable[Any], config: RayConfig) -> Iterator[Any]:
    """Yield `worker(piece)` of every piece, in order of completion. Every actor calls `make_worker()` once.

    Ray restarts actors that die and repeats their pieces. An `MmsidError` of a worker stops the work and is raised here.

    Raises:
        ConfigError: the cluster lacks the slots that the actors need (Ray itself would wait forever).
    """
    from ray.data import ActorPoolStrategy, DataContext, from_arrow_refs

    gpus = _gpus(ray, config)
    actors = _actors(ray, config, gpus)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    blocks = [ray.put(_block(piece)) for piece in pieces]
    if not blocks:
        return
    results = from_arrow_refs(blocks).map_batches(
        _Actor,
        fn_constructor_args=(pickle_by_value(make_worker),),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(actors, len(blocks)), max_tasks_in_flight_per_actor=2),
        num_cpus=config.cpus_per_actor,
        num_gpus=gpus,
    )
    for row in results.iter_rows():
        kind, value = pickle.loads(row["bytes"])
        if kind == "error":
            raise _error(*value)
        yield value


class _Actor:
    """Callable of a Ray actor. It builds the worker with the first piece, so that errors of the construction are returned too."""

    def __init__(self, make_worker: bytes) -> None:
        self._make_worker, self._worker = pickle.loads(make_worker), None

    def __call__(self, block: Any) -> Any:
        try:
            if self._worker is None:
                self._worker = self._make_worker()
            result = ("result", self._worker(pickle.loads(block["bytes"][0].as_py())))
        except MmsidError as error:
            result = ("error", (type(error), str(error), getattr(error, "reason", None)))
        return _block(result, pickled=False)


def pickle_by_value(value: Any) -> bytes:
    """Pickle `value` with cloudpickle, which also handles functions defined in a script."""
    from ray import cloudpickle

    return cloudpickle.dumps(value)


def _block(value: Any, pickled: bool = True) -> Any:
    import pyarrow as pa

    return pa.table({"bytes": pa.array([pickle_by_value(value) if pickled else pickle.dumps(value)], pa.large_binary())})


def _error(kind: type[MmsidError], message: str, reason: str | None) -> MmsidError:
    return kind(message) if reason is None else kind(reason, message)


def _gpus(ray: Any, config: RayConfig) -> float:
    if config.gpus_per_actor is not None:
        return config.gpus_per_actor
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def _actors(ray: Any, config: RayConfig, gpus: float) -> int:
    """Number of actors: `config.actors`, or as many as fit.

    One CPU slot stays free for Ray's own tasks. A pool that takes every slot blocks the tasks that feed it.
    """
    resources = ray.cluster_resources()
    cpu_slots, gpu_slots = resources.get("CPU", 0.0) - 1, resources.get("GPU", 0.0)
    fit = int(cpu_slots / config.cpus_per_actor)
    if gpus:
        fit = min(fit, int(gpu_slots / gpus))
    actors = config.actors or fit
    if fit < 1 or actors > fit:
        raise ConfigError(
            f"ray: {actors or 1} actors of {config.cpus_per_actor:g} CPU and {gpus:g} GPU slots do not fit into the cluster's "
            f"{resources.get('CPU', 0):g} CPU (one stays free for Ray's own tasks) and {gpu_slots:g} GPU; lower ray.actors or "
            "ray.cpus_per_actor, or add machines"
        )
    return actors
