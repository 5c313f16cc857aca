"""LoRA fine-tuning of a hub vision-language model on captions: adapters on its language model, the vision tower is fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from mmsid.annotate.captioner.config import TrainCaptionerConfig
from mmsid.annotate.captioner.data import PictureSet, caption_record
from mmsid.annotate.captioner.training import run_phase
from mmsid.annotate.prompts import load_prompt
from mmsid.backbone.weight_files import check_weight_files
from mmsid.errors import ConfigError


class _AnswerLoss(nn.Module):
    """Cross-entropy of the answer tokens, by the model's own loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.model(**batch, use_cache=False).loss


def conversation_batch(processor: Any, pictures: list[Image.Image], prompts: list[str], answers: list[str]) -> dict[str, torch.Tensor]:
    """Model inputs and `labels` of conversations with one prompt and one answer each.

    Labels are -100 on the prompt, the picture and the padding. The answer begins where the prompt, rendered with the generation prompt of
    the chat template, ends.
    """
    prompt_texts, full_texts = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        before = processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
        full = processor.apply_chat_template([user, reply], tokenize=False)
        if not full.startswith(before):
            # The template has no generation prompt, or trims it. The answer then ends with the end-of-sequence token.
            full = before + answer + (processor.tokenizer.eos_token or "")
        prompt_texts.append(before)
        full_texts.append(full)
    tokenizer = processor.tokenizer
    padding_side, tokenizer.padding_side = tokenizer.padding_side, "right"
    try:
        batch = processor(text=full_texts, images=pictures, return_tensors="pt", padding=True)
        prompts_only = processor(text=prompt_texts, images=pictures, return_tensors="pt", padding=True)
    finally:
        tokenizer.padding_side = padding_side
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, length in enumerate(prompts_only["attention_mask"].sum(1).tolist()):
        labels[row, :length] = -100
    return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)} | {"labels": labels}


def fine_tune(
    config: TrainCaptionerConfig, train: PictureSet, draft: Path, accelerator: Accelerator
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Run the phase `captioning` on LoRA adapters of `config.base_model`. Write the merged model and its processor into `draft`.

    Returns:
        The model, its processor, and the figures of the phase.

    Raises:
        ConfigError: the base model cannot be loaded, or `lora.target` matches none of its layers.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    check_weight_files(config.base_model)
    try:
        processor = AutoProcessor.from_pretrained(config.base_model)
        base = AutoModelForImageTextToText.from_pretrained(config.base_model, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
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
    caption_prompt, interests_prompt = load_prompt(config.caption_prompt).text, load_prompt(config.interests_prompt).text
    rows_with_interests = np.array([row for row in rows if train.interests[row] is not None])

    def batch_at(step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        if len(rows_with_interests) > 0 and rng.random() < config.interest_share:
            chosen, prompt = rng.choice(rows_with_interests, config.captioning.batch_size), interests_prompt
            answers = [train.interests[row] for row in chosen]
        else:
            chosen, prompt = rng.choice(rows, config.captioning.batch_size), caption_prompt
            answers = [caption_record(train.captions[row]) for row in chosen]
        pictures = [Image.fromarray(np.asarray(train.pictures[row])) for row in chosen]
        return conversation_batch(processor, pictures, [prompt] * len(chosen), answers)

    objective = _AnswerLoss(model)
    figures = run_phase(config.captioning, "LoRA", objective, [model], batch_at, accelerator, seed=(config.seed, 1), use_muon=False)
    accelerator.wait_for_everyone()
    model = model.merge_and_unload().eval()
    if accelerator.is_main_process:
        model.save_pretrained(draft)
        processor.save_pretrained(draft)
    return model, processor, {"captioning": figures}
