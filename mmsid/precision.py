"""The one place that makes an accelerator: how many processes, which device, and in which precision a stage trains."""

from __future__ import annotations

from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from mmsid.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16"]


def make_accelerator(precision: Precision = "fp32", *, unused_parameters: bool = False) -> Accelerator:
    """An accelerator of exactly this precision, whatever ran earlier in the process.

    accelerate keeps one precision per process and hands it to every later Accelerator that does not name its own, so a
    tokenizer trained in bf16 would silently put the recommender that follows it under bf16 autocast.

    Args:
        precision: "auto" is bf16 autocast where the hardware multiplies it, else fp32.
        unused_parameters: some ranks may leave weights without a gradient.

    Raises:
        ConfigError: bf16 on a CPU that only emulates it (dozens of times slower than fp32).
    """
    on_gpu = torch.cuda.is_available()
    fast = torch.cuda.is_bf16_supported() if on_gpu else cpu_has_bf16()
    if precision == "bf16" and not fast:
        raise ConfigError("precision is bf16, but this machine only emulates it (no AVX512-BF16, no AMX); use fp32 or auto")
    mixed = "bf16" if precision == "bf16" or (precision == "auto" and fast) else "no"
    AcceleratorState._reset_state()  # the state of the processes (ranks, device) stays
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if unused_parameters else []
    return Accelerator(cpu=not on_gpu, mixed_precision=mixed, kwargs_handlers=handlers)


def cpu_has_bf16() -> bool:
    """True where matrix products in bf16 run in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
