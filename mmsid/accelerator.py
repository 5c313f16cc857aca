"""The one place that makes an accelerator: how many processes, which device, and in which precision a stage trains."""

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


class OneProcess:
    """What a training loop asks of an accelerator, answered for a model that this process trains by itself, in fp32.

    For work that the processes of a run share out instead of doing it together: an Accelerator always speaks for all of them, so a model
    prepared by one rank alone waits for the others for ever.
    """

    process_index, num_processes, is_main_process = 0, 1, True

    def __init__(self) -> None:
        self.device = make_accelerator().device

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module on this process's device."""
        return model.to(self.device)

    def unwrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module as it is."""
        return model

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients, of this process alone."""
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> Any:
        """As torch's."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def cpu_has_bf16() -> bool:
    """True where matrix products in bf16 run in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
