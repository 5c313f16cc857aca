"""Decoding of one untrusted picture with Pillow: allowed formats only, limits checked on the header before pixels are decoded.

Errors carry a short fixed code. The decoder's own text is never passed on, because it has leaked heap addresses (CVE-2026-22778).
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


def decode(data: bytes, limits: PictureLimits, path: str | Path) -> Image.Image:
    """Decode the bytes of a picture file in this process; `path` is for messages only. Otherwise as `load_picture`.

    Raises:
        PictureError: the bytes are no usable picture.
    """
    try:
        with open_picture(data, limits, path) as picture:
            if is_truncated(data):  # decoders mend some torn files; what the catalogue refuses is refused here
                raise refusal("truncated", path)
            picture.load()
            return _rgb(_upright(picture))
    except PictureError:
        raise
    except MemoryError:
        raise refusal("too_much_memory", path) from None
    except Exception:  # whatever a decoder throws means one thing here, and its text stays inside
        raise refusal("corrupt", path) from None


def refusal(reason: str, path: str | Path) -> PictureError:
    """The error for a picture, worded for people; `reason` is a key of `REASONS`."""
    return PictureError(reason, f"picture {str(path)!r}: {REASONS[reason]}")


def open_picture(data: bytes, limits: PictureLimits, path: str | Path) -> Image.Image:
    """Parse the header alone and hold it against the limits; pixels are decoded later, by `.load()`."""
    try:
        picture = Image.open(io.BytesIO(data), formats=limits.formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise refusal("too_many_pixels", path) from None
    except UnidentifiedImageError:
        raise refusal("format", path) from None
    except Exception:  # see load_picture
        raise refusal("truncated" if is_truncated(data) else "corrupt", path) from None
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


def is_truncated(data: bytes) -> bool:
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
