"""Downloads of many pictures: side by side, politely for each host, with retries, and kept in a cache."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from mmsid.catalog.config import PictureLimits
from mmsid.catalog.picture_sources.addresses import Connector, Resolver, connect, resolve
from mmsid.catalog.picture_sources.cache import PictureCache
from mmsid.catalog.picture_sources.http_client import DownloadError, HttpClient
from mmsid.catalog.picture_sources.object_stores import read_store
from mmsid.catalog.picture_sources.references import reference_kind, web_url
from mmsid.catalog.pictures import InspectedPicture, failed_picture, inspect_bytes

_TRIES = 4
_LONGEST_WAIT = 30.0  # seconds that one wait takes at most; a server that asks for more is given up
_FAILURES_OF_A_DEAD_HOST = 20  # in a row, each after all tries
_PAUSE_OF_A_DEAD_HOST = 30.0  # seconds until one more picture of the host is tried


@dataclass
class _Host:
    """State of one host: when the next request may start, and how it failed of late."""

    pause_until: float = 0.0
    failures: int = 0
    last_reason: str = ""
    closed_until: float = 0.0


class Downloader:
    """Downloads pictures of web servers and object stores, and checks them. Use it as a context manager.

    A try that failed by chance (timeout, lost connection, HTTP 429 or 5xx) is repeated up to three times, after waits that double and
    vary, or as long as the server asks for with Retry-After, if that is at most 30 s. A host that fails 20 pictures in a row is asked
    again after 30 s only, and its pictures fail at once until then, so that a dead host does not hold up the run. Usable pictures are
    kept in the cache and are never asked for again. All failures are asked for again by the next run.

    Args:
        limits: limits of downloads and pictures. `max_total_bytes` counts over the life of this object.
        cache: folder in which pictures are kept (`cache.PictureCache`).
        resolver, connector: look-up of names and opening of connections, exchanged in tests.
        first_wait: seconds before the second try.
    """

    def __init__(
        self,
        limits: PictureLimits,
        cache: Path,
        *,
        resolver: Resolver = resolve,
        connector: Connector = connect,
        first_wait: float = 0.5,
    ) -> None:
        self.limits, self.cache, self.first_wait = limits, PictureCache(cache), first_wait
        self._client = HttpClient(limits, resolver, connector)
        self._hosts: dict[str, _Host] = defaultdict(_Host)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._queues = _HostQueues(limits.connections)

    def __enter__(self) -> Downloader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop all downloads, and write the index of the cache."""
        self._closed.set()
        self._client.close()
        self._queues.close()
        self.cache.close()

    def submit(self, url: str) -> Future[InspectedPicture]:
        """Start to download a picture, as soon as a connection to its host is free."""
        return self._queues.submit(_host_of(url), self.inspect, url)

    def inspect(self, url: str) -> InspectedPicture:
        """Download a picture, or take it from the cache, and check it. A bad picture does not raise."""
        data = self.cache.read_url(url)
        if data is not None and (found := self._checked(data, url)).reason is None:
            return found
        try:
            data = self._fetch(url)
        except DownloadError as error:
            return failed_picture(error)
        found = self._checked(data, url)
        if found.reason is None:
            self.cache.remember_url(url, found.sha256)
        return found

    def _checked(self, data: bytes, url: str) -> InspectedPicture:
        return keep(inspect_bytes(data, self.limits, url), data, self.cache)

    def _fetch(self, url: str) -> bytes:
        """The bytes behind a URL, with retries. Raises DownloadError."""
        give_up = time.monotonic() + 4 * self.limits.request_seconds
        wait = self.first_wait
        name = _host_of(url)
        for last in (False,) * (_TRIES - 1) + (True,):
            self._wait_for(name, url, give_up)
            try:
                data = self._try(url, min(self.limits.request_seconds, give_up - time.monotonic()))
            except DownloadError as error:
                pause = max(error.retry_after, wait * random.uniform(0.5, 1.5))
                if error.again and not last and pause <= _LONGEST_WAIT and time.monotonic() + pause < give_up:
                    self._pause(name, pause if error.reason == "http_429" else 0.0)
                    self._closed.wait(pause)
                    wait *= 2
                    continue
                self._count_failure(name, error)
                raise
            with self._lock:
                self._hosts[name].failures = 0
            return data
        raise AssertionError("the last try returns or raises")

    def _try(self, url: str, seconds: float) -> bytes:
        if self._closed.is_set():
            raise DownloadError("connection", url, "stopped")
        if reference_kind(url) == "store":
            self._client.count(0, url)
            data = read_store(url, self.limits)
            self._client.count(len(data), url)
            return data
        return self._client.get(web_url(url), seconds)

    def _pause(self, name: str, seconds: float) -> None:
        with self._lock:
            host = self._hosts[name]
            host.pause_until = max(host.pause_until, time.monotonic() + seconds)

    def _wait_for(self, name: str, url: str, give_up: float) -> None:
        """Wait until a host that asked for fewer requests may be asked. Raises DownloadError for a dead host."""
        with self._lock:
            host, now = self._hosts[name], time.monotonic()
            if host.failures >= _FAILURES_OF_A_DEAD_HOST:
                if now < host.closed_until:
                    raise DownloadError(host.last_reason, url, f"not asked: {host.failures} pictures of this host failed in a row")
                host.closed_until = now + _PAUSE_OF_A_DEAD_HOST  # this picture tries, the others fail until it has succeeded
            pause = min(host.pause_until, give_up) - now
        if pause > 0:
            self._closed.wait(pause)

    def _count_failure(self, name: str, error: DownloadError) -> None:
        with self._lock:
            host = self._hosts[name]
            if error.again or error.reason in ("dns", "tls"):
                host.failures += 1
                host.last_reason = error.reason
                host.closed_until = time.monotonic() + _PAUSE_OF_A_DEAD_HOST
            else:  # the host works, only this picture does not
                host.failures = 0


