"""The text model behind `text_quality`: reads (descriptor, evidence), says one number; trained by TRL's `RewardTrainer` on pairs.

Which model is a choice of the configuration. Any Hugging Face encoder or causal model (a folder or a hub id) becomes a sequence
classifier with one output. Where none is at hand, `InteractionModel`: which words of a descriptor go with which words of the evidence,
from MiniLM's word vectors, no layers of attention. It learns in a minute on one core; the one small transformer from nothing that was
tried beside it (2 layers, d = 128) still guessed between right and contradicted after half a minute.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from pydantic import Field
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

from mmsid.backbone.packaged_weights import minilm_path
from mmsid.backbone.text import no_loading_bar
from mmsid.config import Section
from mmsid.errors import ConfigError
from mmsid.trl_training import plain_arguments, train_quietly

INTERACTION = "interaction"


class TextModelConfig(Section):
    """Which model, and how it is trained.

    Attributes:
        path: `interaction`, or a folder or hub id of an encoder or causal model.
        width: of the interaction model's word vectors.
        max_length: tokens read; the end of the evidence is cut first.
        steps, batch: optimiser steps, and pairs per step and process.
        center: pulls the scores of a pair towards a mean of 0, so that scores of different items can be compared.
    """

    path: str = INTERACTION
    width: int = Field(default=96, gt=0)
    max_length: int = Field(default=128, gt=0)
    steps: int = Field(default=800, gt=0)
    batch: int = Field(default=64, gt=0)
    lr: float = Field(default=3e-3, gt=0)
    center: float = Field(default=0.01, ge=0)


class InteractionConfig(PreTrainedConfig):
    """Sizes of `InteractionModel`; `separator_id` stands between descriptor and evidence."""

    model_type = "mmsid_interaction"

    def __init__(self, vocab_size: int = 30522, width: int = 96, separator_id: int = 102, **others: Any) -> None:
        self.vocab_size, self.width, self.separator_id = vocab_size, width, separator_id
        super().__init__(**{"num_labels": 1, "pad_token_id": 0} | others)


class InteractionModel(PreTrainedModel):
    """score = w . (sum of descriptor words) * (sum of evidence words) + v . (sum of descriptor words), each side projected by itself.

    The first term weighs every pair of words, the second says how much a descriptor promises whatever the item is.
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
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        after = (input_ids == self.config.separator_id).cumsum(1) > 0
        vectors = self.words(input_ids)
        left, right = (_pooled(vectors, real.bool() & side) for side in (~after, after))
        left = self.descriptor(left)
        return SequenceClassifierOutput(logits=self.together(left * self.evidence(right)) + self.alone(left))


AutoConfig.register(InteractionConfig.model_type, InteractionConfig)
AutoModelForSequenceClassification.register(InteractionConfig, InteractionModel)


def _pooled(vectors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of the masked vectors over the square root of their number: (B, T, d) -> (B, d)."""
    mask = mask[..., None].to(vectors.dtype)
    return (vectors * mask).sum(1) / mask.sum(1).clamp_min(1).sqrt()


def build_text_model(config: TextModelConfig, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model before training, and its text tokenizer.

    Raises:
        ConfigError: `path` cannot be loaded as a text model.
    """
    with torch.random.fork_rng(devices=[]), no_loading_bar():
        torch.manual_seed(seed)
        if config.path == INTERACTION:
            return _from_word_vectors(config.width)
        try:
            text_tokenizer = AutoTokenizer.from_pretrained(config.path)
            model = AutoModelForSequenceClassification.from_pretrained(config.path, num_labels=1, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"text_quality.model.path {config.path!r} cannot be loaded as a text model ({error}); give a folder or hub id, or "
                f"`{INTERACTION}`"
            ) from error
    if text_tokenizer.pad_token is None:
        text_tokenizer.pad_token = text_tokenizer.eos_token
    model.config.get_text_config().pad_token_id = text_tokenizer.pad_token_id
    return model, text_tokenizer


def _from_word_vectors(width: int) -> tuple[InteractionModel, PreTrainedTokenizerBase]:
    """Words start as MiniLM's own vectors, rotated to their first `width` principal components, so that alike words start alike."""
    folder = str(minilm_path())
    text_tokenizer = AutoTokenizer.from_pretrained(folder)
    known = AutoModel.from_pretrained(folder).get_input_embeddings().weight.detach()
    width = min(width, known.shape[1])
    model = InteractionModel(InteractionConfig(len(known), width, text_tokenizer.sep_token_id, pad_token_id=text_tokenizer.pad_token_id))
    centred = known - known.mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    reduced = centred @ axes.flip(1)[:, :width]
    model.words.weight.data.copy_(reduced / reduced.std())
    for side in (model.descriptor, model.evidence):
        nn.init.normal_(side.weight, std=width**-0.5)
    nn.init.zeros_(model.together.weight)
    nn.init.zeros_(model.alone.weight)
    return model, text_tokenizer


def load_text_model(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A trained model and its text tokenizer, from the folder that both were saved into."""
    with no_loading_bar():
        return AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def encode(text_tokenizer: PreTrainedTokenizerBase, descriptor: str, evidence: str, max_length: int) -> list[int]:
    """Ids of one question. Encoders read descriptor, separator, evidence; causal models the evidence first and end on the descriptor."""
    if text_tokenizer.sep_token_id is not None:
        return text_tokenizer(descriptor, evidence, truncation="only_second", max_length=max_length)["input_ids"]
    asked = text_tokenizer(f"\n{descriptor}", add_special_tokens=False)["input_ids"][: max_length // 2]
    last = [*asked, text_tokenizer.eos_token_id]
    first = text_tokenizer(evidence, add_special_tokens=False)["input_ids"]
    return first[: max_length - len(last)] + last


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
    """Bradley-Terry on (chosen, rejected) ids, by TRL. -> the model, trained in place."""
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
def score_ids(model: PreTrainedModel, questions: Sequence[list[int]], batch: int = 128) -> np.ndarray:
    """Scores (Q,) float64; equal questions get equal scores, whatever shares their batch."""
    distinct = sorted(set(map(tuple, questions)), key=len)
    device, pad = next(model.parameters()).device, model.config.get_text_config().pad_token_id
    known: dict[tuple[int, ...], float] = {}
    for start in range(0, len(distinct), batch):
        rows = distinct[start : start + batch]
        ids = torch.full((len(rows), len(rows[-1])), pad, device=device)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(rows):
            ids[at, : len(row)], mask[at, : len(row)] = torch.tensor(row, device=device), 1
        known |= zip(rows, model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist(), strict=True)
    return np.array([known[tuple(question)] for question in questions], dtype=np.float64)
