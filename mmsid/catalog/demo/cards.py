"""Drawing of ad cards: 96 px pictures with independent jitter of each element.

Jitter per card: element positions (+-8 px, inside the picture), scale and font size (+-15 %), product aspect (+-8 %), font (four faces),
colour shade, pattern period and phase, background (gradient of four corner colours), pixel noise, JPEG quality (45 to 95). Elements may
overlap. Tag and headline are drawn above the product, and the headline has a halo, so that they stay legible.
"""

from __future__ import annotations

import colorsys
import io
import math
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mmsid.catalog.demo.facts import BRANDS, COLORS, CardFacts
from mmsid.catalog.demo.shapes import shape, size_for_aspect

CARD_SIZE = 96
SHIFT = 8.0  # px, independent for each element
SCALE = 0.15
ASPECT = 0.08
JPEG_QUALITY = (45, 95)
NOISE = 9.0  # largest standard deviation, in grey levels
DARK_SHARE = 0.25
ELEMENTS = ("product", "brand", "tens", "units", "headline")

_FONTS = ("DejaVuSans-ascii.ttf", "DejaVuSans-Bold-ascii.ttf", "DejaVuSerif-ascii.ttf", "DejaVuSerif-Bold-ascii.ttf")
_RGB = {
    "red": (214, 38, 38),
    "orange": (240, 132, 24),
    "yellow": (246, 216, 40),
    "green": (36, 158, 66),
    "blue": (44, 104, 222),
    "purple": (128, 58, 178),
    "black": (36, 36, 42),
    "white": (246, 244, 236),
}
# the greys on black and on white differ, so that "black striped" can be distinguished from "white striped"
_INK = {name: tuple(round(0.34 * channel) for channel in rgb) for name, rgb in _RGB.items()} | {
    "black": (132, 132, 138),
    "white": (122, 120, 116),
}
if set(_RGB) != set(COLORS):
    raise AssertionError("every colour needs RGB values")
_NAVY, _MAGENTA = (18, 44, 108), (196, 16, 92)
_BADGES = dict(zip(BRANDS, [(o, c) for c in (_NAVY, _MAGENTA) for o in ("circle", "square", "triangle", "diamond")], strict=True))
_TAGS = (  # paper, ink
    ((252, 252, 250), (20, 20, 24)),
    ((252, 226, 60), (20, 20, 24)),
    ((204, 26, 44), (255, 255, 255)),
    ((24, 108, 58), (255, 255, 255)),
)
_DARK_DETAIL, _PALE_DETAIL = (62, 64, 74), (176, 178, 186)

Box = tuple[float, float, float, float]


class Card(NamedTuple):
    """One drawn ad.

    Attributes:
        image: RGB, CARD_SIZE x CARD_SIZE px, decoded from `jpeg`.
        jpeg: bytes of the JPEG file.
        boxes: element (of ELEMENTS) -> (x0, y0, x1, y1) in px, inside the picture, ends exclusive. Where boxes overlap, the element that
            comes later in ELEMENTS is on top.
    """

    image: Image.Image
    jpeg: bytes
    boxes: dict[str, Box]


def draw_card(facts: CardFacts, rng: np.random.Generator) -> Card:
    """Draw a card with these facts. All jitter comes from `rng`, so the same generator state gives the same bytes."""
    dark = rng.random() < DARK_SHARE
    canvas = _background(rng, dark)
    boxes = {"product": _product(canvas, facts, rng, dark), "brand": _badge(canvas, facts.brand, rng)}
    boxes["tens"], boxes["units"] = _tag(canvas, facts.price, rng)
    boxes["headline"] = _headline(canvas, facts.headline, rng, dark)
    pixels = np.asarray(canvas, dtype=np.float32)
    pixels = pixels + rng.uniform(0, NOISE) * rng.standard_normal(pixels.shape, dtype=np.float32)
    noisy = Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    noisy.save(buffer, "JPEG", quality=int(rng.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1)))
    jpeg = buffer.getvalue()
    image = Image.open(io.BytesIO(jpeg))
    image.load()
    return Card(image, jpeg, boxes)


