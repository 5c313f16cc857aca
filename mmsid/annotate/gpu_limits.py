"""What a GPU should manage before it has tried: requests per batch by its free memory, and answers a second by its roofline."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from mmsid.annotate.generator import DEFAULT_BATCH_SIZE
from mmsid.annotate.roofline import find_gpu, kv_bytes, model_of, pictures_per_second

PICTURE_TOKENS = 1_369  # of a picture of 1,024 x 1,024 pixels (Qwen2.5-VL), where there is no budget
PROMPT_TOKENS, ACTIVATIONS = 400, 200_000_000  # tokens, and bytes per request
LARGEST = 256


def fitting_batch(folder: Path, device: torch.device, tokens: int, *, loaded: bool) -> int:
    """Requests that the free memory of a GPU should hold: a power of two from 16 to 256. 16 on other devices.

    Args:
        folder: of the model.
        tokens: of the pictures and of the answer of one request.
        loaded: whether the weights are in the memory already.
    """
    if device.type != "cuda":
        return DEFAULT_BATCH_SIZE
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = torch.cuda.mem_get_info(device)[0] - (0 if loaded else weights)
    per_request = 2 * kv_bytes(AutoConfig.from_pretrained(folder)) * (tokens + PROMPT_TOKENS) + ACTIVATIONS
    fitting = max(0, int(0.8 * free / per_request))
    return max(DEFAULT_BATCH_SIZE, min(LARGEST, 1 << max(0, fitting.bit_length() - 1)))


def expected_rate(model: torch.nn.Module, picture_tokens: int, batch_size: int) -> str:
    """Phrase with the answers a second that the roofline of this GPU expects; "" where its rates are not known."""
    device = next(model.parameters()).device
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return ""
    rate = pictures_per_second(model_of(model, ""), gpu, picture_tokens, concurrent=batch_size)
    what = f"pictures of {picture_tokens} tokens" if picture_tokens else "answers"
    return f"; the roofline of the {gpu.name} expects {rate:.3g} {what} a second at batch {batch_size}"
