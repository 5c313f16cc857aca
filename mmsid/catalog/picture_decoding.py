"""Decoding of one untrusted picture with Pillow: allowed formats only, limits checked on the header before pixels are decoded.

Errors have a short fixed code. The decoder's own text is never passed on, because it has leaked heap addresses (CVE-2026-22778).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import AvifImagePlugin, Image, ImageCms, ImageOps, UnidentifiedImageError

from mmsid.catalog.config import PictureLimits
from mmsid.catalog.picture_formats import is_truncated, other_content, picture_format, png_without_comments, tiff_is_truncated
from mmsid.catalog.picture_sources.reasons import REASONS, refusal
from mmsid.errors import PictureError

__all__ = ["REASONS", "Header", "decode", "open_picture", "read_header", "refusal", "register_heif", "to_rgb"]

_MODES_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
# set once per process, because warnings.catch_warnings is slow and not thread-safe
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # pictures are decoded side by side already, and a thread's stack counts as memory


class Header(NamedTuple):
    """Format by Pillow's name, and the stored width and height in pixels, before any rotation."""

    format: str
    width: int
    height: int


def read_header(data: bytes, limits: PictureLimits, path: str | Path) -> Header:
    """The header of a picture file that passes the checks of `open_picture`. No pixel is decoded."""
    with open_picture(data, limits, path) as picture:
        return Header("JPEG" if picture.format == "MPO" else str(picture.format), *picture.size)


def decode(data: bytes, limits: PictureLimits, path: str | Path) -> Image.Image:
    """Decode the bytes of a picture file in this process, to the same result as `load_picture`. `path` is used in messages only.

    Raises:
        PictureError: the bytes cannot be used; `.reason` is a key of `REASONS`.
    """
    try:
        with open_picture(data, limits, path) as picture:
            try:
                picture.load()
            except ValueError:  # Pillow reads the comments behind the pixels of a PNG now
                if picture.format != "PNG":
                    raise
                picture = open_picture(png_without_comments(data), limits, path)
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


def open_picture(data: bytes, limits: PictureLimits, path: str | Path) -> Image.Image:
    """Parse the header, check the limits and look for the end of the file. Pixels are decoded later, by `.load()`.

    Decoders repair some truncated files. All of them are refused here, so that the same file gives the same answer everywhere.

    Raises:
        PictureError: the header is damaged, the file is truncated, or the picture exceeds a limit.
    """
    kind = picture_format(data)
    if kind is None:
        raise refusal(other_content(data), path)
    if kind not in limits.formats:
        raise refusal("format", path)
    if kind == "HEIF" and not register_heif():
        raise refusal("heif", path)
    picture = _open(data, kind, path)
    if picture.width * picture.height > limits.max_pixels:
        raise refusal("too_many_pixels", path)
    # MPO: a JPEG with previews as further frames, as phones store it. The first frame is the picture.
    if picture.format != "MPO" and limits.animated == "refuse" and _is_animated(picture, path):
        raise refusal("animated", path)
    if is_truncated(data) or (kind == "TIFF" and _tiff_is_truncated(picture, len(data), path)):
        raise refusal("truncated", path)
    return picture


def _open(data: bytes, kind: str, path: str | Path) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=[kind])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise refusal("too_many_pixels", path) from None
    except MemoryError:
        raise refusal("too_much_memory", path) from None
    except Exception as error:  # see decode
        if kind == "PNG" and len(smaller := png_without_comments(data)) < len(data):  # comments or a profile that Pillow refuses
            return _open(smaller, kind, path)
        if is_truncated(data):
            raise refusal("truncated", path) from None
        raise refusal("format" if isinstance(error, UnidentifiedImageError) else "corrupt", path) from None


@functools.cache
def register_heif() -> bool:
    """Make Pillow read HEIC, if pillow-heif is installed. Returns whether it is."""
    with contextlib.suppress(ImportError):
        heif = importlib.import_module("pillow_heif")
        heif.options.DECODE_THREADS = 1
        heif.register_heif_opener(thumbnails=False)
        return True
    return False


def _is_animated(picture: Image.Image, path: str | Path) -> bool:
    try:
        return bool(getattr(picture, "is_animated", False))
    except Exception:  # Pillow reads the second frame of a GIF here, and raises if it is damaged
        raise refusal("corrupt", path) from None


def _tiff_is_truncated(picture: Image.Image, size: int, path: str | Path) -> bool:
    try:
        return tiff_is_truncated(picture.tag_v2, size)
    except Exception:  # Pillow decodes tags when they are read, and a damaged one may hold any type
        raise refusal("corrupt", path) from None


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # the EXIF block is damaged: keep the stored orientation
        return picture.copy()


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's conversion clips values above 255
        return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":  # grey of 32-bit floats, in TIFF: from 0 to 1, or to 255
        grey = np.nan_to_num(np.asarray(picture))
        return Image.fromarray((grey * (255 if grey.max() <= 1 else 1)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode == "LAB":
        return ImageCms.profileToProfile(picture, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB")
    if picture.mode in _MODES_WITH_ALPHA or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return picture.convert("RGB")