def _background(rng: np.random.Generator, dark: bool) -> Image.Image:
    hue = rng.random()
    corners = np.empty((2, 2, 3))
    for corner in np.ndindex(2, 2):
        lightness = rng.uniform(0.1, 0.26) if dark else rng.uniform(0.8, 0.95)
        saturation = rng.uniform(0.05, 0.4) if dark else rng.uniform(0.2, 0.7)
        corners[corner] = colorsys.hls_to_rgb((hue + rng.uniform(-0.15, 0.15)) % 1, lightness, saturation)
    return Image.fromarray((corners * 255).astype(np.uint8)).resize((CARD_SIZE, CARD_SIZE), Image.Resampling.BILINEAR)


def _jitter(rng: np.random.Generator, share: float = SCALE) -> float:
    return 1 + rng.uniform(-share, share)


def _place(rng: np.random.Generator, centre: tuple[float, float], width: float, height: float) -> tuple[float, float]:
    """Top left corner of an element whose centre is moved by up to SHIFT. The element keeps 1 px of distance from the picture's edge."""
    x = centre[0] + rng.uniform(-SHIFT, SHIFT) - width / 2
    y = centre[1] + rng.uniform(-SHIFT, SHIFT) - height / 2
    return min(max(x, 1.0), CARD_SIZE - 1 - width), min(max(y, 1.0), CARD_SIZE - 1 - height)


