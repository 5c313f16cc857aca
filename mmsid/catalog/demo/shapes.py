"""Silhouettes of the products, drawn in the unit square and cached as masks that cards resize."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from PIL import Image, ImageDraw

from mmsid.catalog.demo.facts import PRODUCTS

MASK_SIZE = 192  # four times the largest usual size on a card
_MARGIN = 0.02


class Shape(NamedTuple):
    """Masks of a product (mode L, MASK_SIZE x MASK_SIZE). `body` gets colour and pattern; `dark` and `pale` are details in fixed greys."""

    body: Image.Image
    dark: Image.Image
    pale: Image.Image
    aspect: float  # width / height
    box: tuple[float, float, float, float]  # extent of all masks, as fractions of the square


class _Pen:
    """Drawing of one mask in unit coordinates, y downwards."""

    def __init__(self) -> None:
        self.image = Image.new("L", (MASK_SIZE, MASK_SIZE), 0)
        self._draw = ImageDraw.Draw(self.image)

    @staticmethod
    def _scaled(points: tuple[tuple[float, float], ...]) -> list[tuple[float, float]]:
        return [tuple((_MARGIN + (1 - 2 * _MARGIN) * value) * MASK_SIZE for value in point) for point in points]

    def poly(self, *points: tuple[float, float], fill: int = 255) -> None:
        self._draw.polygon(self._scaled(points), fill=fill)

    def rect(self, x0: float, y0: float, x1: float, y1: float, fill: int = 255, radius: float = 0.0) -> None:
        (a, b) = self._scaled(((x0, y0), (x1, y1)))
        self._draw.rounded_rectangle([*a, *b], radius * MASK_SIZE, fill=fill)

    def oval(self, x: float, y: float, rx: float, ry: float | None = None, fill: int = 255) -> None:
        ry = rx if ry is None else ry
        (a, b) = self._scaled(((x - rx, y - ry), (x + rx, y + ry)))
        self._draw.ellipse([*a, *b], fill=fill)

    def ring(self, x: float, y: float, rx: float, ry: float, width: float, start: float = 0, end: float = 360) -> None:
        (a, b) = self._scaled(((x - rx, y - ry), (x + rx, y + ry)))
        self._draw.arc([*a, *b], start, end, fill=255, width=round(width * MASK_SIZE))

    def line(self, *points: tuple[float, float], width: float) -> None:
        self._draw.line(self._scaled(points), fill=255, width=round(width * MASK_SIZE), joint="curve")


def _running_shoe(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.poly((0, 0.3), (0.16, 0.12), (0.3, 0.36), (0.44, 0.3), (0.62, 0.52), (0.9, 0.6), (1, 0.72), (1, 0.82), (0, 0.82))
    pale.rect(0, 0.82, 1, 0.98, radius=0.05)
    dark.line((0.42, 0.4), (0.5, 0.3), width=0.035)
    dark.line((0.51, 0.47), (0.59, 0.37), width=0.035)
    dark.line((0.6, 0.54), (0.68, 0.44), width=0.035)


def _boot(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.rect(0.08, 0, 0.56, 0.86)
    body.poly((0.5, 0.5), (0.82, 0.58), (0.98, 0.72), (0.98, 0.86), (0.5, 0.86))
    dark.rect(0.06, 0.86, 1, 0.93)
    dark.rect(0.06, 0.9, 0.34, 1)
    pale.rect(0.04, 0, 0.6, 0.09)


def _sandal(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.poly((0, 0.62), (0.3, 0.7), (1, 0.7), (1, 0.86), (0.1, 0.9), (0, 0.82))
    body.ring(0.72, 0.72, 0.22, 0.42, 0.13, 180, 360)
    body.ring(0.2, 0.66, 0.2, 0.56, 0.12, 180, 360)
    dark.poly((0, 0.82), (0.1, 0.9), (1, 0.86), (1, 0.94), (0.06, 1))


def _t_shirt(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.poly((0.3, 0.04), (0.7, 0.04), (1, 0.26), (0.87, 0.48), (0.76, 0.4), (0.76, 1), (0.24, 1), (0.24, 0.4), (0.13, 0.48), (0, 0.26))
    body.oval(0.5, 0.02, 0.14, 0.12, fill=0)


def _dress(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.poly((0.3, 0), (0.4, 0), (0.42, 0.12), (0.58, 0.12), (0.6, 0), (0.7, 0), (0.66, 0.36), (1, 1), (0, 1), (0.34, 0.36))
    dark.rect(0.33, 0.34, 0.67, 0.41)


def _watch(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.poly((0.3, 0), (0.7, 0), (0.76, 0.3), (0.24, 0.3))
    body.poly((0.3, 1), (0.7, 1), (0.76, 0.7), (0.24, 0.7))
    body.oval(0.5, 0.5, 0.46, 0.31)
    dark.rect(0.94, 0.45, 1, 0.55)
    pale.oval(0.5, 0.5, 0.3, 0.2)
    dark.line((0.5, 0.38), (0.5, 0.5), (0.66, 0.55), width=0.05)


def _handbag(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.ring(0.5, 0.4, 0.28, 0.4, 0.1, 180, 360)
    body.poly((0.1, 0.4), (0.9, 0.4), (1, 1), (0, 1))
    dark.rect(0.42, 0.4, 0.58, 0.56)


def _cap(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.oval(0.36, 0.8, 0.36, 0.72)
    body.rect(0, 0.8, 1, 1, fill=0)
    body.rect(0, 0.76, 0.72, 0.84)
    dark.poly((0.56, 0.74), (0.9, 0.78), (1, 0.9), (0.56, 0.88))
    dark.oval(0.36, 0.08, 0.06, 0.07)


def _armchair(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.rect(0.16, 0, 0.84, 0.7, radius=0.12)
    body.rect(0, 0.34, 0.24, 0.86, radius=0.08)
    body.rect(0.76, 0.34, 1, 0.86, radius=0.08)
    body.rect(0.1, 0.55, 0.9, 0.86)
    dark.rect(0.24, 0.53, 0.76, 0.57)
    dark.rect(0.08, 0.86, 0.18, 1)
    dark.rect(0.82, 0.86, 0.92, 1)


def _chair(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.rect(0.04, 0, 0.28, 1)
    body.rect(0.04, 0.48, 0.96, 0.68)
    body.rect(0.74, 0.48, 0.96, 1)


def _table(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.rect(0, 0.08, 1, 0.32)
    body.rect(0.1, 0.3, 0.25, 1)
    body.rect(0.75, 0.3, 0.9, 1)


def _lamp(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.poly((0.28, 0), (0.72, 0), (1, 0.52), (0, 0.52))
    dark.rect(0.46, 0.52, 0.54, 0.9)
    dark.rect(0.26, 0.9, 0.74, 1, radius=0.03)


def _candle(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.rect(0.12, 0.36, 0.88, 1, radius=0.04)
    dark.rect(0.46, 0.26, 0.54, 0.38)
    pale.poly((0.5, 0), (0.68, 0.17), (0.5, 0.3), (0.32, 0.17))
    pale.oval(0.5, 0.19, 0.18, 0.12)


def _mug(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.ring(0.72, 0.5, 0.28, 0.28, 0.11)
    body.rect(0, 0.05, 0.7, 1, radius=0.07)
    dark.oval(0.35, 0.08, 0.35, 0.08)


def _bottle(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.poly((0.34, 0.1), (0.66, 0.1), (0.66, 0.3), (0.96, 0.46), (0.96, 1), (0.04, 1), (0.04, 0.46), (0.34, 0.3))
    dark.rect(0.28, 0, 0.72, 0.11)


def _pan(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    dark.rect(0.55, 0.4, 1, 0.6, radius=0.04)
    body.oval(0.32, 0.5, 0.32, 0.48)


def _headset(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.ring(0.5, 0.52, 0.44, 0.5, 0.13, 180, 360)
    body.rect(0, 0.48, 0.26, 0.98, radius=0.09)
    body.rect(0.74, 0.48, 1, 0.98, radius=0.09)
    dark.rect(0.22, 0.54, 0.32, 0.92, radius=0.04)
    dark.rect(0.68, 0.54, 0.78, 0.92, radius=0.04)


def _speaker(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.rect(0, 0, 1, 1, radius=0.05)
    dark.oval(0.5, 0.22, 0.2, 0.12)
    dark.oval(0.5, 0.66, 0.36, 0.22)
    pale.oval(0.5, 0.66, 0.14, 0.085)


def _music_player(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.rect(0, 0, 1, 1, radius=0.1)
    pale.rect(0.16, 0.1, 0.84, 0.42)
    dark.rect(0.24, 0.16, 0.76, 0.36)
    pale.oval(0.5, 0.7, 0.3, 0.18)
    dark.oval(0.5, 0.7, 0.1, 0.06)


def _laptop(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.rect(0.12, 0, 0.88, 0.68, radius=0.03)
    dark.rect(0.24, 0.12, 0.76, 0.4)
    body.poly((0.12, 0.7), (0.88, 0.7), (1, 0.96), (0, 0.96))
    pale.rect(0.12, 0.66, 0.88, 0.72)


def _camera(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.rect(0, 0.24, 1, 1, radius=0.06)
    body.poly((0.3, 0.26), (0.36, 0.04), (0.64, 0.04), (0.7, 0.26))
    dark.oval(0.5, 0.62, 0.25, 0.31)
    pale.oval(0.5, 0.62, 0.12, 0.15)
    dark.rect(0.07, 0.14, 0.22, 0.25)


def _bicycle(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    for x in (0.22, 0.78):
        body.ring(x, 0.68, 0.22, 0.32, 0.1)
    # filled, because patterns cannot be distinguished on a thin frame
    body.poly((0.2, 0.72), (0.33, 0.28), (0.74, 0.28), (0.55, 0.76))
    body.line((0.78, 0.68), (0.68, 0.12), width=0.08)
    dark.rect(0.24, 0.13, 0.46, 0.23)
    dark.rect(0.62, 0.04, 0.86, 0.14)


def _tent(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.poly((0.5, 0.02), (1, 1), (0, 1))
    dark.poly((0.5, 0.42), (0.67, 1), (0.33, 1))
    pale.line((0.46, 0), (0.5, 0.08), (0.54, 0), width=0.04)


def _guitar(body: _Pen, dark: _Pen, pale: _Pen) -> None:
    body.oval(0.5, 0.5, 0.36, 0.16)
    body.oval(0.5, 0.77, 0.5, 0.23)
    pale.rect(0.42, 0.08, 0.58, 0.52)
    dark.rect(0.34, 0, 0.66, 0.11)
    dark.oval(0.5, 0.58, 0.15, 0.07)
    dark.rect(0.3, 0.8, 0.7, 0.84)


_DRAWINGS: dict[str, tuple[Callable[[_Pen, _Pen, _Pen], None], float]] = {
    "running shoe": (_running_shoe, 1.55),
    "boot": (_boot, 0.85),
    "sandal": (_sandal, 1.75),
    "t-shirt": (_t_shirt, 1.05),
    "dress": (_dress, 0.85),
    "watch": (_watch, 0.66),
    "handbag": (_handbag, 1.05),
    "cap": (_cap, 1.4),
    "armchair": (_armchair, 1.1),
    "chair": (_chair, 0.74),
    "table": (_table, 1.45),
    "lamp": (_lamp, 0.85),
    "candle": (_candle, 0.5),
    "mug": (_mug, 1.1),
    "bottle": (_bottle, 0.5),
    "pan": (_pan, 1.55),
    "headset": (_headset, 1.0),
    "speaker": (_speaker, 0.62),
    "music player": (_music_player, 0.58),
    "laptop": (_laptop, 1.3),
    "camera": (_camera, 1.3),
    "bicycle": (_bicycle, 1.6),
    "tent": (_tent, 1.1),
    "guitar": (_guitar, 0.6),
}
if set(_DRAWINGS) != set(PRODUCTS):
    raise AssertionError("every product needs exactly one drawing")


@cache
def shape(product: str) -> Shape:
    """Masks of a product. KeyError for an unknown name."""
    draw, aspect = _DRAWINGS[product]
    pens = (_Pen(), _Pen(), _Pen())
    draw(*pens)
    boxes = [box for box in (pen.image.getbbox() for pen in pens) if box]
    box = (
        min(b[0] for b in boxes) / MASK_SIZE,
        min(b[1] for b in boxes) / MASK_SIZE,
        max(b[2] for b in boxes) / MASK_SIZE,
        max(b[3] for b in boxes) / MASK_SIZE,
    )
    return Shape(*(pen.image for pen in pens), aspect, box)


def size_for_aspect(aspect: float, side: float) -> tuple[float, float]:
    """Width and height, in the unit of `side`, of a shape with this aspect. Areas are about equal; tall shapes are a little smaller."""
    return side * aspect**0.5, side * aspect**-0.4 if aspect < 1 else side * aspect**-0.5
