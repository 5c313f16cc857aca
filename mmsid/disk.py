"""Between a program and its disk: files replaced whole, one writer per folder, and failures told so that a person can mend them.

A full disk, a read-only folder or a second job is no bug: each becomes an `ArtifactError` that says what to do, and what was
finished before stays where it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from mmsid.errors import ArtifactError

_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors tells the number in its text alone


@contextlib.contextmanager
def disk_errors(out: Path, kept: str) -> Iterator[None]:
    """Failures of the disk under `out` become an ArtifactError; any other exception passes as it is.

    Args:
        kept: what a next run finds again, for the message.
    """
    try:
        yield
    except OSError as error:
        told = _told(error.errno, error.filename, out, kept)
        if told is None:
            raise
        raise told from error
    except SafetensorError as error:
        number = _RUST_OS_ERROR.search(str(error))
        told = _told(int(number[1]), None, out, kept) if number else None
        if told is None:
            raise
        raise told from error


def _told(number: int | None, file: str | bytes | None, out: Path, kept: str) -> ArtifactError | None:
    """The message for a failure of the disk, or None when `number` is no such failure or is about a file elsewhere."""
    name = os.fsdecode(file) if isinstance(file, (str, bytes)) else None
    where = f" ({name})" if name else ""
    if number in (errno.ENOSPC, errno.EDQUOT):
        what = "the disk is full" if number == errno.ENOSPC else "the disk quota is used up"
        return ArtifactError(f"{out} cannot be written: {what}, {_free(out)}{where}; free some space and run again. {kept}")
    if number == errno.EROFS:
        return ArtifactError(f"{out} cannot be written: its file system is read-only{where}; name another folder and run again. {kept}")
    if name is None or not Path(name).absolute().is_relative_to(out.parent.absolute()):
        return None
    if number in (errno.EACCES, errno.EPERM):
        return ArtifactError(f"{out} cannot be written: permission denied{where}; make the folder writable or name another. {kept}")
    if number == errno.EIO:
        return ArtifactError(f"{out} cannot be written: the disk reports an input/output error{where}; check it and run again. {kept}")
    return None


def _free(out: Path) -> str:
    folder = next((parent for parent in out.absolute().parents if parent.exists()), Path("/"))
    try:
        return f"{shutil.disk_usage(folder).free:,} bytes are left"
    except OSError:
        return "what is left is unknown"


@contextlib.contextmanager
def folder_lock(out: Path) -> Iterator[None]:
    """Hold the lock `.<name>.lock` beside `out`. The kernel drops it when its process dies, however it dies: none is ever stale.

    The lock file names its holder (process, machine), for the message alone.

    Raises:
        ArtifactError: another job holds it, or the file system has no locks.
    """
    lock = out.parent / f".{out.name}.lock"
    handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(handle)
            raise ArtifactError(f"another job{holder} is writing {out} right now; wait for it, stop it, or name another folder") from error
        except OSError as error:
            raise ArtifactError(f"{lock} cannot be locked ({error.strerror}); name a folder on a file system that has locks") from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"process": os.getpid(), "machine": socket.gethostname()}).encode(), 0)
        yield
    finally:
        os.close(handle)  # the file stays: removing it would let a third job lock a new file beside a running second one


def _holder(handle: int) -> str:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        return f" (process {int(found['process'])} on {str(found['machine'])[:100]})"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just taken the lock
        return ""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling to write; on leaving it is fsynced and takes the place of `path` in one step."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def reserve(path: Path, size: int) -> None:
    """Make a file of `size` bytes whose blocks are taken now: writing into a mapped hole of a full disk kills the process (SIGBUS).

    Raises:
        OSError: the disk has no room for it.
    """
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def fsync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
