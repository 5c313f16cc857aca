"""Reading of untrusted pictures: paths confined to a root, allowed decoders only, limits checked on the header first.

Errors have a short fixed code. The decoder's own text is never passed on, because it has leaked heap addresses (CVE-2026-22778).
`picture_sources.inspection.inspect_pictures` looks at many pictures, also at those of URLs.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from mmsid.catalog.config import PictureLimits
from mmsid.catalog.isolated_decoding import PARSED_IN_C, decode_isolated, read_header_isolated
from mmsid.catalog.picture_decoding import Header, decode, read_header
from mmsid.catalog.picture_formats import picture_format
from mmsid.catalog.picture_sources.local_files import LocalFile, Roots, find_file, read_file
from mmsid.catalog.picture_sources.reasons import refusal
from mmsid.catalog.picture_sources.references import inline_bytes, local_path, reference_kind
from mmsid.errors import PictureError


@dataclass(frozen=True, slots=True)
class InspectedPicture:
    """Result of looking at one picture.

    Attributes:
        path: absolute path of the file, or None when the picture cannot be used.
        sha256: hash of the file's bytes, or of the reason when the bytes cannot be read. It never depends on the path.
        reason: None, or a key of `picture_sources.reasons.REASONS`.
        format: Pillow's name of the format, such as `JPEG`, or None when the header cannot be read.
        width, height: stored size in pixels, before any rotation; 0 when the header cannot be read.
        num_bytes: size of the file in bytes; 0 when it cannot be read.
        detail: '' or a fact that helps a person, such as `HTTP 404`.
        mtime_ns: time of the file's modification in nanoseconds; 0 when there is no file.
    """

    path: Path | None
    sha256: str
    reason: str | None
    format: str | None = None
    width: int = 0
    height: int = 0
    num_bytes: int = 0
    detail: str = ""
    mtime_ns: int = 0


def load_picture(reference: str | Path | bytes, limits: PictureLimits, root: Roots = None) -> Image.Image:
    """Decode one picture to 8-bit RGB. EXIF orientation is applied, and transparent pixels are composited on white.

    Args:
        reference: a path, a `file://` URL, the bytes of a picture file, base64 text or a data URL. Other URLs are refused.
        root: folder below which a path must stay (rules: `picture_sources.local_files`). A relative path starts there. With several
            folders, it starts at the first, and the file may be below any. None: no confinement.

    Raises:
        PictureError: the picture cannot be used; `.reason` is a key of `picture_sources.reasons.REASONS`.
    """
    return decode_picture(picture_bytes(reference, limits, root), limits, reference)


def picture_bytes(reference: str | Path | bytes, limits: PictureLimits, root: Roots = None) -> bytes:
    """The bytes of a picture file, not decoded. Arguments and errors as for `load_picture`."""
    kind = reference_kind(reference)
    if kind in ("web", "store"):
        raise refusal("not_downloaded", reference)
    if kind == "path":
        return read_file(find_file(local_path(reference), limits, root), limits, reference)[0]
    return inline_bytes(reference, limits.max_bytes)


def decode_picture(data: bytes, limits: PictureLimits, reference: str | Path | bytes) -> Image.Image:
    """Decode the bytes of a picture file as `load_picture` does. `reference` is used in messages only."""
    return decode_isolated(data, limits, reference) if limits.isolate else decode(data, limits, reference)


def inspect_picture(path: str, limits: PictureLimits, root: Roots, earlier: InspectedPicture | None = None) -> InspectedPicture:
    """Hash the bytes of a local picture file and check its header, limits and end, without decoding. A bad picture does not raise.

    Args:
        earlier: result for the same path under the same limits. It is returned without reading the file, if the file's size and time of
            modification are still the same.
    """
    try:
        if reference_kind(path) != "path":
            raise refusal("not_downloaded", path)
        file = find_file(local_path(path), limits, root)
        if earlier is not None and earlier.mtime_ns and _unchanged(file, earlier):
            return replace(earlier, path=earlier.path and Path(file.path))
        data, mtime_ns = read_file(file, limits, path)
    except PictureError as error:
        return failed_picture(error)
    found = inspect_bytes(data, limits, path)
    detail = f"read as {file.repaired}" if file.repaired and not found.detail else found.detail
    return replace(found, path=None if found.reason else Path(file.path), detail=detail, mtime_ns=mtime_ns)


def inspect_bytes(data: bytes, limits: PictureLimits, reference: str | bytes | Path) -> InspectedPicture:
    """Hash the bytes of a picture file and check them. `.path` is None in any case, and `reference` is used in messages only."""
    digest = hashlib.sha256(data).hexdigest()
    try:
        if len(data) > limits.max_bytes:
            raise refusal("too_many_bytes", reference)
        header = _header(data, limits, reference)
    except PictureError as error:
        return InspectedPicture(None, digest, error.reason, picture_format(data), num_bytes=len(data), detail=error.detail)
    return InspectedPicture(None, digest, None, *header, num_bytes=len(data))


def failed_picture(error: PictureError) -> InspectedPicture:
    """Result for a picture of which no byte could be read."""
    return InspectedPicture(None, hashlib.sha256(error.reason.encode()).hexdigest(), error.reason, detail=error.detail)


def _header(data: bytes, limits: PictureLimits, reference: str | bytes | Path) -> Header:
    if limits.isolate and picture_format(data) in PARSED_IN_C:
        return read_header_isolated(data, limits, reference)
    return read_header(data, limits, reference)


def _unchanged(file: LocalFile, earlier: InspectedPicture) -> bool:
    try:
        status = os.stat(file.real)
    except OSError:
        return False
    return status.st_size == earlier.num_bytes and status.st_mtime_ns == earlier.mtime_ns
