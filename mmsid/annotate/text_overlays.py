"""Lines of small print laid over a picture, found by their strokes and painted over before a model looks.

An ad needs its headline and its price: few large letters. An instruction or a list of keywords needs many letters side by side, and
many letters mean many strokes: a row of pixels through such a line turns from dark to light and back dozens of times, within a band
that is low and ends sharply above and below. Textures turn as often, but over larger areas. Nothing is read here, so nothing in
the picture can argue with it; what it costs is that honest small print goes, too, and some of what lies behind. It is meant for models
that read: the shipped captioner reads no words, so that orders do not reach it and masking spoils more than it saves
(benchmarks/robustness.py). A masked picture is flagged, never dropped.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image

MASKED = "overlay_masked"
FLAGS = "mmsid_flags"  # key in `Image.info` under which flags travel with a picture
CONTRAST = 48  # grey levels between neighbouring pixels that make an edge of a stroke
TURNS = 22  # edges of alternating sign in a row; twelve letters have about thirty, a headline of four about ten
HIGHEST = 0.2  # of the picture: a higher band is a texture
LOWEST = 3  # pixels


def masked(picture: Image.Image) -> Image.Image:
    """`picture` (RGB) without its lines of small print, flagged in `.info[FLAGS]`; the very same object when there are none."""
    pixels = np.asarray(picture)
    bands = text_bands(pixels)
    if not bands:
        return picture
    painted = pixels.copy()
    for top, bottom, left, right in bands:
        _paint_over(painted, top, bottom, left, right)
    found = Image.fromarray(painted)
    found.info[FLAGS] = (MASKED,)
    return found


def flags_of(pictures: Iterable[Image.Image]) -> list[str]:
    """The flags that travel with pictures, each once."""
    return list(dict.fromkeys(flag for picture in pictures for flag in picture.info.get(FLAGS, ())))


def text_bands(pixels: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(H, W, 3) uint8 -> boxes (top, bottom, left, right; ends exclusive) of lines with many strokes, from top to bottom."""
    grey = pixels.astype(np.int32) @ np.array([77, 150, 29], dtype=np.int32) >> 8
    steps = np.diff(grey, axis=1)
    edges = np.where(np.abs(steps) >= CONTRAST, np.sign(steps), 0)
    turns = _turns(edges)
    bands = []
    for top, bottom in _runs(turns >= TURNS):
        ends_sharply = all(
            not len(beside) or beside.min() <= TURNS // 2 for beside in (turns[max(0, top - 3) : top], turns[bottom : bottom + 3])
        )
        if ends_sharply and LOWEST <= bottom - top <= HIGHEST * len(grey):
            columns = np.flatnonzero(edges[top:bottom].any(axis=0))
            margin = max(2, (bottom - top) // 3)  # ascenders and descenders have fewer strokes
            bands.append((max(0, top - margin), min(len(grey), bottom + margin), max(0, int(columns[0]) - 1), int(columns[-1]) + 3))
    return bands


def _turns(edges: np.ndarray) -> np.ndarray:
    """(H, W) of -1, 0, 1 -> (H,): how often the sign changes along each row, zeros left out."""
    rows, columns = np.nonzero(edges)
    signs = edges[rows, columns]
    turned = (rows[1:] == rows[:-1]) & (signs[1:] != signs[:-1])
    return np.bincount(rows[1:][turned], minlength=len(edges))


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """First rows and ends of the runs of True."""
    change = np.diff(np.concatenate([[0], mask.astype(np.int8), [0]]))
    return list(zip(np.flatnonzero(change == 1).tolist(), np.flatnonzero(change == -1).tolist()))


def _paint_over(pixels: np.ndarray, top: int, bottom: int, left: int, right: int) -> None:
    """Fill a box, column by column, from the row above to the row below it, in place."""
    above = pixels[top - 1 if top else min(bottom, len(pixels) - 1), left:right].astype(np.float32)
    below = pixels[bottom if bottom < len(pixels) else max(top - 1, 0), left:right].astype(np.float32)
    share = np.linspace(0, 1, bottom - top, dtype=np.float32)[:, None, None]
    pixels[top:bottom, left:right] = (above + (below - above) * share).astype(np.uint8)
