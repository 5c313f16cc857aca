"""Decoding of one untrusted picture with Pillow: allowed formats only, limits checked on the header before pixels are decoded.

Errors have a short fixed code. The decoder's own text is never passed on, because it has leaked heap addresses (CVE-2026-22778).
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmsid.catalog.config import PictureLimits
from mmsid.errors import PictureError

REASONS = {
    "missing": "the file does not exist; correct the path or the image_root",
    "outside_root": "the path is outside the image_root; move the picture below it",
    "not_a_file": "the path is not a regular local file; name a picture file",
    "unreadable": "the file cannot be read; check its permissions",
    "too_many_bytes": "the file is larger than pictures.max_bytes; shrink it or raise the limit",
    "too_many_pixels": "the header declares more than pictures.max_pixels; shrink it or raise the limit",
    "format": "no allowed decoder supports the file; convert it or extend pictures.formats",
    "animated": "the file has several frames; save one, or set pictures.animated to first_frame",
    "truncated": "the file is truncated; copy it again",
    "corrupt": "the file cannot be decoded; copy it again",
    "too_slow": "decoding took more than pictures.max_seconds of processor time; save it again or raise the limit",
    "too_much_memory": "decoding needs more than pictures.max_memory; shrink it or raise the limit",
    "crashed": "the decoder crashed, so the file may be malicious; do not open it elsewhere",
}
_MODES_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
# set once per process, because warnings.catch_warnings is slow and not thread-safe
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def decode(data: bytes, limits: PictureLimits, path: str | Path) -> Image.Image:
    """Decode the bytes of a picture file in this process, to the same result as `load_picture`. `path` is used in messages only.

    Raises:
        PictureError: the bytes cannot be used; `.reason` is a key of `REASONS`.
    """
    try:
        with open_picture(data, limits, path) as picture:
            if is_truncated(data):  # decoders repair some truncated files, but the catalogue refuses all of them
                raise refusal("truncated", path)
            picture.load()
            return to_rgb(picture)
    except PictureError:
        raise
    except MemoryError:
        raise refusal("too_much_memory", path) from None
    except Exception:  # decoders raise many types, and their texts are not passed on
        raise refusal("corrupt", path) from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a decoded picture to 8-bit RGB, upright by its EXIF orientation, transparency on white."""
    return _rgb(_upright(picture))


def refusal(reason: str, path: str | Path) -> PictureError:
    """PictureError with the message of `reason`, a key of `REASONS`."""
    return PictureError(reason, f"picture {str(path)!r}: {REASONS[reason]}")


def open_picture(data: bytes, limits: PictureLimits, path: str | Path) -> Image.Image:
    """Parse the header and check the limits. Pixels are decoded later, by `.load()`.

    Raises:
        PictureError: the header is damaged, or the picture exceeds a limit.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=limits.formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise refusal("too_many_pixels", path) from None
    except UnidentifiedImageError:
        raise refusal("format", path) from None
    except Exception:  # see decode
        raise refusal("truncated" if is_truncated(data) else "corrupt", path) from None
    if picture.width * picture.height > limits.max_pixels:
        raise refusal("too_many_pixels", path)
    # MPO: a JPEG with previews as further frames, as phones store it. The first frame is the picture.
    if picture.format != "MPO" and limits.animated == "refuse" and _is_animated(picture, path):
        raise refusal("animated", path)
    return picture


def _is_animated(picture: Image.Image, path: str | Path) -> bool:
    try:
        return bool(getattr(picture, "is_animated", False))
    except Exception:  # Pillow reads the second frame of a GIF here, and raises if it is damaged
        raise refusal("corrupt", path) from None


def is_truncated(data: bytes) -> bool:
    """Whether the end mark of a JPEG, PNG or WebP file is missing. Nothing is decoded."""
    if data.startswith(b"\xff\xd8"):
        return data.rfind(b"\xff\xd9") < _jpeg_scan_start(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return not _png_has_end(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    return False


def _jpeg_scan_start(data: bytes) -> int:
    """Offset of the first scan. An end mark before it belongs to an embedded thumbnail."""
    offset = 2
    while offset + 4 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == 0xDA:
            return offset
        if marker == 0xFF or 0xD0 <= marker <= 0xD7 or marker == 0x01:  # fill byte, or a marker without a length
            offset += 1 if marker == 0xFF else 2
        else:
            offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return len(data)


def _png_has_end(data: bytes) -> bool:
    offset = 8
    while offset + 12 <= len(data):
        if data[offset + 4 : offset + 8] == b"IEND":
            return True
        offset += 12 + int.from_bytes(data[offset : offset + 4], "big")
    return False


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # the EXIF block is damaged: keep the stored orientation
        return picture.copy()


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's conversion clips values above 255
        return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in _MODES_WITH_ALPHA or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return picture.convert("RGB")
