"""Weights of hub models: number format by device, families that the tests cover, and a line that describes a loaded model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from mmsid.backbone.loading_bar import no_loading_bar
from mmsid.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# Vision-language families of tests/test_family_*.py (with tiny random weights), by `model_type`; docs/annotation.md has the table.
TESTED_FAMILIES = {
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "smolvlm": "SmolVLM",
    "llava_onevision": "LLaVA-OneVision",
    "internvl": "InternVL",
    "gemma3": "Gemma 3",
    "paligemma": "PaliGemma, PaliGemma 2",
    "mistral3": "Mistral 3",
    "llava": "LLaVA",
}
TESTED_WITH = "transformers 5.24"
_SMALL = 400_000_000  # bytes; below, bf16 saves nothing worth a rounding


def resolve_dtype(dtype: Dtype, folder: str | Path, device: torch.device) -> torch.dtype:
    """The number format of the weights.

    `auto` is bf16 on a GPU that computes in it, and float32 elsewhere. A checkpoint of less than 400 MB that is stored in float32 stays so.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cuda" or not torch.cuda.is_bf16_supported():
        return torch.float32
    stored = getattr(AutoConfig.from_pretrained(folder), "dtype", None)
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return torch.float32 if stored in (None, torch.float32) and size < _SMALL else torch.bfloat16


def load_weights(model_class: Any, folder: str | Path, name: str, dtype: torch.dtype, what: str = "model") -> torch.nn.Module:
    """Load a model from safetensors. The attention implementation is the fastest that every part of the family supports.

    Args:
        model_class: AutoModelForImageTextToText or another class with `from_pretrained`.
        what: name of the key in messages.

    Raises:
        ConfigError: the weights cannot be loaded, or contain NaN or infinite values.
    """
    try:
        with no_loading_bar():
            model = model_class.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, ImportError, AttributeError, SafetensorError) as error:
        raise ConfigError(f"{what} {name!r} in {folder} cannot be loaded: {str(error)[:300]}") from error
    for key, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ConfigError(f"{what} {name!r} in {folder}: {key} contains NaN or infinite values; copy the model again")
    return model


def warn_if_untested(model_type: str, name: str) -> None:
    """Warn of a vision-language family that the tests do not cover. It is used all the same."""
    if model_type not in TESTED_FAMILIES:
        warnings.warn(
            f"model {name!r} is of the family {model_type!r}, which mmsid's tests do not cover (they cover "
            f"{', '.join(TESTED_FAMILIES.values())} with {TESTED_WITH}); look at its first answers",
            stacklevel=3,
        )


def describe_model(model: torch.nn.Module, name: str) -> str:
    """`NAME: 2.13 B parameters, bfloat16, cuda:0 (NVIDIA H100)`."""
    count = sum(weight.numel() for weight in model.parameters())
    size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    weight = next(model.parameters())
    device = str(weight.device)
    if weight.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(weight.device)})"
    return f"{name}: {size} parameters, {str(weight.dtype).removeprefix('torch.')}, {device}"
