"""Detect lines of small print in a picture and paint over them, as a protection of models against instructions in pictures.

Small print has many strokes: a row of pixels through it changes between dark and light dozens of times, in a low band with sharp ends.
Headlines and prices have few changes, and textures fill higher bands. Harmless small print and what is behind it are lost, too; the
shipped captioner reads no words and does not need masking (benchmarks/robustness.py). A masked picture is flagged, never dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # top, bottom, left, right, with exclusive ends
MASKED = "overlay_masked"
FLAGS = "mmsid_flags"  # key in `Image.info` of the flags of a picture
CONTRAST = 48  # grey levels between neighbouring pixels at the edge of a stroke
MIN_CHANGES = 22  # edges of alternating sign in a row; twelve letters have about thirty, a headline of four letters about ten
MAX_HEIGHT = 0.2  # of the picture; a higher band is a texture
MIN_HEIGHT = 3  # pixels


def mask_overlays(picture: Image.Image, locate: Callable[[Image.Image], list[Box]] | None = None) -> Image.Image:
    """The picture (RGB) with its lines of small print painted over and `.info[FLAGS]` set; the same object if there are none.

    Args:
        locate: finds the boxes of the lines; by default `text_bands`.
    """
    pixels = np.asarray(picture)
    bands = text_bands(pixels) if locate is None else locate(picture)
    if not bands:
        return picture
    painted = pixels.copy()
    for top, bottom, left, right in bands:
        _paint_over(painted, top, bottom, left, right)
    result = Image.fromarray(painted)
    result.info[FLAGS] = (MASKED,)
    return result


def picture_flags(pictures: Iterable[Image.Image]) -> list[str]:
    """The flags of all pictures (from `.info[FLAGS]`), each once."""
    return list(dict.fromkeys(flag for picture in pictures for flag in picture.info.get(FLAGS, ())))


def text_bands(pixels: np.ndarray) -> list[Box]:
    """Boxes of lines of small print: (H, W, 3) uint8 -> (top, bottom, left, right) with exclusive ends, from top to bottom."""
    grey = pixels.astype(np.int32) @ np.array([77, 150, 29], dtype=np.int32) >> 8
    steps = np.diff(grey, axis=1)
    edges = np.where(np.abs(steps) >= CONTRAST, np.sign(steps), 0)
    changes = _sign_changes(edges)
    bands = []
    for top, bottom in _runs(changes >= MIN_CHANGES):
        ends_sharply = all(
            not len(beside) or beside.min() <= MIN_CHANGES // 2 for beside in (changes[max(0, top - 3) : top], changes[bottom : bottom + 3])
        )
        if ends_sharply and MIN_HEIGHT <= bottom - top <= MAX_HEIGHT * len(grey):
            columns = np.flatnonzero(edges[top:bottom].any(axis=0))
            margin = max(2, (bottom - top) // 3)  # rows of ascenders and descenders have few strokes
            bands.append((max(0, top - margin), min(len(grey), bottom + margin), max(0, int(columns[0]) - 1), int(columns[-1]) + 3))
    return bands


def _sign_changes(edges: np.ndarray) -> np.ndarray:
    """Number of sign changes along each row, without zeros: (H, W) of -1, 0, 1 -> (H,)."""
    rows, columns = np.nonzero(edges)
    signs = edges[rows, columns]
    changed = (rows[1:] == rows[:-1]) & (signs[1:] != signs[:-1])
    return np.bincount(rows[1:][changed], minlength=len(edges))


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(first row, exclusive end) of each run of True."""
    change = np.diff(np.concatenate([[0], mask.astype(np.int8), [0]]))
    return list(zip(np.flatnonzero(change == 1).tolist(), np.flatnonzero(change == -1).tolist()))


def _paint_over(pixels: np.ndarray, top: int, bottom: int, left: int, right: int) -> None:
    """Fill a box in place, column by column, by linear interpolation between the rows above and below it."""
    above = pixels[top - 1 if top else min(bottom, len(pixels) - 1), left:right].astype(np.float32)
    below = pixels[bottom if bottom < len(pixels) else max(top - 1, 0), left:right].astype(np.float32)
    share = np.linspace(0, 1, bottom - top, dtype=np.float32)[:, None, None]
    pixels[top:bottom, left:right] = (above + (below - above) * share).astype(np.uint8)
