"""Atomic replacement of files, a lock for the one job that writes a folder, and error messages for failures of the disk.

A full disk, a read-only folder and a second job raise `ArtifactError` with a remedy. Files that were finished before are kept.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from mmsid.errors import ArtifactError

WINDOWS = os.name == "nt"
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors gives the errno only in its message


@contextlib.contextmanager
def disk_errors(out: Path, kept: str) -> Iterator[None]:
    """Turns failures of the disk under `out` into an ArtifactError. Other exceptions pass unchanged.

    Args:
        kept: sentence for the message that names the files which the next run reuses.
    """
    try:
        yield
    except OSError as error:
        failure = _disk_error(error.errno, error.filename, out, kept)
        if failure is None:
            raise
        raise failure from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # its package is not imported for a comparison
            raise
        number = _RUST_OS_ERROR.search(str(error))
        failure = _disk_error(int(number[1]), None, out, kept) if number else None
        if failure is None:
            raise
        raise failure from error


def _disk_error(number: int | None, file: str | bytes | None, out: Path, kept: str) -> ArtifactError | None:
    """The ArtifactError for errno `number`; None if it is no failure of the disk, or concerns a file outside the folder of `out`."""
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
        return "the free space is unknown"


@contextlib.contextmanager
def folder_lock(out: Path) -> Iterator[None]:
    """Exclusive lock `.<name>.lock` beside the folder `out`. The kernel releases it when its process ends, also after SIGKILL.

    The lock file contains the process id and the machine of its holder, for the error message.

    Raises:
        ArtifactError: another job holds the lock, or the file system has no locks.
    """
    from filelock import FileLock, Timeout  # takes long to import

    path = out.parent / f".{out.name}.lock"
    try:
        lock = FileLock(path, fallback_to_soft=False).acquire(blocking=False)  # a soft lock would outlive a killed process
    except Timeout as error:
        holder = path.read_text(errors="replace")[:100]
        raise ArtifactError(
            f"another job is writing {out} (lock {path}, held by {holder!r}); wait for it, stop it, or name another folder"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise ArtifactError(f"{path} cannot be locked ({error.strerror}); name a folder on a file system that has locks") from error
    with lock:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`. On exit the file is fsynced and replaces `path` atomically."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def reserve(path: Path, size: int) -> None:
    """Creates a file of `size` bytes and allocates its blocks.

    Without allocation, a write through a memory map on a full disk kills the process (SIGBUS).

    Raises:
        OSError: the disk is full.
    """
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS and Windows
            zeros = bytes(2**20)
            for start in range(0, size, len(zeros)):
                file.write(zeros[: size - start])


def fsync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk. Windows does not open folders, so theirs are left to the system."""
    if WINDOWS and Path(path).is_dir():
        return
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
