"""Check of safetensors files before a model is loaded: an unfinished download or a git-lfs pointer is named with its remedy."""

from __future__ import annotations

import json
from pathlib import Path

from mmsid.errors import ConfigError

_POINTER = b"version https://git-lfs"
_MAX_HEADER = 100_000_000  # bytes; the limit of the format


def check_weight_files(folder: str | Path) -> None:
    """Read the header of every safetensors file in a model folder and compare the file's size with it.

    A hub id (no folder of this name) passes.

    Raises:
        ConfigError: a file is a git-lfs pointer, is shorter than its header says, or is not safetensors.
    """
    for path in sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else ():
        problem = _problem(path)
        if problem is not None:
            raise ConfigError(f"model {folder}: {path.name} {problem}")


def _problem(path: Path) -> str | None:
    again = "copy or download the model again"
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(len(_POINTER))
        if start == _POINTER:
            return f"is a git-lfs pointer ({size} bytes) instead of the weights; run `git lfs pull` there, or download the model"
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > _MAX_HEADER:
            return f"is not a safetensors file ({size:,} bytes); {again}"
        if size < 8 + length:
            return f"is torn: it has {size:,} bytes, fewer than its header of {length:,}; {again}"
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return f"is damaged: its header is not that of a safetensors file; {again}"
    return None if size >= expected else f"is torn: it has {size:,} of {expected:,} bytes; {again}"