def keep(found: InspectedPicture, data: bytes, cache: PictureCache) -> InspectedPicture:
    """Store the bytes of a usable picture in the cache, and name the file in the result."""
    if found.reason is not None:
        return found
    path = cache.store(data, found.sha256)
    return replace(found, path=path, mtime_ns=path.stat().st_mtime_ns)


def _host_of(url: str) -> str:
    with suppress(ValueError):
        return urlsplit(web_url(url)).netloc.lower()
    return ""


class _HostQueues:
    """A thread pool in which the tasks of one host use at most half of the threads, rounded up, so that other hosts go on."""

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="mmsid-download")
        self._per_host = (threads + 1) // 2
        self._active: dict[str, int] = defaultdict(int)
        self._waiting: dict[str, deque[tuple[Future, Callable, tuple]]] = defaultdict(deque)
        self._unfinished: set[Future] = set()
        self._lock = threading.Lock()

    def submit(self, host: str, function: Callable, *arguments: object) -> Future:
        future: Future = Future()
        with self._lock:
            self._unfinished.add(future)
            if self._active[host] >= self._per_host:
                self._waiting[host].append((future, function, arguments))
                return future
            self._active[host] += 1
        self._executor.submit(self._run, host, future, function, arguments)
        return future

    def _run(self, host: str, future: Future, function: Callable, arguments: tuple) -> None:
        if future.set_running_or_notify_cancel():
            try:
                result = function(*arguments)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
        with self._lock:
            self._unfinished.discard(future)
            if not self._waiting[host]:
                self._active[host] -= 1
                return
            following = self._waiting[host].popleft()
        with suppress(RuntimeError):  # the pool is closed
            self._executor.submit(self._run, host, *following)

    def close(self) -> None:
        with self._lock:
            for queue in self._waiting.values():
                for future, *_ in queue:
                    future.cancel()
                queue.clear()
        self._executor.shutdown(wait=True, cancel_futures=True)
        for future in self._unfinished:  # the pool cancelled their tasks before they ran
            future.cancel()
