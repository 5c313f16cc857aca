"""Picture budget: settings of a processor under which a picture costs at most a given number of tokens, per kind of processor.

Families cut pictures differently: by pixels (Qwen-VL), by the longer side (Pixtral), into tiles (InternVL, SmolVLM, Idefics 3) or by a
grid of resolutions (LLaVA-NeXT, LLaVA-OneVision). Each kind has a ladder of settings from many tokens to few. The first rung whose
tokens, counted by the processor itself on blank pictures of several shapes, fit the budget is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from PIL import Image

from mmsid.errors import ConfigError

PROBES = ((1024, 1024), (1200, 800), (800, 1200), (1600, 400), (150, 1800), (64, 64))  # width, height in pixels
_MIN_SIDE = 32


class PictureBudget:
    """Keeps the tokens per picture of a processor within a budget.

    Args:
        processor: of a vision-language model; its image processor is changed in place.
        tokens: largest number of tokens per picture, its markers included.
        strict: raise an error if the family cannot keep to the budget; otherwise its smallest setting is used.
        name: name of the model in messages.

    Raises:
        ConfigError: `strict`, and every setting of this family needs more tokens.
    """

    def __init__(self, processor: Any, tokens: int, *, strict: bool, name: str) -> None:
        self.processor, self.tokens = processor, tokens
        image_processor = getattr(processor, "image_processor", None)
        self._by_grid = getattr(image_processor, "image_grid_pinpoints", None) is not None
        if image_processor is None:
            return
        least = self._counted((_MIN_SIDE, _MIN_SIDE)) if self._by_grid else 0
        for rung in () if self._by_grid else _rungs(image_processor, tokens):
            for key, value in rung.items():
                setattr(image_processor, key, value)
            least = largest_count(processor)
            if least <= tokens:
                break
        if least > tokens and strict:
            raise ConfigError(
                f"picture_tokens is {tokens}, but the processor of {name!r} gives every picture at least {least} tokens; raise "
                "picture_tokens to that, or remove the key"
            )

    def fit(self, picture: Image.Image) -> Image.Image:
        """The picture, shrunk if the processor chooses its tokens by the picture's size (a grid of resolutions)."""
        if not self._by_grid:
            return picture
        fitted = picture
        side = max(picture.size)
        while self._counted(fitted.size) > self.tokens and side > _MIN_SIDE:
            side = max(_MIN_SIDE, side * 4 // 5)
            fitted = picture.copy()
            fitted.thumbnail((side, side), Image.Resampling.LANCZOS)
        return fitted

    def _counted(self, size: tuple[int, int]) -> int:
        return int(self.processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])["num_image_tokens"][0])


def count_tokens(processor: Any, size: tuple[int, int]) -> int:
    """Number of tokens that a picture of this size (width, height) adds to a prompt."""
    token = processor.image_token
    with_picture = processor(text=[token], images=[[Image.new("RGB", size)]], return_tensors="pt")["input_ids"].shape[1]
    return with_picture - len(processor.tokenizer("")["input_ids"])


def largest_count(processor: Any) -> int:
    """Largest number of tokens of the probes."""
    return max(count_tokens(processor, size) for size in PROBES)


def _rungs(image_processor: Any, tokens: int) -> Iterator[dict[str, Any]]:
    """Settings from many tokens to few, for the kind of this image processor."""
    size = dict(getattr(image_processor, "size", None) or {})
    patch, merge = getattr(image_processor, "patch_size", None), getattr(image_processor, "merge_size", None)
    longest = size.get("longest_edge")
    if isinstance(patch, int) and merge and longest:  # Qwen-VL: pixels, one token per (patch * merge) ** 2 of them
        for allowed in range(tokens, 0, -1):
            pixels = min(allowed * (patch * merge) ** 2, longest)
            # small pictures are enlarged to the shortest edge, rounded up, which must not exceed the budget
            yield {"size": {"shortest_edge": min(pixels // 4, size.get("shortest_edge") or pixels), "longest_edge": pixels}}
        return
    if patch is not None and longest:  # Pixtral: the longer side; a row of n patches has n + 1 tokens
        step = patch["height"] if isinstance(patch, dict) else int(getattr(patch, "height", None) or patch)
        for patches in range(2 * math.isqrt(tokens) + 2, 0, -1):  # twice, because neighbouring patches may be merged
            if patches * step <= longest:
                yield {"size": {"longest_edge": patches * step}}
        return
    yield {}
    if getattr(image_processor, "do_pan_and_scan", None):
        yield {"do_pan_and_scan": False}
    if getattr(image_processor, "do_image_splitting", None) and getattr(image_processor, "max_image_size", None):
        tile = dict(image_processor.max_image_size)["longest_edge"]
        for tiles in range(longest // tile, 0, -1):
            yield {"size": {"longest_edge": tiles * tile}}
        yield {"do_image_splitting": False}
    elif getattr(image_processor, "max_patches", None):
        for tiles in (tiles for tiles in (9, 6, 4, 3, 2, 1) if tiles < image_processor.max_patches):
            yield {"max_patches": tiles, "min_patches": min(tiles, image_processor.min_patches)}
