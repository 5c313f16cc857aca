"""Inspection of many pictures of all sources, in parallel, with results in the order of the references."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

from mmsid.catalog.config import PictureLimits
from mmsid.catalog.picture_sources.cache import PictureCache
from mmsid.catalog.picture_sources.downloads import Downloader, keep
from mmsid.catalog.picture_sources.local_files import Roots
from mmsid.catalog.picture_sources.references import inline_bytes, reference_kind
from mmsid.catalog.picture_sources.workers import PictureProcesses, usable_cpus
from mmsid.catalog.pictures import InspectedPicture, failed_picture, inspect_bytes, inspect_picture
from mmsid.errors import PictureError

PROCESSES_FROM = 8_000
"""Number of local files from which processes are started. Each takes as long to start as some 5,000 files to look at."""
_BLOCK, _CHUNK = 2_048, 64
_INLINE_THREADS, _INLINE_AT_ONCE = 4, 16  # decoded base64 texts are held in memory until they are written

Result = Callable[[], InspectedPicture]


def inspect_pictures(
    references: Sequence[str | bytes],
    limits: PictureLimits,
    root: Roots,
    cache: Path,
    known: Mapping[str, InspectedPicture] | None = None,
    *,
    downloader: Downloader | None = None,
) -> Iterator[InspectedPicture]:
    """Look at pictures: find each file, download or unpack it if necessary, hash it, and check header, limits and end.

    Pixels are not decoded. A bad picture does not raise. Each distinct text reference is looked at once.

    For several calls in one run, pass the same `downloader`: its limit of all bytes and its knowledge of dead hosts then hold for the run.

    Args:
        references: paths below `root`, `file:` URLs, bytes, base64 texts, data URLs, http(s) URLs, or URLs of fsspec such as `s3://`.
        limits: limits of pictures and downloads.
        root: folder of the local pictures, or several folders (rules: `picture_sources.local_files`).
        cache: folder in which pictures from bytes, texts and URLs are kept as files `ab/abcdef...`, named by their SHA-256. A picture of a
            URL that it holds is not downloaded again.
        known: reference -> earlier result under the same limits. It is used again while the size and the time of the file are the same.
        downloader: a running downloader, whose own cache is used for URLs. It stays open.

    Yields:
        One result per reference, in their order.

    Raises:
        CatalogError: the index of the cache is damaged.
        ConfigError: `limits.isolate` is set, and its process cannot be started.
        OSError: the cache cannot be written.
    """
    with ExitStack() as stack:
        inspection = _Inspection(references, limits, root, cache, known or {}, downloader, stack)
        blocks: deque[list[Result]] = deque()
        for start in range(0, len(references), _BLOCK):
            blocks.append(inspection.start(references[start : start + _BLOCK]))
            if len(blocks) == 2:  # the next block is worked on while this one is read
                yield from (result() for result in blocks.popleft())
        for block in blocks:
            yield from (result() for result in block)


class _Inspection:
    """One call of `inspect_pictures`. What it starts is closed with `stack`."""

    def __init__(
        self,
        references: Sequence[str | bytes],
        limits: PictureLimits,
        root: Roots,
        cache: Path,
        known: Mapping[str, InspectedPicture],
        downloader: Downloader | None,
        stack: ExitStack,
    ) -> None:
        self.limits, self.root, self.known, self.stack = limits, root, known, stack
        self.cache = stack.enter_context(closing(PictureCache(cache)))
        self._downloader = downloader
        self._inline: ThreadPoolExecutor | None = None
        self._inline_free = threading.BoundedSemaphore(_INLINE_AT_ONCE)
        counts = Counter(reference for reference in references if isinstance(reference, str))
        self._repeated = {reference for reference, count in counts.items() if count > 1}
        self._first: dict[str, Result | None] = {}  # None until its chunk is started
        new = [reference for reference in counts if reference not in known] if len(counts) >= PROCESSES_FROM else []
        local = sum(reference_kind(reference) == "path" for reference in new)
        use_processes = local >= PROCESSES_FROM and usable_cpus() > 1
        self._processes = stack.enter_context(PictureProcesses(limits, root)) if use_processes else None

    def start(self, references: Sequence[str | bytes]) -> list[Result]:
        """Start to look at a block of references. Each result is waited for by calling it."""
        results: list[Result | None] = [None] * len(references)
        local: list[int] = []
        for at, reference in enumerate(references):
            if isinstance(reference, str) and reference in self._first:
                continue  # filled in below
            if isinstance(reference, str) and reference in self._repeated:
                self._first[reference] = None
            results[at] = self._start_one(reference)
            if results[at] is None:
                local.append(at)
        for first in range(0, len(local), _CHUNK):
            self._start_local(references, local[first : first + _CHUNK], results)
        for at, reference in enumerate(references):
            if results[at] is None:
                results[at] = self._first[reference]
            elif isinstance(reference, str) and self._first.get(reference, self) is None:
                self._first[reference] = results[at]
        return results

    def _start_one(self, reference: str | bytes) -> Result | None:
        """Start on a picture that is no local file, or return None."""
        kind = reference_kind(reference)
        if kind == "path":
            return None
        if kind == "bytes":
            return self._start_inline(reference)
        if (earlier := self.known.get(reference)) is not None and self._is_in_cache(earlier):
            return lambda: earlier
        return self._open_downloader().submit(reference).result

    def _start_local(self, references: Sequence[str | bytes], chunk: list[int], results: list[Result | None]) -> None:
        if self._processes is None:
            for at in chunk:
                results[at] = _once(self._local, references[at])
            return
        future = self._processes.submit([references[at] for at in chunk], self.known)
        for number, at in enumerate(chunk):
            results[at] = _element(future, number)

    def _local(self, reference: str) -> InspectedPicture:
        return inspect_picture(reference, self.limits, self.root, self.known.get(reference))

    def _start_inline(self, reference: str | bytes) -> Result:
        if self._inline is None:
            self._inline = self.stack.enter_context(ThreadPoolExecutor(_INLINE_THREADS, thread_name_prefix="mmsid-inline"))
        self._inline_free.acquire()
        future = self._inline.submit(self._inspect_inline, reference)
        future.add_done_callback(lambda _: self._inline_free.release())
        return future.result

    def _inspect_inline(self, reference: str | bytes) -> InspectedPicture:
        try:
            data = inline_bytes(reference, self.limits.max_bytes)
        except PictureError as error:
            return failed_picture(error)
        return keep(inspect_bytes(data, self.limits, reference), data, self.cache)

    def _is_in_cache(self, earlier: InspectedPicture) -> bool:
        if earlier.path is None or earlier.path != self.cache.file_of(earlier.sha256):
            return False
        try:
            status = earlier.path.stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (earlier.num_bytes, earlier.mtime_ns)

    def _open_downloader(self) -> Downloader:
        if self._downloader is None:
            self._downloader = self.stack.enter_context(Downloader(self.limits, self.cache.folder))
        return self._downloader


def _once(function: Callable[[str], InspectedPicture], reference: str) -> Result:
    """A call that is made when its result is first needed, and remembered."""
    found: list[InspectedPicture] = []

    def result() -> InspectedPicture:
        if not found:
            found.append(function(reference))
        return found[0]

    return result


def _element(future: Future[list[InspectedPicture]], number: int) -> Result:
    return lambda: future.result()[number]
