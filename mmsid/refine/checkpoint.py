"""Checkpoint of an interrupted refinement in one safetensors file: weights, optimiser, running scales, generators, monitored metric.

A run that resumes from it ends with the same weights, bit by bit on the same machine, as an uninterrupted one.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from mmsid.artifacts import read_tensors, write_tensors
from mmsid.errors import ArtifactError
from mmsid.refine.loop import Refinement


def save_state(loop: Refinement, path: Path) -> None:
    """Write the state of `loop` atomically. Call it on rank 0, between rounds."""
    tensors = {f"weight.{place}": weight for place, weight in enumerate(loop.policy.parameters)}
    for place, state in loop.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{place}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors["draw"] = loop.generator.get_state()
    progress = {
        "next_round": loop.next_round,
        "ended": loop.ended,
        "monitored": loop.monitored,
        "skipped": loop.skipped,
        "scales": loop.scale.scales,
        "lr": loop.lr,
        "order": loop.rng.bit_generator.state,
    }
    write_tensors(path, tensors, metadata={"progress": json.dumps(progress)})


def load_state(loop: Refinement, path: Path) -> None:
    """Restore the state that `save_state` wrote into a fresh `loop` of the same configuration; does nothing without a file.

    Raises:
        ArtifactError: the file is damaged, or belongs to weights of other shapes.
    """
    if not path.exists():
        return
    tensors = read_tensors(path)
    weights = [tensors[f"weight.{place}"] for place in range(sum(name.startswith("weight.") for name in tensors))]
    if [weight.shape for weight in weights] != [weight.shape for weight in loop.policy.parameters]:
        raise ArtifactError(f"{path} holds other weights than this run trains (shapes differ); remove its folder and start again")
    with safe_open(str(path), framework="pt") as handle:
        progress = json.loads(handle.metadata()["progress"])
    with torch.no_grad():
        for weight, kept in zip(loop.policy.parameters, weights, strict=True):
            weight.copy_(kept)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, place, key = name.split(".", 2)
            state.setdefault(int(place), {})[key] = value
    loop.optimizer.load_state_dict(loop.optimizer.state_dict() | {"state": state})
    loop.lr = progress["lr"]
    loop.generator.set_state(tensors["draw"])
    loop.rng.bit_generator.state = progress["order"]
    loop.scale.scales = progress["scales"]
    loop.next_round, loop.ended, loop.skipped = progress["next_round"], progress["ended"], progress["skipped"]
    loop.monitored = progress["monitored"]
