"""Log of a run: one line of JSON per round in `log.jsonl`, and an optional tracker of accelerate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, filter_trackers
from accelerate.utils import is_tensorboard_available, is_wandb_available

from mmsid.errors import ConfigError

TrackerName = Literal["tensorboard", "wandb"]


def check_tracker(name: TrackerName | None) -> None:
    """Raises ConfigError if the tracker is not installed; accelerate would skip it silently."""
    if {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, None: lambda: True}[name]():
        return
    raise ConfigError(
        f"refine.log_with is {name}, which is not installed; pip install {name}, or remove the key (log.jsonl is always written)"
    )


class RunLog:
    """Writes records to `log.jsonl` in `folder` and to the accelerator's trackers, on rank 0.

    Args:
        folder: draft folder; files of a tracker are written to `folder`/trackers.
        tracker: a name, or a tracker object.
        config: hyperparameters for the tracker.
        first: round to continue at; lines of that round and later ones, left by an interrupted run, are removed.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path, tracker: TrackerName | GeneralTracker | None, config: dict[str, Any], first: int = 0
    ) -> None:
        self.accelerator, self.path = accelerator, folder / "log.jsonl"
        if accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            self.path.write_text("".join(line for line in lines if json.loads(line).get("round", first) < first), encoding="utf-8")
        directory = str(folder / "trackers")
        accelerator.project_configuration.set_directories(directory)
        accelerator.log_with = filter_trackers(tracker, directory)
        accelerator.init_trackers("mmsid_refine", {name: value for name, value in config.items() if isinstance(value, (int, float, str))})

    def __call__(self, record: dict[str, Any]) -> None:
        """Write one flat record; `round` is the step of its numbers in a tracker."""
        if not self.accelerator.is_main_process:
            return
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")
        numbers = {name: float(value) for name, value in record.items() if isinstance(value, (int, float)) and name != "round"}
        self.accelerator.log(numbers, step=record.get("round"))

    def close(self) -> None:
        """End the trackers' runs. Call it before the draft is published, because their files are in it."""
        for tracker in self.accelerator.trackers:  # `end_training` would also end the process group
            tracker.finish()
