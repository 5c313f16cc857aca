"""Text model of `text_quality`: scores a descriptor given the texts of an item (its evidence), trained on pairs by TRL's `RewardTrainer`.

Any Hugging Face encoder or causal model becomes a sequence classifier with one output. The default is `InteractionModel`, a bilinear
model of word vectors that start as those of MiniLM. It trains in a minute on one CPU core.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from pydantic import Field
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig, RewardTrainer

from mmsid.backbone.loading_bar import no_loading_bar
from mmsid.backbone.packaged_weights import minilm_path
from mmsid.backbone.weight_files import check_weight_files
from mmsid.config import Section
from mmsid.errors import ConfigError
from mmsid.trl_training import plain_arguments, train_quietly

INTERACTION = "interaction"


class TextModelConfig(Section):
    """Text model and its training.

    Attributes:
        path: `interaction`, or a folder or hub id of an encoder or causal model.
        width: size of the interaction model's word vectors.
        max_length: tokens per input. Longer evidence is truncated.
        steps: optimiser steps.
        batch: pairs per step and process.
        lr: peak learning rate.
        center: weight of the loss that centres the scores at 0 (`center_rewards_coefficient`), which makes items comparable.
    """

    path: str = INTERACTION
    width: int = Field(default=96, gt=0)
    max_length: int = Field(default=128, gt=0)
    steps: int = Field(default=800, gt=0)
    batch: int = Field(default=64, gt=0)
    lr: float = Field(default=3e-3, gt=0)
    center: float = Field(default=0.01, ge=0)


class InteractionConfig(PreTrainedConfig):
    """Configuration of `InteractionModel`. `separator_id` is the token between descriptor and evidence."""

    model_type = "mmsid_interaction"

    def __init__(self, vocab_size: int = 30522, width: int = 96, separator_id: int = 102, **others: Any) -> None:
        self.vocab_size, self.width, self.separator_id = vocab_size, width, separator_id
        super().__init__(**{"num_labels": 1, "pad_token_id": 0} | others)


class InteractionModel(PreTrainedModel):
    """Bilinear scorer: with d and e the projected sums of the word vectors of descriptor and evidence, score = w . (d * e) + v . d + b.

    The first term scores pairs of words. The second scores the descriptor independently of the item.
    """

    config_class = InteractionConfig

    def __init__(self, config: InteractionConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.descriptor = nn.Linear(config.width, config.width, bias=False)
        self.evidence = nn.Linear(config.width, config.width, bias=False)
        self.together = nn.Linear(config.width, 1, bias=False)
        self.alone = nn.Linear(config.width, 1)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **unused: Any) -> SequenceClassifierOutput:
        """ids (B, T) of `[CLS] descriptor [SEP] evidence [SEP]` -> logits (B, 1)."""
        mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
        after = (input_ids == self.config.separator_id).cumsum(1) > 0
        vectors = self.words(input_ids)
        left, right = (_pooled(vectors, mask & side) for side in (~after, after))
        left = self.descriptor(left)
        return SequenceClassifierOutput(logits=self.together(left * self.evidence(right)) + self.alone(left))


AutoConfig.register(InteractionConfig.model_type, InteractionConfig)
AutoModelForSequenceClassification.register(InteractionConfig, InteractionModel)


def _pooled(vectors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of the masked vectors over the square root of their number: (B, T, d) -> (B, d)."""
    mask = mask[..., None].to(vectors.dtype)
    return (vectors * mask).sum(1) / mask.sum(1).clamp_min(1).sqrt()


