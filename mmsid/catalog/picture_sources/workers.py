"""Processes that look at local picture files side by side.

Each is started as a program of its own instead of by `multiprocessing`, which would import the user's script again and start it anew if it
has no `if __name__ == "__main__"`. Requests and replies are JSON, never pickles, because a process may be taken over by a malicious file.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import fields
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path

from mmsid.catalog.config import PictureLimits
from mmsid.catalog.picture_sources.local_files import Roots
from mmsid.catalog.picture_sources.reasons import refusal
from mmsid.catalog.pictures import InspectedPicture, failed_picture, inspect_picture
from mmsid.errors import ConfigError

_MOST_PROCESSES = 32
_PROGRAM = """
import sys, types
package = sys.modules["mmsid.catalog"] = types.ModuleType("mmsid.catalog")
package.__path__ = [sys.argv[1]]
from mmsid.catalog.picture_sources.workers import serve
serve(int(sys.argv[2]))
"""
"""Program of a process. It does not run `mmsid/catalog/__init__.py`, whose imports take longer than a thousand pictures."""
_VALUES = attrgetter(*(field.name for field in fields(InspectedPicture)))
_CATALOG_PACKAGE = str(Path(__file__).parents[1])


def usable_cpus() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Process:
    def __init__(self, settings: bytes) -> None:
        self.pipe, child_end = Pipe()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _PROGRAM, _CATALOG_PACKAGE, str(child_end.fileno())],
            pass_fds=[child_end.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        child_end.close()
        try:
            self.pipe.send_bytes(settings)
            self.pipe.recv_bytes(1)  # the process is ready, so a picture is the cause of a later crash
        except (EOFError, OSError) as error:
            self.close()
            code = self.process.returncode
            raise ConfigError(f"a process that looks at pictures ended at its start with code {code}; run again with fewer jobs") from error

    def request(self, chunk: list) -> list:
        self.pipe.send_bytes(json.dumps(chunk).encode("ascii"))
        return json.loads(self.pipe.recv_bytes())

    def close(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.wait()


class PictureProcesses:
    """A pool of processes that apply `inspect_picture` to chunks of references. Use it as a context manager."""

    def __init__(self, limits: PictureLimits, root: Roots, processes: int | None = None) -> None:
        count = min(processes or usable_cpus(), _MOST_PROCESSES)
        roots = [root] if isinstance(root, (str, Path)) else list(root or ())
        self._settings = json.dumps([limits.model_dump(mode="json"), [os.path.abspath(one) for one in roots] or None]).encode("ascii")
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="mmsid-pictures")
        self._own = threading.local()
        self._running: set[_Process] = set()
        self._closed = False

    def __enter__(self) -> PictureProcesses:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in list(self._running):
            process.process.kill()  # a thread that waits for it goes on
        self._threads.shutdown(wait=True)
        for process in list(self._running):
            process.close()

    def submit(self, references: Sequence[str], known: Mapping[str, InspectedPicture]) -> Future[list[InspectedPicture]]:
        """Look at the files of one chunk. `known` holds earlier results."""
        chunk = [[reference, _row(known[reference]) if reference in known else None] for reference in references]
        return self._threads.submit(self._inspect, chunk)

    def _inspect(self, chunk: list) -> list[InspectedPicture]:
        process = getattr(self._own, "process", None)
        if process is None:
            process = self._own.process = _Process(self._settings)
            self._running.add(process)
        try:
            return [_picture(row) for row in process.request(chunk)]
        except (EOFError, OSError):
            self._running.discard(process)
            process.close()
            self._own.process = None
        if self._closed:
            raise CancelledError
        if len(chunk) == 1:  # a file that crashes the reading of headers
            return [failed_picture(refusal("crashed", chunk[0][0]))]
        return [self._inspect([one])[0] for one in chunk]


def _row(picture: InspectedPicture) -> list:
    path, *others = _VALUES(picture)
    return [None if path is None else str(path), *others]


def _picture(row: list) -> InspectedPicture:
    path, *others = row
    return InspectedPicture(None if path is None else Path(path), *others)


def serve(handle: int) -> None:
    """Main loop of a process: look at chunks until the pipe of this file handle is closed."""
    pipe = Connection(handle)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        limits_json, roots = json.loads(pipe.recv_bytes())
        limits = PictureLimits.model_validate(limits_json)
        pipe.send_bytes(b"+")
        while True:
            chunk = json.loads(pipe.recv_bytes())
            found = [inspect_picture(reference, limits, roots, earlier and _picture(earlier)) for reference, earlier in chunk]
            pipe.send_bytes(json.dumps([_row(picture) for picture in found]).encode("ascii"))
