"""Picture encoders without a language model: colour numbers, and EfficientNet-lite0 (`efficientnet.py`).

A picture's features depend on that picture alone: pictures are read one at a time, which is also fastest on a CPU.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import nn

from mmsid.artifacts import sha256
from mmsid.backbone.efficientnet import DIM, EfficientNetLite0, load_pretrained, pixels_of

PictureEncoderName = Literal["colours", "efficientnet"]
LEVELS, GRID = 6, 4  # of the histogram, per channel; of the mean colours, per side
_SIDE = 96  # pixels; larger pictures are shrunk before their colours are counted
WIDTHS: dict[str, int] = {"colours": LEVELS**3 + 3 * GRID**2, "efficientnet": DIM}


def colour_numbers(picture: Image.Image) -> np.ndarray:
    """264 numbers of an RGB picture, float32 from 0 to 1: an RGB histogram of 6 x 6 x 6 bins (sum 1), and the mean colours of 4 x 4 fields.

    Pictures are scaled to 96 x 96 pixels first, so that their size does not matter.
    """
    pixels = np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BOX))
    bins = pixels.astype(np.int64) * LEVELS // 256
    counts = np.bincount((bins @ np.array([LEVELS**2, LEVELS, 1])).ravel(), minlength=LEVELS**3)
    field = _SIDE // GRID
    means = pixels.reshape(GRID, field, GRID, field, 3).mean((1, 3)) / 255
    return np.concatenate([counts / _SIDE**2, means.ravel()]).astype(np.float32)


class PictureEncoder(nn.Module):
    """Features of pictures by one or several encoders, side by side. The weights are frozen and in evaluation mode at any time.

    Args:
        names: encoders, in the order of their features. Weights are undefined until `load_pretrained` or `load_state_dict`.
    """

    def __init__(self, names: tuple[PictureEncoderName, ...]) -> None:
        super().__init__()
        self.names = names
        self.efficientnet = EfficientNetLite0().to(memory_format=torch.channels_last) if "efficientnet" in names else None

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of features of each encoder."""
        return tuple(WIDTHS[name] for name in self.names)

    def load_pretrained(self) -> None:
        """Read the pretrained weights of the encoders that have some.

        Raises:
            ConfigError: their package is not installed.
        """
        if self.efficientnet is not None:
            load_pretrained(self.efficientnet)

    def features(self, picture: Image.Image) -> list[np.ndarray]:
        """Features of one RGB picture: an array (width,) float16 per encoder."""
        return [self.features_by(name, picture) for name in self.names]

    @torch.inference_mode()
    def features_by(self, name: PictureEncoderName, picture: Image.Image) -> np.ndarray:
        """Features of one RGB picture by one of the encoders, (width,) float16."""
        return (colour_numbers(picture) if name == "colours" else self._by_network(picture)).astype(np.float16)

    def fingerprint(self, name: PictureEncoderName) -> str:
        """Hash of the weights of one of the encoders."""
        network = self.efficientnet if name == "efficientnet" else None
        weights = {} if network is None else network.state_dict()
        return sha256([[key, sha256(value.cpu().contiguous().numpy().tobytes())] for key, value in weights.items()])

    def _by_network(self, picture: Image.Image) -> np.ndarray:
        pixels = pixels_of(picture)[None].to(next(self.parameters()).device, memory_format=torch.channels_last)
        with torch.autocast(pixels.device.type, enabled=False):
            return self.efficientnet(pixels)[0].float().cpu().numpy()
