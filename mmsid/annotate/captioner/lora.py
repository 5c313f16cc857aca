"""LoRA fine-tuning of a hub vision-language model on captions: adapters on its language model, the vision tower is fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from mmsid.annotate.captioner.config import TrainCaptionerConfig
from mmsid.annotate.captioner.data import PictureSet, caption_record
from mmsid.annotate.captioner.training import run_phase
from mmsid.annotate.prompts import load_prompt
from mmsid.backbone.chat import ChatFormat
from mmsid.backbone.model_files import copy_processor, locate_model
from mmsid.backbone.model_loading import load_weights, resolve_dtype, warn_if_untested
from mmsid.backbone.processors import load_processor
from mmsid.backbone.rows import per_token_keys, stack_rows
from mmsid.errors import ConfigError

IGNORED = -100  # label that the loss leaves out


class _AnswerLoss(nn.Module):
    """Cross-entropy of the answer tokens, by the model's own loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.model(**batch, use_cache=False).loss


def conversation_batch(chat: ChatFormat, pictures: list[Image.Image], prompts: list[str], answers: list[str]) -> dict[str, torch.Tensor]:
    """Model inputs and `labels` of conversations with one picture, one prompt and one answer each.

    Labels are -100 on the prompt, the picture and the padding. The tokens of the answer follow those of the prompt, as in generation.

    Raises:
        ConfigError: the chat template shows no answer of an assistant.
    """
    rows = []
    for picture, prompt, answer in zip(pictures, prompts, answers, strict=True):
        before, ending = chat.answer(prompt, 1, answer)
        row = chat.tokens(before, [picture])
        added = chat.tokenizer(ending, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for key in per_token_keys([row]):
            value = 1 if key == "token_type_ids" and not chat.has_template else 0  # PaliGemma attends to type 1 causally
            row[key] = torch.cat([row[key], torch.full_like(added, value)], 1)
        labels = torch.cat([torch.full_like(row["input_ids"], IGNORED), added], 1)
        rows.append(row | {"input_ids": torch.cat([row["input_ids"], added], 1), "labels": labels})
    batch = stack_rows(rows, chat.pad_token, left=False)
    batch["labels"].masked_fill_(batch["attention_mask"] == 0, IGNORED)
    return batch


def fine_tune(
    config: TrainCaptionerConfig, train: PictureSet, draft: Path, accelerator: Accelerator
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Run the phase `captioning` on LoRA adapters of `config.base_model`. Write the merged model and its processor into `draft`.

    Returns:
        The model, its processor, and the figures of the phase.

    Raises:
        ConfigError: the base model cannot be loaded, its chat template shows no answer, or `lora.target` matches none of its layers.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    name = str(config.base_model)
    folder = locate_model(name)
    processor = load_processor(folder, name)
    chat = ChatFormat(processor, name)
    chat.answer("Describe the picture.", 1, "a picture")  # a template without an answer is refused before the weights are read
    dtype = resolve_dtype("auto", folder, accelerator.device)
    base = load_weights(AutoModelForImageTextToText, folder, name, dtype, "train_captioner.base_model")
    warn_if_untested(base.config.model_type, name)
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
        return conversation_batch(chat, pictures, [prompt] * len(chosen), answers)

    objective = _AnswerLoss(model)
    figures = run_phase(config.captioning, "LoRA", objective, [model], batch_at, accelerator, seed=(config.seed, 1), use_muon=False)
    accelerator.wait_for_everyone()
    model = model.merge_and_unload().eval()
    if accelerator.is_main_process:
        model.save_pretrained(draft)
        copy_processor(folder, draft)
    return model, processor, {"captioning": figures}
