"""Decoding of pictures in a sandboxed child process with limits on memory and processor time.

An exploited or crashing decoder affects one picture only. The parent reads the file and sends its bytes; the worker, which may not write
files, replies with raw pixels or a fixed code, never with a pickle. The parent parses those headers only that Pillow reads in Python.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from PIL import Image

from mmsid.catalog.config import PictureLimits
from mmsid.catalog.picture_decoding import REASONS, Header, decode, read_header, refusal, register_heif
from mmsid.catalog.picture_formats import picture_format
from mmsid.disk import WINDOWS
from mmsid.errors import ConfigError, PictureError

_DECODE, _HEADER = b"d", b"h"
_PIXELS, _REFUSED = b"+", b"-"
PARSED_IN_C = ("WEBP", "AVIF", "HEIF")
"""Formats whose header is parsed by a library in C, so that untrusted headers belong into the child process too."""
_SIZE = struct.Struct("<II")
_WALL_SECONDS_PER_CPU_SECOND = 30  # a busy machine must not fail a picture


class _Worker:
    """A decoding process and the pipe to it."""

    def __init__(self) -> None:
        if WINDOWS:
            raise ConfigError("pictures.isolate: Windows has no limits on the memory and time of a process; set it to false")
        self.pipe, child_end = Pipe()
        command = [sys.executable, "-m", "mmsid.catalog.isolated_decoding", str(child_end.fileno())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            command,
            pass_fds=[child_end.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        child_end.close()
        try:
            self.pipe.recv_bytes(1)  # the process is ready, so a picture is the cause of a later crash
        except (EOFError, OSError) as error:
            self.close()
            code = self.process.returncode
            raise ConfigError(f"pictures.isolate: a decoding process ended at its start with code {code}; set it to false") from error

    def close(self) -> None:
        self.pipe.close()  # an idle worker ends when its pipe is closed
        self.process.kill()
        self.process.wait()


_idle_workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()


def _reset_idle_workers() -> None:
    """Start without workers in a forked child. Two processes that share a pipe would receive each other's pictures."""
    global _idle_workers
    _idle_workers = queue.SimpleQueue()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_reset_idle_workers)


@contextlib.contextmanager
def _borrow_worker() -> Iterator[_Worker]:
    """Yield an idle worker that is alive, or a new one. It becomes idle again, or is closed after an exception."""
    worker = None
    while worker is None or worker.process.poll() is not None:
        try:
            worker = _idle_workers.get_nowait()
        except queue.Empty:
            worker = _Worker()
    try:
        yield worker
    except BaseException:
        worker.close()
        raise
    _idle_workers.put(worker)


def decode_isolated(data: bytes, limits: PictureLimits, path: str | Path) -> Image.Image:
    """`picture_decoding.decode` in a worker process. Workers are started on demand, one for each thread that decodes at the same time.

    Raises:
        PictureError: the reasons of `decode`, and `too_slow`, `too_much_memory` and `crashed`.
        ConfigError: a worker cannot be started.
    """
    return Image.frombytes("RGB", *_reply(_DECODE, data, limits, path))


def read_header_isolated(data: bytes, limits: PictureLimits, path: str | Path) -> Header:
    """`picture_decoding.read_header` in a worker process, for the formats `PARSED_IN_C`. Raises like `decode_isolated`."""
    size, _ = _reply(_HEADER, data, limits, path)
    return Header(str(picture_format(data)), *size)


def _reply(command: bytes, data: bytes, limits: PictureLimits, path: str | Path) -> tuple[tuple[int, int], bytes]:
    with _borrow_worker() as worker:
        try:
            reply = _request(worker.pipe, command, data, limits)
        except TimeoutError:
            raise refusal("too_slow", path) from None
        except (EOFError, OSError, ValueError):
            worker.close()
            raise refusal("too_slow" if worker.process.returncode == -signal.SIGXCPU else "crashed", path) from None
    if isinstance(reply, str):
        raise refusal(reply, path)
    return reply


def _request(pipe: Connection, command: bytes, data: bytes, limits: PictureLimits) -> tuple[tuple[int, int], bytes] | str:
    """Size and pixels (none for a header), or the reason of the refusal.

    Raises ValueError for a malformed reply, and TimeoutError without a reply.
    """
    pipe.send_bytes(limits.model_dump_json().encode())
    pipe.send_bytes(command)
    pipe.send_bytes(data)
    if not pipe.poll(limits.max_seconds * _WALL_SECONDS_PER_CPU_SECOND):
        raise TimeoutError
    reply = pipe.recv_bytes(64)
    if reply[:1] == _REFUSED and (reason := reply[1:].decode("ascii", "replace")) in REASONS:
        return reason
    if reply[:1] != _PIXELS or len(reply) != 1 + _SIZE.size:
        raise ValueError
    size = _SIZE.unpack(reply[1:])
    body = pipe.recv_bytes(max(3 * limits.max_pixels, 64))
    if command == _DECODE and len(body) != 3 * size[0] * size[1]:
        raise ValueError
    return size, body


def _serve(pipe: Connection) -> None:
    """Main loop of a worker: decode pictures until the pipe is closed."""
    import resource  # not on Windows, where no worker is started

    Image.init()
    register_heif()
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))
    pipe.send_bytes(_PIXELS)
    while True:
        try:
            limits = PictureLimits.model_validate_json(pipe.recv_bytes())  # the parent is trusted
            command, data = pipe.recv_bytes(), pipe.recv_bytes()
        except EOFError:
            return
        _limit_resources(limits)
        try:
            if command == _HEADER:
                reply = [_PIXELS + _SIZE.pack(*read_header(data, limits, "")[1:]), b""]
            else:
                picture = decode(data, limits, "")
                reply = [_PIXELS + _SIZE.pack(*picture.size), picture.tobytes()]
        except PictureError as error:
            reply = [_REFUSED + error.reason.encode()]
        for part in reply:
            pipe.send_bytes(part)


def _limit_resources(limits: PictureLimits) -> None:
    """Limit additional memory and processor time from now on. The kernel ends the process with SIGXCPU when its time is used up."""
    import resource

    statm = Path("/proc/self/statm")
    if statm.exists():  # Linux only; on other systems the mapped size is unknown, and only the time is limited
        _set_soft_limit(resource.RLIMIT_AS, int(statm.read_text().split()[0]) * resource.getpagesize() + limits.max_memory)
    used = resource.getrusage(resource.RUSAGE_SELF)
    _set_soft_limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + limits.max_seconds)


def _set_soft_limit(kind: int, value: int) -> None:
    import resource

    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        _serve(Connection(int(sys.argv[1])))
