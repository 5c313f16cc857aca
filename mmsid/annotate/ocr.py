"""Words in pictures, read by PP-OCR (extra `ocr`: rapidocr and onnxruntime; the models are inside the package, nothing is downloaded)."""

from __future__ import annotations

import threading
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmsid.errors import ConfigError

PACKAGES = ("rapidocr", "onnxruntime")
_SHORTER_SIDE = 192  # pixels; smaller pictures are enlarged before lines are located
_MIN_SCORE = 0.5
_engines = threading.local()  # an engine keeps the size of its picture, so threads do not share one


class Line(NamedTuple):
    """One line of words: its text, the engine's confidence from 0 to 1, and its box in pixels, with exclusive ends."""

    text: str
    score: float
    top: int
    bottom: int
    left: int
    right: int


def check_installed(key: str) -> None:
    """Raise ConfigError if the extra `ocr`, which the configuration key `key` needs, is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{key} reads words in pictures with the package {missing[0]}, which is not installed; pip install 'mmsid[ocr]'")


def read_lines(picture: Image.Image) -> list[Line]:
    """Lines of words in an RGB picture, from top to bottom; [] if the engine finds none.

    Raises:
        ConfigError: the extra `ocr` is not installed.
    """
    pixels = np.ascontiguousarray(np.asarray(picture.convert("RGB"))[:, :, ::-1])  # the engine expects BGR
    found = _engine()(pixels)
    lines = [] if found.txts is None else [_line(*parts) for parts in zip(found.txts, found.scores, found.boxes, strict=True)]
    return sorted(lines, key=lambda line: (line.top, line.left))


def _line(text: str, score: float, corners: np.ndarray) -> Line:
    left, top = np.floor(corners.min(0)).astype(int).clip(0)
    right, bottom = np.ceil(corners.max(0)).astype(int)
    return Line(text, float(score), int(top), int(bottom), int(left), int(right))


def _engine() -> Any:
    if not hasattr(_engines, "engine"):
        check_installed("ocr")
        from rapidocr import RapidOCR  # an extra

        _engines.engine = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,  # pictures stand upright
                "Global.text_score": _MIN_SCORE,
                "Det.limit_side_len": _SHORTER_SIDE,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,  # pictures are read in several threads
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )
    return _engines.engine
