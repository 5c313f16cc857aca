"""Shared setup of TRL trainers: offline arguments, the progress bar of mmsid, and a JSON-lines log."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmsid.progress import is_main_process, track

_FIELDS = TrainingArguments.__dataclass_fields__
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"  # the old name warns


def plain_arguments(scratch: Path, *, steps: int, lr: float, seed: int, log_every: int = 10) -> dict[str, Any]:
    """Keyword arguments for a TRL configuration: fp32, cosine schedule with 5 % warm-up, no checkpoints, no reports, no dropout.

    Args:
        scratch: output folder of the trainer; `train_quietly` removes it.
        steps: optimiser steps.
        log_every: steps between two log records.
    """
    return {
        "output_dir": str(scratch),
        "max_steps": steps,
        "learning_rate": lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "seed": seed,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        _CHECKPOINTING: False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": log_every,
        "disable_dropout": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def train_quietly(trainer: Trainer, what: str, log: Path, shown: dict[str, str]) -> None:
    """Run `trainer.train()` with the progress bar of mmsid instead of the trainer's own output.

    Args:
        what: label at the left of the bar.
        log: file that receives one line of JSON per log record.
        shown: log key -> label in the bar.
    """
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.add_callback(_Bar(what, log, shown))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # the trainer seeds the global generators
        trainer.train()
    if is_main_process():
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)


class _Bar(TrainerCallback):
    def __init__(self, what: str, log: Path, shown: dict[str, str]) -> None:
        self.what, self.log, self.shown, self.note = what, log, shown, {}
        self.bar: Iterator[int] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar = track(range(state.max_steps), what=self.what, unit="steps", note=self.note)
        next(self.bar, None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        next(self.bar, None)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any) -> None:
        self.note |= {name: float(logs[key]) for key, name in self.shown.items() if key in logs}
        if is_main_process():
            with open(self.log, "a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": state.global_step} | logs) + "\n")
