"""LoRA adapters (peft) on the language part of a backbone; vision towers stay frozen."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from torch import nn

from mmsid.backbone.query_tokens import QueryBackbone
from mmsid.backbone.weight_files import check_weight_files
from mmsid.config import Section
from mmsid.errors import ConfigError

_ATTENTION = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "o_proj", "q_lin", "k_lin", "v_lin", "q", "k", "v", "qkv", "Wqkv")
_LAYER = re.compile(r"\.(?:layer|layers|h|blocks)\.(\d+)\.")


class LoraSettings(Section):
    """LoRA settings.

    Attributes:
        r: rank; 0 switches LoRA off, and the backbone stays frozen.
        alpha: the adapter is scaled by alpha / r.
        dropout: dropout rate at the input of the adapter.
        targets: name endings of the adapted linear layers; default: the attention projections.
        last_layers: adapt the last n layers only. None adapts all.
    """

    r: int = Field(8, ge=0)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] = Field(default_factory=list)
    last_layers: int | None = Field(None, ge=1)


def target_modules(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Full names of the linear layers that get an adapter, outside vision towers.

    Raises:
        ConfigError: no layer matches.
    """
    endings = tuple(settings.targets) or _ATTENTION
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.split(".")[-1] in endings
        and not any(part.startswith(("vision", "visual", "image")) for part in name.split("."))
    ]
    depth = {name: int(found[1]) for name in names if (found := _LAYER.search(f".{name}"))}
    if settings.last_layers is not None and depth:
        first = max(depth.values()) + 1 - settings.last_layers
        names = [name for name in names if depth.get(name, -1) >= first]
    if not names:
        raise ConfigError(f"lora.targets {list(endings)} match no linear layer of {type(model).__name__}; use the names of its projections")
    return names


def add_lora(backbone: QueryBackbone, settings: LoraSettings) -> None:
    """Add an adapter in place. Inside the model, only the weights of the adapter require gradients."""
    if settings.r == 0:
        return
    adapter = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=target_modules(backbone.model, settings)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated function of transformers 5
        backbone.model = get_peft_model(backbone.model, adapter)


def save_lora(backbone: QueryBackbone, folder: Path) -> bool:
    """Write the adapter (safetensors) into `folder`; returns False if the backbone has no adapter."""
    if not isinstance(backbone.model, PeftModel):
        return False
    backbone.model.save_pretrained(str(folder), safe_serialization=True)
    return True


def load_lora(backbone: QueryBackbone, folder: Path, *, trainable: bool = False) -> None:
    """Load the adapter in `folder` into the backbone.

    Raises:
        ConfigError: the weights of the adapter are torn or a git-lfs pointer.
    """
    check_weight_files(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        backbone.model = PeftModel.from_pretrained(backbone.model, str(folder), is_trainable=trainable)
