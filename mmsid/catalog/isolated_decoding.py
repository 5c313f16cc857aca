"""Pixels decoded in a process of its own, with limits on memory and processor time: a decoder that is broken into, runs wild or
crashes takes nothing with it but one picture.

The parent reads the file (path and size are checked there) and sends its bytes. The worker answers with raw pixels or a fixed
code, never with a pickle, so that nothing it says is trusted. It may write no files. Headers are still read in the parent when a
catalogue is read: that part of Pillow is Python.
"""

from __future__ import annotations

import contextlib
import os
import queue
import resource
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
from mmsid.catalog.picture_decoding import REASONS, decode, refusal
from mmsid.errors import ConfigError, PictureError

_PIXELS, _REFUSED = b"+", b"-"
_SIZE = struct.Struct("<II")
_PATIENCE = 30  # wall seconds granted per CPU second: a busy machine is no fault of the picture's


class _Worker:
    """One decoding process and the pipe to it."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        command = [sys.executable, "-m", "mmsid.catalog.isolated_decoding", str(theirs.fileno())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        try:
            self.pipe.recv_bytes(1)  # it is up: what dies from now on died of a picture
        except (EOFError, OSError) as error:
            self.close()
            code = self.process.returncode
            raise ConfigError(f"pictures.isolate: a decoding process ended with code {code} as it started; set it to false") from error

    def close(self) -> None:
        self.pipe.close()  # an idle worker reads the end of its pipe and leaves
        self.process.kill()
        self.process.wait()


_idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()


def _forget_workers() -> None:
    """In a forked child: the workers belong to the parent, and two processes on one pipe would read each other's pictures."""
    global _idle
    _idle = queue.SimpleQueue()


os.register_at_fork(after_in_child=_forget_workers)


@contextlib.contextmanager
def _worker() -> Iterator[_Worker]:
    """An idle worker that lives, or a new one; it goes back to the others unless an exception passes."""
    worker = None
    while worker is None or worker.process.poll() is not None:
        try:
            worker = _idle.get_nowait()
        except queue.Empty:
            worker = _Worker()
    try:
        yield worker
    except BaseException:
        worker.close()
        raise
    _idle.put(worker)


def decode_isolated(data: bytes, limits: PictureLimits, path: str | Path) -> Image.Image:
    """As `picture_decoding.decode`, in a worker. There are as many workers as threads that decode at once; they are started when needed.

    Raises:
        PictureError: as there, and `too_slow`, `too_much_memory`, `crashed`.
        ConfigError: a worker cannot be started.
    """
    with _worker() as worker:
        try:
            answer = _ask(worker.pipe, data, limits)
        except TimeoutError:
            raise refusal("too_slow", path) from None
        except (EOFError, OSError, ValueError):
            worker.close()
            raise refusal("too_slow" if worker.process.returncode == -signal.SIGXCPU else "crashed", path) from None
    if isinstance(answer, str):
        raise refusal(answer, path)
    return answer


def _ask(pipe: Connection, data: bytes, limits: PictureLimits) -> Image.Image | str:
    """The picture, or the reason why there is none. ValueError: an answer that no honest worker gives."""
    pipe.send_bytes(limits.model_dump_json().encode())
    pipe.send_bytes(data)
    if not pipe.poll(limits.max_seconds * _PATIENCE):
        raise TimeoutError
    answer = pipe.recv_bytes(64)
    if answer[:1] == _REFUSED and (reason := answer[1:].decode("ascii", "replace")) in REASONS:
        return reason
    if answer[:1] != _PIXELS or len(answer) != 1 + _SIZE.size:
        raise ValueError
    size = _SIZE.unpack(answer[1:])
    return Image.frombytes("RGB", size, pipe.recv_bytes(3 * limits.max_pixels))  # ValueError when the pixels are not as many


def _serve(pipe: Connection) -> None:
    """A worker's life: one picture after the other until the pipe ends."""
    Image.init()
    for unwanted in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(unwanted, (0, 0))
    pipe.send_bytes(_PIXELS)
    while True:
        try:
            limits, data = PictureLimits.model_validate_json(pipe.recv_bytes()), pipe.recv_bytes()  # by the parent, who is trusted
        except EOFError:
            return
        _limit(limits)
        try:
            picture = decode(data, limits, "")
            answer = [_PIXELS + _SIZE.pack(*picture.size), picture.tobytes()]
        except PictureError as error:
            answer = [_REFUSED + error.reason.encode()]
        for part in answer:
            pipe.send_bytes(part)


def _limit(limits: PictureLimits) -> None:
    """From here on so much more memory and processor time; past the latter the kernel ends the process (SIGXCPU)."""
    statm = Path("/proc/self/statm")
    if statm.exists():  # elsewhere than on Linux nothing tells what is mapped already, and only the time is limited
        _at_most(resource.RLIMIT_AS, int(statm.read_text().split()[0]) * resource.getpagesize() + limits.max_memory)
    used = resource.getrusage(resource.RUSAGE_SELF)
    _at_most(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + limits.max_seconds)


def _at_most(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        _serve(Connection(int(sys.argv[1])))
