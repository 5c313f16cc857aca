"""A llava-style VLM (SigLIP tower + Qwen2) and its processor, built from a configuration without hub access or torchvision.

Saved models load through `AutoProcessor` and `AutoModelForImageTextToText`, with a chat template, as any hub model does.
"""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mmsid.config import Section

PAD, END, IMAGE, ASSISTANT = "<pad>", "<end>", "<image>", "<assistant>"
SPECIAL_TOKENS = (PAD, END, IMAGE, ASSISTANT)

# `<assistant>` begins an answer and `<end>` ends it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<assistant>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

# JSON punctuation with the keys of the records is one pre-token, which BPE merges into one token. An answer then needs few decoding
# steps. Values are ordinary text.
_JSON_SPAN = r'(?:"?[\[{}\],: ]*"[a-z_]+": *[\[{]*(?:[0-9.]+)?)+"?|"[\]}]+|[\]}]+'


class ModelSizes(Section):
    """Sizes of the small VLM. The defaults are those of the packaged demo captioner (1.5 M parameters).

    Attributes:
        image_size: side of a picture in px; pictures are scaled to squares.
        patch_size: side of a patch in px.
        tower_hidden, tower_layers, tower_heads, tower_intermediate: width, layers, attention heads and inner width of the vision tower.
        text_hidden, text_layers, text_heads, text_intermediate: the same of the language model.
        vocabulary: largest number of text tokens.
        max_positions: longest sequence of picture and text tokens.
        activation: activation function of both parts, by its name in transformers.
    """

    image_size: int = 96
    patch_size: int = 12
    tower_hidden: int = 128
    tower_layers: int = 4
    tower_heads: int = 4
    tower_intermediate: int = 384
    text_hidden: int = 128
    text_layers: int = 3
    text_heads: int = 4
    text_intermediate: int = 384
    vocabulary: int = 640
    max_positions: int = 512
    activation: str = "relu"  # trains a quarter faster than GELU on a CPU


def sine_positions(grid: int, width: int) -> torch.Tensor:
    """Two-dimensional sine table (grid*grid, width): half of the channels encode the row, half the column.

    It initializes the learned position embeddings of the tower, so that they represent the grid from the first step.
    """
    quarter = width // 4
    frequency = 1.0 / (100.0 ** (torch.arange(quarter, dtype=torch.float32) / max(1, quarter)))
    angle = torch.arange(grid, dtype=torch.float32)[:, None] * frequency[None]
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = wave[:, None].expand(grid, grid, -1), wave[None].expand(grid, grid, -1)
    table = torch.zeros(grid, grid, width)
    table[..., : 4 * quarter] = torch.cat([rows, columns], dim=-1)
    return 0.3 * table.reshape(grid * grid, width)


def train_text_tokenizer(texts: Iterable[str], vocabulary: int, literals: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer trained on `texts`. Every digit is a token; JSON keys with punctuation and `literals` are whole tokens.

    Args:
        texts: answers and prompts.
        vocabulary: upper bound on the number of entries, the 256 bytes included.
        literals: fixed pieces between the fields of a caption template, e.g. ", priced ".
    """
    fixed = [re.escape(piece).replace(r"\ ", " ") for piece in sorted(set(literals), key=len, reverse=True) if len(piece) > 1]
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join([_JSON_SPAN, *fixed, "[0-9]"])), behavior="isolated"),
            # This split separates words. The GPT-2 regex would also split the spans that were isolated above.
            pre_tokenizers.Split(Regex(r"(?<=[A-Za-z0-9.,;])(?= [A-Za-z0-9])"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE, "assistant_token": ASSISTANT},
        clean_up_tokenization_spaces=False,
    )


def build_processor(sizes: ModelSizes, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Processor of PIL pictures (resize, scale to [-1, 1]) and chat conversations."""
    pictures = SiglipImageProcessorPil(
        size={"height": sizes.image_size, "width": sizes.image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=sizes.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_captioner(sizes: ModelSizes, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """A llava model with random weights. The same seed gives the same weights."""
    vision = SiglipVisionConfig(
        hidden_size=sizes.tower_hidden,
        intermediate_size=sizes.tower_intermediate,
        num_hidden_layers=sizes.tower_layers,
        num_attention_heads=sizes.tower_heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        hidden_act=sizes.activation,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=sizes.text_hidden,
        intermediate_size=sizes.text_intermediate,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        num_key_value_heads=sizes.text_heads,
        max_position_embeddings=sizes.max_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_id,
        image_token_index=image_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",  # faster than SDPA on a CPU at 64 to 130 tokens
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    grid = sizes.image_size // sizes.patch_size
    with torch.no_grad():
        tower(model).embeddings.position_embedding.weight.copy_(sine_positions(grid, sizes.tower_hidden))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.do_sample = False
    return model


def tower(model: LlavaForConditionalGeneration) -> torch.nn.Module:
    """The SigLIP vision transformer. `tower(model)(pixel_values=...).last_hidden_state` is (B, patches, tower_hidden)."""
    return model.model.vision_tower


def save_captioner(model: torch.nn.Module, processor: LlavaProcessor, folder: Path) -> None:
    """Save the weights as safetensors, and the processor, into `folder`."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
