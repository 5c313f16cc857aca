"""Choice of the device that a model runs on, with an error in one line for a device that the machine does not have."""

from __future__ import annotations

import os

import torch

from mmsid.errors import ConfigError


def torch_device(name: str = "auto") -> torch.device:
    """The device of this name; `auto` is cuda (of this rank, under `accelerate launch`), else mps, else cpu.

    Raises:
        ConfigError: PyTorch knows no such device, or this machine does not have it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("tensors of this device hold no values")
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is no name of a device; use auto, cpu, cuda, cuda:1 or mps") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each backend raises another one
        found = [f"{torch.cuda.device_count()} cuda"] if torch.cuda.is_available() else []
        found += ["mps"] if torch.backends.mps.is_available() else []
        raise ConfigError(
            f"device {name!r} cannot be used on this machine (it has {', '.join([*found, 'cpu'])}; PyTorch {torch.__version__}: "
            f"{str(error).strip().splitlines()[0].split('. ')[0]}); set device to auto or cpu"
        ) from error
    return device
