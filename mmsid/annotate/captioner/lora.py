"""The same stage on a vision-language model somebody else trained: LoRA adapters on its language model, tower fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from mmsid.annotate.captioner.config import TrainCaptionerConfig
from mmsid.annotate.captioner.data import PictureSet, answer
from mmsid.annotate.captioner.training import run_phase
from mmsid.annotate.prompts import load_prompt
from mmsid.errors import ConfigError


class _AnswerLoss(nn.Module):
    """Cross-entropy of the answer tokens, by the model's own loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.model(**batch, use_cache=False).loss


def conversation_batch(processor: Any, pictures: list[Image.Image], prompts: list[str], answers: list[str]) -> dict[str, torch.Tensor]:
    """Inputs and `labels` of whole conversations; prompt, picture and padding positions carry -100.

    The answer is found from its end: whatever follows the prompt rendered with the generation prompt, as the chat template puts it."""
    asked, whole = [], []
    for prompt, text in zip(prompts, answers, strict=True):
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        reply = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        asked.append(processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False))
        full = processor.apply_chat_template([user, reply], tokenize=False)
        if not full.startswith(asked[-1]):
            # Templates that add no generation marker, or trim it: the answer closes with the end-of-sequence token.
            full = asked[-1] + text + (processor.tokenizer.eos_token or "")
        whole.append(full)
    tokenizer = processor.tokenizer
    before, tokenizer.padding_side = tokenizer.padding_side, "right"
    try:
        batch = processor(text=whole, images=pictures, return_tensors="pt", padding=True)
        prompts_only = processor(text=asked, images=pictures, return_tensors="pt", padding=True)
    finally:
        tokenizer.padding_side = before
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, length in enumerate(prompts_only["attention_mask"].sum(1).tolist()):
        labels[row, :length] = -100
    return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)} | {"labels": labels}


def fine_tune(
    config: TrainCaptionerConfig, train: PictureSet, draft: Path, accelerator: Accelerator
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Phase `tell` on LoRA adapters of `config.base_model`; writes the merged model (or the adapter) and the processor into `draft`.

    Raises:
        ConfigError: the base model cannot be loaded, or `lora.target` matches none of its layers.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(config.base_model)
        base = AutoModelForImageTextToText.from_pretrained(config.base_model, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"train_captioner.base_model {config.base_model!r} cannot be loaded ({str(error)[:200]}); give a folder or hub id of an "
            "image-text-to-text model with safetensors weights"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        lora = config.lora
        adapter = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target)
        try:
            model = get_peft_model(base, adapter)
        except ValueError as error:
            raise ConfigError(
                f"train_captioner.lora.target {lora.target!r} matches no layer of {config.base_model}; give another regex"
            ) from error
    model.to(accelerator.device)
    rows = train.rows(False)
    asked = (load_prompt(config.caption_prompt).text, load_prompt(config.interests_prompt).text)
    spoken = np.array([row for row in rows if train.interests[row] is not None])

    def batch_at(step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        about_interests = len(spoken) > 0 and rng.random() < config.interest_share
        chosen = rng.choice(spoken if about_interests else rows, config.captioning.batch_size)
        texts = [train.interests[row] if about_interests else answer(train.captions[row]) for row in chosen]
        pictures = [Image.fromarray(np.asarray(train.pictures[row])) for row in chosen]
        return conversation_batch(processor, pictures, [asked[int(about_interests)]] * len(chosen), texts)

    objective = _AnswerLoss(model)
    told = run_phase(config.captioning, "LoRA", objective, [model], batch_at, accelerator, seed=(config.seed, 1), use_muon=False)
    accelerator.wait_for_everyone()
    model = model.merge_and_unload() if config.lora.merge else model
    model.eval()
    if accelerator.is_main_process:
        model.save_pretrained(draft)
        processor.save_pretrained(draft)
    return model, processor, {"tell": told}