def _product(canvas: Image.Image, facts: CardFacts, rng: np.random.Generator, dark: bool) -> Box:
    masks = shape(facts.product)
    width, height = size_for_aspect(masks.aspect * _jitter(rng, ASPECT), 44.0 * _jitter(rng))
    width, height = round(width), round(height)
    x, y = (int(v) for v in _place(rng, (46.0, 50.0), width, height))
    body, dark_mask, pale_mask = (m.resize((width, height), Image.Resampling.BOX) for m in (masks.body, masks.dark, masks.pale))
    outline = body.filter(ImageFilter.MaxFilter(3)).point(lambda v: v * 3 // 4)
    canvas.paste((190, 190, 196) if dark else (70, 70, 78), (x, y), outline)
    shade = rng.integers(-12, 13, 3)
    base = np.clip(np.array(_RGB[facts.color]) + shade, 0, 255)
    ink = np.clip(np.array(_INK[facts.color]) + shade, 0, 255)
    pattern = _pattern(facts.pattern, width, height, rng)[..., None]
    canvas.paste(Image.fromarray((base + (ink - base) * pattern).astype(np.uint8)), (x, y), body)
    canvas.paste(_PALE_DETAIL, (x, y), pale_mask)
    canvas.paste(_DARK_DETAIL, (x, y), dark_mask)
    x0, y0, x1, y1 = masks.box
    return x + x0 * width, y + y0 * height, x + x1 * width, y + y1 * height


def _pattern(name: str, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Ink coverage of each pixel, (height, width) in [0, 1], with edges softened over about one pixel. KeyError for an unknown name."""
    period = 7.5 * _jitter(rng)
    phase_x, phase_y = rng.uniform(0, 1, 2)
    # distance in px to the nearest line of a grid with this period: a triangle wave from 0 to period / 2
    to_x = np.abs((np.arange(width) / period + phase_x) % 1 - 0.5) * period
    to_y = np.abs((np.arange(height) / period + phase_y) % 1 - 0.5) * period
    if name == "plain":
        return np.zeros((height, width))
    if name == "striped":
        return np.broadcast_to(_soft(period * 0.23 - to_y)[:, None], (height, width))
    if name == "dotted":
        return _soft(period * 0.27 - np.hypot(to_x[None, :], to_y[:, None]))
    if name == "checkered":
        in_x, in_y = _soft(period / 4 - to_x)[None, :], _soft(period / 4 - to_y)[:, None]
        return in_x * in_y + (1 - in_x) * (1 - in_y)
    raise KeyError(name)


def _soft(distance: np.ndarray) -> np.ndarray:
    return np.clip(distance + 0.5, 0, 1)


def _badge(canvas: Image.Image, brand: str, rng: np.random.Generator) -> Box:
    size = round(18.0 * _jitter(rng))
    x, y = (round(v) for v in _place(rng, (14.0, 79.0), size, size))
    badge = _badge_image(brand).resize((size, size), Image.Resampling.BOX)
    canvas.paste(badge, (x, y), badge)
    return x, y, x + size, y + size


@cache
def _badge_image(brand: str) -> Image.Image:
    outline, color = _BADGES[brand]
    side = 96
    mask = Image.new("RGBA", (side, side), (*color, 0))
    draw = ImageDraw.Draw(mask)
    points = {
        "triangle": [(1, 4), (95, 4), (48, 94)],
        "diamond": [(48, 0), (96, 48), (48, 96), (0, 48)],
        "square": [(5, 5), (91, 5), (91, 91), (5, 91)],
    }
    if outline == "circle":
        draw.ellipse((2, 2, 94, 94), fill=(*color, 255), outline=(255, 255, 255, 255), width=5)
    else:
        draw.polygon(points[outline], fill=(*color, 255), outline=(255, 255, 255, 255), width=5)
    size, y = (48, 36) if outline == "triangle" else (56, 48)
    draw.text((48, y), brand[0], font=_font(1, size), fill=(255, 255, 255, 255), anchor="mm")
    return mask


@cache
def _font(face: int, size: float) -> ImageFont.FreeTypeFont:
    # the other layout engine depends on installed libraries, and so would the bytes
    data = files("mmsid.catalog.demo").joinpath("fonts", _FONTS[face]).read_bytes()
    return ImageFont.truetype(io.BytesIO(data), size, layout_engine=ImageFont.Layout.BASIC)


def _any_font(rng: np.random.Generator, size: float) -> ImageFont.FreeTypeFont:
    return _font(int(rng.integers(len(_FONTS))), round(2 * size * _jitter(rng)) / 2)


def _tag(canvas: Image.Image, price: int, rng: np.random.Generator) -> tuple[Box, Box]:
    font = _any_font(rng, 17.0)
    text = f"${price}"
    paper, ink = _TAGS[rng.integers(len(_TAGS))]
    left, top, right, bottom = font.getbbox(text, anchor="ls")
    pad = 3
    width, height = math.ceil(right - left) + 2 * pad, math.ceil(bottom - top) + 2 * pad
    x, y = (round(v) for v in _place(rng, (71.0, 75.0), width, height))
    draw = ImageDraw.Draw(canvas)
    draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), 3, fill=paper, outline=(40, 40, 46) if sum(ink) < 100 else paper)
    origin_x, origin_y = x + pad - left, y + pad - top
    draw.text((origin_x, origin_y), text, font=font, fill=ink, anchor="ls")
    ends = [origin_x + font.getlength(text[:n]) for n in (1, 2, 3)]
    top_y, bottom_y = float(y + pad - 1), float(y + height - pad + 1)
    return (ends[0], top_y, ends[1], bottom_y), (ends[1], top_y, min(ends[2], float(x + width)), bottom_y)


def _headline(canvas: Image.Image, text: str, rng: np.random.Generator, dark: bool) -> Box:
    font = _any_font(rng, 15.0)
    lightness = rng.uniform(0.86, 0.97) if dark else rng.uniform(0.08, 0.16)
    color, halo = (tuple(round(255 * c) for c in colorsys.hls_to_rgb(rng.random(), value, 0.5)) for value in (lightness, 1 - lightness))
    left, top, right, bottom = font.getbbox(text, anchor="ls")
    width, height = right - left, bottom - top
    x, y = (round(v) for v in _place(rng, (44.0, 13.0), width + 2, height + 2))
    draw = ImageDraw.Draw(canvas)
    draw.text((x + 1 - left, y + 1 - top), text, font=font, fill=color, anchor="ls", stroke_width=1, stroke_fill=halo)
    return float(x), float(y), float(x + width + 2), float(y + height + 2)
