"""Expected captions per second of a GPU, from its peak rates (a roofline model, not a measurement).

Prefill is bound by arithmetic and decoding by bandwidth. The practical rate is 45 % and 60 % of these, as good bf16 engines reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# tokens of prompt and answer, pictures in one batch, patches of the vision tower per picture token
PROMPT, ANSWER, CONCURRENT, PATCHES_PER_TOKEN = 150, 100, 256, 4
PREFILL_SHARE, DECODE_SHARE = 0.45, 0.60


@dataclass(frozen=True)
class Model:
    """`language` and `vision`: numbers of parameters. `kv_bytes`: keys and values of one token, all layers, bf16 (grouped queries)."""

    name: str
    language: float
    vision: float
    kv_bytes: int


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 FLOP/s and bytes/s of the GPU's memory, from the data sheet."""

    name: str
    flops: float
    bandwidth: float


GPUS = (
    Gpu("A100 80GB", 312e12, 2.04e12),
    Gpu("H100 SXM", 989e12, 3.35e12),
    Gpu("H200", 989e12, 4.8e12),
    Gpu("L4", 121e12, 0.3e12),
    Gpu("L40S", 362e12, 0.864e12),
    Gpu("A10G", 70e12, 0.6e12),
)


def pictures_per_second(
    model: Model, gpu: Gpu, picture_tokens: int, *, practical: bool = True, answer: int = ANSWER, concurrent: int = CONCURRENT
) -> float:
    """Captions per second of one GPU; `practical=False` uses the peak rates."""
    prefill_flops = 2 * (model.language * (picture_tokens + PROMPT) + model.vision * PATCHES_PER_TOKEN * picture_tokens)
    mean_context = picture_tokens + PROMPT + answer / 2
    bytes_per_step = 2 * model.language + concurrent * model.kv_bytes * mean_context
    prefill = prefill_flops / (gpu.flops * (PREFILL_SHARE if practical else 1.0))
    decode = answer * bytes_per_step / (gpu.bandwidth * (DECODE_SHARE if practical else 1.0)) / concurrent
    return 1.0 / (prefill + decode)


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU of a device name such as `NVIDIA H100 80GB HBM3`; None if its rates are not known here."""
    words = device_name.upper().replace("-", " ").split()
    return next((gpu for gpu in GPUS if gpu.name.split()[0] in words), None)


def model_of(network: torch.nn.Module, name: str) -> Model:
    """Sizes of a loaded vision-language model, or of a text model (no vision parameters)."""
    vision = sum(
        weight.numel()
        for key, weight in network.named_parameters()
        if any(part.startswith(("vision", "visual", "image")) for part in key.split("."))
    )
    total = sum(weight.numel() for weight in network.parameters())
    return Model(name, total - vision, vision, kv_bytes(network.config))


def kv_bytes(config: Any) -> int:
    """Bytes of keys and values of one token in all layers, in bf16."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers * heads * width * 2 * 2
