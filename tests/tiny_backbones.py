"""Tiny models built from configurations, without downloads, for tests of backbones and tokenizers."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    BertConfig,
    BertModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    SiglipImageProcessorPil,
)

WORDS = [
    *("red", "blue", "green", "shoe", "bag", "lamp", "chair", "striped", "plain", "dotted", "for", "summer", "winter", "running"),
    *("office", "home", "garden", "cheap", "noble", "sale", "new"),
]
CHAT = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def tiny_tokenizer(special: tuple[str, ...] = ("[PAD]", "[CLS]", "[SEP]", "<image>")) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 entries; the template is [CLS] text [SEP], as for BERT."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], trainer)
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def tiny_bert(folder: Path, *, layers: int = 2, hidden: int = 32) -> str:
    """A bidirectional text encoder."""
    torch.manual_seed(0)
    text_tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(text_tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=96,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_decoder(folder: Path) -> str:
    """A causal text model."""
    torch.manual_seed(0)
    text_tokenizer = tiny_tokenizer()
    config = Qwen2Config(vocab_size=len(text_tokenizer), max_position_embeddings=128, initializer_range=0.2, **_text())
    Qwen2Model(config).save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_llava(folder: Path) -> str:
    """SigLIP + Qwen2, 32-pixel pictures of 16 patches."""
    torch.manual_seed(0)
    text_tokenizer = tiny_tokenizer()
    image_id = text_tokenizer.convert_tokens_to_ids("<image>")
    text = AutoConfig.for_model("qwen2", vocab_size=len(text_tokenizer), max_position_embeddings=256, initializer_range=0.2, **_text())
    config = LlavaConfig(
        text_config=text,
        vision_config=AutoConfig.for_model("siglip_vision_model", **_vision()),
        image_token_id=image_id,
        image_token_index=image_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        text_tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=CHAT,
    ).save_pretrained(folder)
    return str(folder)


def tiny_paligemma(folder: Path) -> str:
    """SigLIP + Gemma; attention over the prompt is bidirectional by default."""
    torch.manual_seed(0)
    image_processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    image_processor.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor, tiny_tokenizer(), chat_template=CHAT)
    text_tokenizer = processor.tokenizer
    text = AutoConfig.for_model(
        "gemma",
        vocab_size=len(text_tokenizer),
        max_position_embeddings=256,
        head_dim=8,
        initializer_range=0.2,
        **(_text() | {"num_key_value_heads": 1}),
    )
    config = PaliGemmaConfig(
        text_config=text,
        vision_config=AutoConfig.for_model("siglip_vision_model", projection_dim=32, **_vision()),
        image_token_index=text_tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _text() -> dict[str, int]:
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def _vision() -> dict[str, object]:
    return {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8, "vision_use_head": False,
    }  # fmt: skip
