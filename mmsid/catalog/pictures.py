"""Reading of untrusted picture files: paths confined to a root, allowed decoders only, limits checked on the header first.

Errors have a short fixed code. The decoder's own text is never passed on, because it has leaked heap addresses (CVE-2026-22778).
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
    """Result of `inspect_picture`.

    Attributes:
        path: absolute path of the file, or None when the picture cannot be used.
        sha256: hash of the file's bytes, or of the reason when the bytes cannot be read. It never depends on the path.
        reason: None, or a key of `picture_decoding.REASONS`.
    """

    path: Path | None
    sha256: str
    reason: str | None


def load_picture(path: str | Path, limits: PictureLimits, root: Path | None = None) -> Image.Image:
    """Decode one picture to 8-bit RGB. EXIF orientation is applied, and transparent pixels are composited on white.

    With `root`, a relative `path` starts there, and the path with all links resolved must be below it.

    Raises:
        PictureError: the picture cannot be used; `.reason` is a key of `picture_decoding.REASONS`.
    """
    data = _read(path, limits, root)
    if not limits.isolate:
        return decode(data, limits, path)
    return decode_isolated(data, limits, path)


def inspect_picture(path: str, limits: PictureLimits, root: Path) -> InspectedPicture:
    """Hash the bytes of a picture file and check its header, limits and end mark, without decoding. A bad picture does not raise."""
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
    """The path with all symbolic links resolved. Raises PictureError when it is not below the resolved `root`."""
    try:
        if root is None:
            return os.path.realpath(path)
        real_root = _real_root(str(root))
        real = os.path.realpath(os.path.join(real_root, path))
        if os.path.commonpath([real, real_root]) == real_root:
            return real
    except (ValueError, OSError):  # NUL bytes, or names that no file system accepts
        raise refusal("not_a_file", path) from None
    raise refusal("outside_root", path)


@functools.lru_cache(maxsize=8)
def _real_root(root: str) -> str:
    return os.path.realpath(root)  # cached: the root comes from the configuration and is the same for all pictures


def _read(path: str | Path, limits: PictureLimits, root: Path | None) -> bytes:
    real = _confined(path, root)
    try:
        # O_NOFOLLOW: links are resolved already, so a link here was swapped in since. O_NONBLOCK: opening a pipe must not block.
        handle = os.open(real, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise refusal("missing", path) from None
    except (OSError, ValueError):
        raise refusal("unreadable", path) from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise refusal("not_a_file", path)
        if status.st_size > limits.max_bytes:
            raise refusal("too_many_bytes", path)
        with open(handle, "rb", closefd=False) as file:
            data = file.read(limits.max_bytes + 1)
    except OSError:
        raise refusal("unreadable", path) from None
    finally:
        os.close(handle)
    if len(data) > limits.max_bytes:  # the file grew after fstat
        raise refusal("too_many_bytes", path)
    return data
