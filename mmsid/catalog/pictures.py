"""Pictures from strangers, decoded safely: confined paths, allow-listed decoders, caps read off the header first.

Errors carry a short fixed code; the decoder's own text is never passed on, since it has leaked heap addresses before
(CVE-2026-22778).
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmsid.catalog.config import PictureLimits
from mmsid.catalog.isolated_decoding import decode_isolated
from mmsid.catalog.picture_decoding import decode, is_truncated, open_picture, refusal
from mmsid.errors import PictureError


@dataclass(frozen=True, slots=True)
class InspectedPicture:
    """What reading the bytes and the header of one picture told, without decoding it.

    Attributes:
        path: where it lies, or None when it cannot be used.
        sha256: of its bytes; of the reason when no bytes may be read, so that it names content and never a path.
        reason: None, or a key of `REASONS`.
    """

    path: Path | None
    sha256: str
    reason: str | None


def load_picture(path: str | Path, limits: PictureLimits, root: Path | None = None) -> Image.Image:
    """Decode one picture to 8-bit RGB, upright by its EXIF orientation, transparency laid on white.

    With `root`, a relative `path` is taken from there and whatever it resolves to must lie below it.

    Raises:
        PictureError: with `.reason`, one of `REASONS`.
    """
    data = _read(path, limits, root)
    if not limits.isolate:
        return decode(data, limits, path)
    return decode_isolated(data, limits, path)


def picture_bytes_sha256(path: str | Path, limits: PictureLimits, root: Path | None = None) -> str:
    """Hex digest of the picture file's bytes, under the same confinement and byte cap as `load_picture`.

    Raises:
        PictureError: the file may not or cannot be read.
    """
    return hashlib.sha256(_read(path, limits, root)).hexdigest()


def inspect_picture(path: str, limits: PictureLimits, root: Path) -> InspectedPicture:
    """Read the bytes once, hash them, check header, caps and the end mark. Never raises for a bad picture."""
    try:
        data = _read(path, limits, root)
    except PictureError as error:
        return InspectedPicture(None, hashlib.sha256(error.reason.encode()).hexdigest(), error.reason)
    digest = hashlib.sha256(data).hexdigest()
    try:
        with open_picture(data, limits, path):
            pass
    except PictureError as error:
        return InspectedPicture(None, digest, error.reason)
    if is_truncated(data):
        return InspectedPicture(None, digest, "truncated")
    return InspectedPicture((Path(root) / path).absolute(), digest, None)


def _confined(path: str | Path, root: Path | None) -> str:
    """The real path, all symbolic links followed; refused when it is not below the real `root`."""
    try:
        if root is None:
            return os.path.realpath(path)
        real_root = _real_root(str(root))
        real = os.path.realpath(os.path.join(real_root, path))
        if os.path.commonpath([real, real_root]) == real_root:
            return real
    except (ValueError, OSError):  # NUL bytes, names that no file system takes
        raise refusal("not_a_file", path) from None
    raise refusal("outside_root", path)


@functools.lru_cache(maxsize=8)
def _real_root(root: str) -> str:
    return os.path.realpath(root)  # once, not for every picture: it comes from the configuration, not from the table


def _read(path: str | Path, limits: PictureLimits, root: Path | None) -> bytes:
    real = _confined(path, root)
    try:
        # O_NOFOLLOW: the path is real already, so a link here was swapped in since; O_NONBLOCK: a pipe must not hang us
        handle = os.open(real, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise refusal("missing", path) from None
    except (OSError, ValueError):
        raise refusal("unreadable", path) from None
    try:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise refusal("not_a_file", path)
        if facts.st_size > limits.max_bytes:
            raise refusal("too_many_bytes", path)
        with open(handle, "rb", closefd=False) as file:
            data = file.read(limits.max_bytes + 1)
    except OSError:
        raise refusal("unreadable", path) from None
    finally:
        os.close(handle)
    if len(data) > limits.max_bytes:  # it grew while we looked
        raise refusal("too_many_bytes", path)
    return data
