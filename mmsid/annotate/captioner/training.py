"""Training loop of the captioner: batches, objectives, optimisers, checkpoints.

Three phases: `vision_warmup` trains the vision tower on labels, `captioning` trains the language model while the tower is fixed, `joint`
trains all weights. The joint loss contains the label loss at a small weight, because captions alone do not train the tower to read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from mmsid.annotate.captioner.config import Augment, Phase
from mmsid.annotate.captioner.data import PictureSet
from mmsid.annotate.captioner.labels import LabelHeads, Labels, patch_masks
from mmsid.annotate.captioner.model import tower
from mmsid.annotate.captioner.muon import Muon, split_parameters
from mmsid.artifacts import read_json, read_tensors, write_json, write_tensors
from mmsid.progress import track


@dataclass
class Batch:
    """pixels float32 (B, 3, S, S) in [-1, 1]; codes int64 (B, F); masks bool (B, E, P) or None; rows int64 (B,)."""

    pixels: torch.Tensor
    codes: torch.Tensor
    masks: torch.Tensor | None
    rows: np.ndarray


def make_batch(data: PictureSet, labels: Labels, rows: np.ndarray, patch_size: int, rng: np.random.Generator, augment: Augment) -> Batch:
    """Augmented pictures of `rows` as tensors. Boxes are shifted and mirrored with their pictures."""
    rows = np.sort(rows)  # sequential reads of a memory map are faster
    pixels = torch.from_numpy(np.ascontiguousarray(data.pictures[rows])).permute(0, 3, 1, 2).float()
    boxes = None if data.boxes is None else torch.from_numpy(data.boxes[rows])
    side = pixels.shape[-1]
    if augment.shift:
        d, (dx, dy) = augment.shift, rng.integers(-augment.shift, augment.shift + 1, 2)
        pixels = nn.functional.pad(pixels, (d, d, d, d), mode="replicate")[:, :, d - dy : d - dy + side, d - dx : d - dx + side]
        boxes = None if boxes is None else boxes + torch.tensor([dx, dy, dx, dy], dtype=boxes.dtype)
    pixels = pixels / 127.5 - 1
    if augment.tint:
        gain = 1 + rng.uniform(-augment.tint, augment.tint, (len(rows), 3, 1, 1))
        pixels = ((pixels + 1) * torch.from_numpy(gain).float() - 1).clamp(-1, 1)
    if augment.flip:
        half = torch.from_numpy(rng.permutation(len(rows))[: len(rows) // 2])
        pixels = pixels.contiguous()
        pixels[half] = pixels[half].flip(-1)
        if boxes is not None:
            boxes = boxes.clone()
            boxes[half] = torch.stack([side - boxes[half, :, 2], boxes[half, :, 1], side - boxes[half, :, 0], boxes[half, :, 3]], -1)
    masks = None if boxes is None else patch_masks(boxes, side, patch_size)
    return Batch(pixels, torch.from_numpy(labels.codes[rows]), masks, rows)


def tower_states(vision: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Patch states (B, P, width) of the last layer, before the tower's final norm. They are the input of llava's projector."""
    return vision(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]


class VisionWarmupObjective(nn.Module):
    """Label loss of the vision tower."""

    def __init__(self, vision: nn.Module, heads: LabelHeads):
        super().__init__()
        self.vision, self.heads = vision, heads

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.heads(tower_states(self.vision, batch["pixels"]), batch["codes"], batch.get("masks"))


class CaptioningObjective(nn.Module):
    """Cross-entropy of the answer tokens, plus `label_weight` times the label loss if the tower is trained."""

    def __init__(self, model: nn.Module, heads: LabelHeads, label_weight: float):
        super().__init__()
        self.model, self.heads, self.label_weight = model, heads, label_weight
        self._states: torch.Tensor | None = None
        # The input of the tower's final norm is the input of the projector, see `tower_states`.
        tower(model).post_layernorm.register_forward_pre_hook(self._keep_states)

    def _keep_states(self, module: nn.Module, args: tuple[torch.Tensor]) -> None:
        self._states = args[0]

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        output = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixels"],
            use_cache=False,
        )
        logits, targets = output.logits[:, batch["prompt_length"] - 1 : -1], batch["input_ids"][:, batch["prompt_length"] :]
        targets = targets.masked_fill(batch["attention_mask"][:, batch["prompt_length"] :] == 0, -100)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        states, self._states = self._states, None
        if self.label_weight and states.requires_grad:
            loss = loss + self.label_weight * self.heads(states, batch["codes"], batch.get("masks"))
        return loss


