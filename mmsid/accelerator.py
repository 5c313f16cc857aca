"""Construction of `accelerate.Accelerator` with an explicit device and precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from mmsid.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16"]


def make_accelerator(precision: Precision = "fp32", *, unused_parameters: bool = False) -> Accelerator:
    """Make an accelerator with this precision, independent of earlier accelerators of the process.

    accelerate keeps one precision per process and applies it to every later Accelerator. Without the reset, a tokenizer trained in
    bf16 would silently put the recommender that follows it under bf16 autocast.

    Args:
        precision: "auto" is bf16 autocast if the hardware has bf16 matrix products, else fp32.
        unused_parameters: set if a forward pass may leave weights without a gradient (DDP).

    Raises:
        ConfigError: bf16 on a CPU that only emulates it, dozens of times slower than fp32.
    """
    on_gpu = torch.cuda.is_available()
    fast = torch.cuda.is_bf16_supported() if on_gpu else cpu_has_bf16()
    if precision == "bf16" and not fast:
        raise ConfigError("precision is bf16, but this machine only emulates it (no AVX512-BF16, no AMX); use fp32 or auto")
    mixed = "bf16" if precision == "bf16" or (precision == "auto" and fast) else "no"
    AcceleratorState._reset_state()  # keeps ranks and device
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if unused_parameters else []
    return Accelerator(cpu=not on_gpu, mixed_precision=mixed, kwargs_handlers=handlers)


class OneProcess:
    """The interface of an Accelerator for a model that a single process trains in fp32.

    Use it when the processes of a run divide independent trainings among them. A model that one rank alone prepares with an
    Accelerator waits forever for the other ranks.
    """

    process_index, num_processes, is_main_process = 0, 1, True

    def __init__(self) -> None:
        self.device = make_accelerator().device

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """Move the model to the device of this process."""
        return model.to(self.device)

    def unwrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the model unchanged."""
        return model

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients in this process only."""
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> Any:
        """`torch.nn.utils.clip_grad_norm_`."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def cpu_has_bf16() -> bool:
    """True if the CPU computes bf16 matrix products in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
