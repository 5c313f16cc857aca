"""Pictures from strangers, decoded safely: confined paths, allow-listed decoders, caps read off the header first.

Errors carry a short fixed code; the decoder's own text is never passed on, since it has leaked heap addresses before
(CVE-2026-22778).
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmsid.catalog.config import PictureLimits
from mmsid.errors import PictureError

REASONS = {
    "missing": "the file does not exist; correct the path or the image_root",
    "outside_root": "the path leads outside the image_root; move the picture below it",
    "not_a_file": "the path is not a regular local file; name a picture file",
    "unreadable": "the file cannot be read; check its permissions",
    "too_many_bytes": "the file is larger than pictures.max_bytes; shrink it or raise the limit",
    "too_many_pixels": "the header declares more than pictures.max_pixels; shrink it or raise the limit",
    "format": "no allowed decoder knows the file; convert it or extend pictures.formats",
    "animated": "the file holds several frames; save one, or set pictures.animated to first_frame",
    "truncated": "the file ends early; copy it anew",
    "corrupt": "the file cannot be decoded; copy it anew",
    "too_slow": "decoding took more than pictures.max_seconds of processor time; save it anew or raise the limit",
    "too_much_memory": "decoding wanted more than pictures.max_memory; shrink it or raise the limit",
    "crashed": "its decoder crashed, which an honest file does not cause; do not open it elsewhere",
}
_MODES_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
# once for the process: warnings.catch_warnings around each picture is neither thread-safe nor cheap
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


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
    from mmsid.catalog.isolation import decode_isolated  # it imports this module, as its workers do

    return decode_isolated(data, limits, path)


def decode(data: bytes, limits: PictureLimits, path: str | Path) -> Image.Image:
    """Decode the bytes of a picture file in this process; `path` is for messages only. Otherwise as `load_picture`.

    Raises:
        PictureError: the bytes are no usable picture.
    """
    try:
        with _open(data, limits, path) as picture:
            if _is_truncated(data):  # decoders mend some torn files; what the catalogue refuses is refused here
                raise refusal("truncated", path)
            picture.load()
            return _rgb(_upright(picture))
    except PictureError:
        raise
    except MemoryError:
        raise refusal("too_much_memory", path) from None
    except Exception:  # whatever a decoder throws means one thing here, and its text stays inside
        raise refusal("corrupt", path) from None


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
        with _open(data, limits, path):
            pass
    except PictureError as error:
        return InspectedPicture(None, digest, error.reason)
    if _is_truncated(data):
        return InspectedPicture(None, digest, "truncated")
    return InspectedPicture((Path(root) / path).absolute(), digest, None)


def refusal(reason: str, path: str | Path) -> PictureError:
    """The error for a picture, worded for people; `reason` is a key of `REASONS`."""
    return PictureError(reason, f"picture {str(path)!r}: {REASONS[reason]}")


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


def _open(data: bytes, limits: PictureLimits, path: str | Path) -> Image.Image:
    """Parse the header alone and hold it against the limits; pixels are decoded later, by `.load()`."""
    try:
        picture = Image.open(io.BytesIO(data), formats=limits.formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise refusal("too_many_pixels", path) from None
    except UnidentifiedImageError:
        raise refusal("format", path) from None
    except Exception:  # see load_picture
        raise refusal("truncated" if _is_truncated(data) else "corrupt", path) from None
    if picture.width * picture.height > limits.max_pixels:
        raise refusal("too_many_pixels", path)
    # MPO is how telephones store a JPEG with a preview beside it: its first frame is the picture
    if picture.format != "MPO" and limits.animated == "refuse" and _is_animated(picture, path):
        raise refusal("animated", path)
    return picture


def _is_animated(picture: Image.Image, path: str | Path) -> bool:
    try:
        return bool(getattr(picture, "is_animated", False))
    except Exception:  # GIF looks for a second frame here, and a torn one throws
        raise refusal("corrupt", path) from None


def _is_truncated(data: bytes) -> bool:
    """Whether the container's end mark is missing: cheap, without decoding, for JPEG, PNG and WebP."""
    if data.startswith(b"\xff\xd8"):
        return data.rfind(b"\xff\xd9") < _jpeg_scan_start(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return not _png_has_end(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    return False


def _jpeg_scan_start(data: bytes) -> int:
    """Offset of the first scan: an end mark before it belongs to an embedded thumbnail."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:
            return at
        if marker == 0xFF or 0xD0 <= marker <= 0xD7 or marker == 0x01:  # fill byte, or a marker without a length
            at += 1 if marker == 0xFF else 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return len(data)


def _png_has_end(data: bytes) -> bool:
    at = 8
    while at + 12 <= len(data):
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return False


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # junk in the EXIF block says nothing about the pixels: show them as stored
        return picture.copy()


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips everything above 255 to white
        return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in _MODES_WITH_ALPHA or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return picture.convert("RGB")