def build_text_model(config: TextModelConfig, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The untrained model and its text tokenizer.

    Raises:
        ConfigError: `path` cannot be loaded as a text model.
    """
    with torch.random.fork_rng(devices=[]), no_loading_bar():
        torch.manual_seed(seed)
        if config.path == INTERACTION:
            return _from_word_vectors(config.width)
        check_weight_files(config.path)
        try:
            text_tokenizer = AutoTokenizer.from_pretrained(config.path)
            model = AutoModelForSequenceClassification.from_pretrained(config.path, num_labels=1, dtype=torch.float32)
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(
                f"text_quality.model.path {config.path!r} cannot be loaded as a text model ({error}); give a folder or hub id, or "
                f"`{INTERACTION}`"
            ) from error
    if text_tokenizer.pad_token is None:
        text_tokenizer.pad_token = text_tokenizer.eos_token
    model.config.get_text_config().pad_token_id = text_tokenizer.pad_token_id
    return model, text_tokenizer


def _from_word_vectors(width: int) -> tuple[InteractionModel, PreTrainedTokenizerBase]:
    """An interaction model whose word vectors are the first `width` principal components of MiniLM's."""
    folder = str(minilm_path())
    text_tokenizer = AutoTokenizer.from_pretrained(folder)
    vectors = AutoModel.from_pretrained(folder).get_input_embeddings().weight.detach()
    width = min(width, vectors.shape[1])
    model = InteractionModel(InteractionConfig(len(vectors), width, text_tokenizer.sep_token_id, pad_token_id=text_tokenizer.pad_token_id))
    centred = vectors - vectors.mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    reduced = centred @ axes.flip(1)[:, :width]
    model.words.weight.data.copy_(reduced / reduced.std())
    for side in (model.descriptor, model.evidence):
        nn.init.normal_(side.weight, std=width**-0.5)
    nn.init.zeros_(model.together.weight)
    nn.init.zeros_(model.alone.weight)
    return model, text_tokenizer


def encode(text_tokenizer: PreTrainedTokenizerBase, descriptor: str, evidence: str, max_length: int) -> list[int]:
    """Token ids of one input: descriptor, separator, evidence for encoders; evidence, descriptor, end for causal models."""
    if text_tokenizer.sep_token_id is not None:
        return text_tokenizer(descriptor, evidence, truncation="only_second", max_length=max_length)["input_ids"]
    descriptor_ids = text_tokenizer(f"\n{descriptor}", add_special_tokens=False)["input_ids"][: max_length // 2]
    end = [*descriptor_ids, text_tokenizer.eos_token_id]
    evidence_ids = text_tokenizer(evidence, add_special_tokens=False)["input_ids"]
    return evidence_ids[: max_length - len(end)] + end


def train_text_model(
    model: PreTrainedModel,
    text_tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[list[int], list[int]]],
    config: TextModelConfig,
    *,
    scratch: Path,
    log: Path,
    seed: int,
) -> PreTrainedModel:
    """Train in place on (chosen, rejected) token ids with the Bradley-Terry loss of TRL. Returns the model in evaluation mode."""
    arguments = RewardConfig(
        **plain_arguments(scratch, steps=config.steps, lr=config.lr, seed=seed),
        per_device_train_batch_size=config.batch,
        center_rewards_coefficient=config.center,
        max_length=None,
    )
    data = Dataset.from_dict({"chosen_ids": [chosen for chosen, _ in pairs], "rejected_ids": [rejected for _, rejected in pairs]})
    trainer = RewardTrainer(model, arguments, train_dataset=data, processing_class=text_tokenizer)
    train_quietly(trainer, "text_quality", log, {"loss": "loss", "accuracy": "pairs right"})
    return trainer.accelerator.unwrap_model(trainer.model).eval()


@torch.no_grad()
def score_ids(model: PreTrainedModel, inputs: Sequence[list[int]], batch: int = 128) -> np.ndarray:
    """Scores (Q,) float64 of Q inputs of token ids. Equal inputs are scored once, so they get equal scores."""
    distinct = sorted(set(map(tuple, inputs)), key=len)
    device, pad = next(model.parameters()).device, model.config.get_text_config().pad_token_id
    scores: dict[tuple[int, ...], float] = {}
    for start in range(0, len(distinct), batch):
        rows = distinct[start : start + batch]
        ids = torch.full((len(rows), len(rows[-1])), pad, device=device)
        mask = torch.zeros_like(ids)
        for position, row in enumerate(rows):
            ids[position, : len(row)], mask[position, : len(row)] = torch.tensor(row, device=device), 1
        scores |= zip(rows, model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist(), strict=True)
    return np.array([scores[tuple(row)] for row in inputs], dtype=np.float64)