@dataclass
class Answers:
    """Token ids of one prompt and of the answers: `answer_ids` maps a picture's row to its answer, if it has one."""

    prompt_ids: list[int]
    answer_ids: dict[int, list[int]]

    def tokens(self, rows: Sequence[int], pad: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """input_ids (B, T), attention_mask (B, T) and the length of the prompt. Answers are padded on the right with `pad`."""
        answers = [self.answer_ids[int(row)] for row in rows]
        width = max(map(len, answers))
        ids = torch.tensor([self.prompt_ids + answer + [pad] * (width - len(answer)) for answer in answers])
        mask = torch.tensor([[1] * (len(self.prompt_ids) + len(answer)) + [0] * (width - len(answer)) for answer in answers])
        return ids, mask, len(self.prompt_ids)


def encode_answers(processor: object, prompt: str, texts: Sequence[str | None], rows: Sequence[int], num_patches: int) -> Answers:
    """Token ids of a prompt and its answers, rendered by the chat template of the processor as in generation.

    Args:
        texts: answers by row, None where a picture has none.
        rows: pictures to train on.
        num_patches: image tokens per picture.
    """
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    prompt_text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    prompt_text = prompt_text.replace(processor.image_token, processor.image_token * num_patches)
    tokenizer = processor.tokenizer
    chosen = [row for row in rows if texts[row] is not None]
    encoded = tokenizer([texts[row] for row in chosen], add_special_tokens=False)["input_ids"] if chosen else []
    return Answers(
        prompt_ids=tokenizer(prompt_text, add_special_tokens=False)["input_ids"],
        answer_ids={row: [*ids, tokenizer.eos_token_id] for row, ids in zip(chosen, encoded, strict=True)},
    )


class Optimisers:
    """Muon for hidden matrices and AdamW for all other weights, with one schedule: linear warm-up, then cosine to `final_rate`.

    With `use_muon` False, AdamW trains all weights. Low-rank adapters need this, because Muon would orthogonalise each factor.
    """

    def __init__(self, modules: Sequence[nn.Module], phase: Phase, accelerator: Accelerator, use_muon: bool = True):
        muon, rest = split_parameters(modules)
        if not use_muon:
            muon, rest = [], [*muon, *rest]
        pairs = [(Muon(muon, phase.muon_lr, weight_decay=phase.weight_decay), phase.muon_lr)] if muon else []
        pairs += [(torch.optim.AdamW(rest, phase.adamw_lr, betas=(0.9, 0.98), weight_decay=phase.weight_decay), phase.adamw_lr)]
        self._all = [(accelerator.prepare(optimiser), rate) for optimiser, rate in pairs]
        self._parameters, self._phase, self._accelerator = [*muon, *rest], phase, accelerator

    def step(self, loss: torch.Tensor, step: int, progress: float) -> None:
        """Backward pass, gradient clipping and update. `progress` in [0, 1] is the position in the cosine schedule."""
        phase = self._phase
        factor = min(1.0, (step + 1) / max(1, phase.warmup_steps))
        factor *= phase.final_rate + (1 - phase.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        self._accelerator.backward(loss)
        if phase.clip:
            self._accelerator.clip_grad_norm_(self._parameters, phase.clip)
        for optimiser, rate in self._all:
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)


class Checkpoint:
    """Weights and step of an unfinished phase, as safetensors in the draft folder. Optimiser moments are not saved."""

    def __init__(self, folder: Path, every_seconds: float, accelerator: Accelerator):
        self._folder, self._every, self._accelerator = folder, every_seconds, accelerator
        self._last = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, modules: dict[str, nn.Module]) -> tuple[int, int]:
        """Restore `modules` and return (phase, step) at which training continues: (0, 0) without a checkpoint."""
        if not (self._folder / "progress.json").exists():
            return 0, 0
        state = read_json(self._folder / "progress.json")
        tensors = read_tensors(self._folder / state["file"])
        for name, module in modules.items():
            state_dict = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
            module.load_state_dict(state_dict, strict=False)  # tied weights are stored once
        return state["phase"], state["step"]

    def save(self, modules: dict[str, nn.Module], phase: int, step: int, force: bool = False) -> None:
        """Save `modules` if `force`, or if the last checkpoint is older than the interval."""
        if not force and time.monotonic() - self._last < self._every:
            return
        self._last = time.monotonic()
        if self._accelerator.is_main_process:
            tensors, saved = {}, set()
            for name, module in modules.items():
                for key, value in module.state_dict().items():
                    if value.data_ptr() not in saved:
                        saved.add(value.data_ptr())
                        tensors[f"{name}/{key}"] = value
            file = f"weights_{phase}_{step}.safetensors"
            write_tensors(self._folder / file, tensors)
            write_json(self._folder / "progress.json", {"phase": phase, "step": step, "file": file})
            for old in self._folder.glob("weights_*.safetensors"):
                if old.name != file:
                    old.unlink()


def run_phase(
    phase: Phase,
    what: str,
    objective: nn.Module,
    trained: Sequence[nn.Module],
    batch_at: Callable[[int, np.random.Generator], dict[str, torch.Tensor]],
    accelerator: Accelerator,
    seed: Sequence[int],
    start: int = 0,
    after_step: Callable[[int], None] | None = None,
    use_muon: bool = True,
) -> dict[str, float]:
    """Train `trained` on `objective` for one phase.

    Args:
        what: label of the progress bar.
        batch_at: (step, generator) -> batch. The generator is seeded by `seed`, step and rank, so that a resumed run gets equal batches.
        start: first step, later than 0 in a resumed run.
        after_step: receives the number of finished steps.

    Returns:
        Steps, pictures, seconds and last loss of this run of the phase.
    """
    if phase.steps == 0:
        return {"steps": 0, "pictures": 0, "seconds": 0.0}
    wrapped, note = accelerator.prepare(objective), {"loss": float("nan")}
    optimisers = Optimisers(trained, phase, accelerator, use_muon)
    objective.train()
    begun, loss, steps = time.monotonic(), None, phase.steps - start
    for step in track(range(start, phase.steps), what, unit="steps", note=note):
        rng = np.random.default_rng([*seed, step, accelerator.process_index])
        batch = {
            key: value.to(accelerator.device) if isinstance(value, torch.Tensor) else value for key, value in batch_at(step, rng).items()
        }
        with accelerator.autocast():
            loss = wrapped(batch)
        optimisers.step(loss, step, step / phase.steps)
        if step % 10 == 0:
            note["loss"] = float(loss.detach())
        if after_step is not None:
            after_step(step + 1)
    objective.eval()
    return {
        "steps": steps,
        "pictures": steps * phase.batch_size * accelerator.num_processes,
        "seconds": round(time.monotonic() - begun, 1),
        "last_loss": round(float(loss.detach()), 4) if loss is not None else float("nan"),
    }
