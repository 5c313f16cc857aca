"""Tiny models of hub families with random weights and their real processors, written as folders in the hub's layout, without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    MllamaImageProcessorPil,
    PixtralImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
)

TURNS = (
    "{{% for m in messages %}}{start}{{{{ m['role'] }}}}\n{{% if m['content'] is string %}}{{{{ m['content'] }}}}{{% else %}}"
    "{{% for c in m['content'] %}}{{% if c['type'] == 'image' %}}{image}{{% else %}}{{{{ c['text'] }}}}{{% endif %}}{{% endfor %}}"
    "{{% endif %}}{end}\n{{% endfor %}}{{% if add_generation_prompt %}}{start}assistant\n{{% endif %}}"
)
CHATML = {"start": "<|im_start|>", "end": "<|im_end|>"}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"max_position_embeddings": 4096, "initializer_range": 0.2}
SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
SIGLIP |= {"model_type": "siglip_vision_model", "vision_use_head": False}


def words(special: dict[str, str], *, pad: str, end: str, begin: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose named special tokens (image_token, ...) are attributes, as in the tokenizers of the hub."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    listed = list(dict.fromkeys([pad, end, *([begin] if begin else []), *special.values()]))
    raw.train_from_iterator([], trainers.BpeTrainer(special_tokens=listed, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=pad, eos_token=end, bos_token=begin, extra_special_tokens=special, padding_side="right"
    )


def _write(
    folder: Path, processor_class: str, tokenizer: Any, pictures: Any, template: str | None, options: dict[str, Any], config: dict[str, Any]
) -> str:
    """Write tokenizer, image processor, processor settings, template and a model with random weights."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    text = {"vocab_size": len(tokenizer) + 8, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = config | {"text_config": TEXT | text | {"bos_token_id": tokenizer.bos_token_id} | config["text_config"]}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():  # random towers of the default width of initialization hardly tell pictures apart
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and weight.std() < 0.1:
                weight.normal_(0, 0.2 if "vis" not in name else 0.15)
            if name.endswith("gate"):
                weight.fill_(1.0)  # Mllama begins with closed gates of its cross-attention
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pictures.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": processor_class, **options}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    special = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>"}
    special |= {"vision_end_token": "<|vision_end|>", "im_start_token": "<|im_start|>"}
    return words(special, pad="<|endoftext|>", end="<|im_end|>")


QWEN_TEMPLATE = TURNS.format(image="<|vision_start|><|image_pad|><|vision_end|>", **CHATML)


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    return {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image": "<|image_pad|>",
            "video": "<|video_pad|>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        }.items()
    }


def qwen2_5_vl(folder: Path) -> str:
    tokenizer = _qwen_tokenizer()
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32, "patch_size": 14}
    config = {"model_type": "qwen2_5_vl", **_qwen_ids(tokenizer), "text_config": {"rope_parameters": rope}}
    config["vision_config"] = vision | {"window_size": 112, "fullatt_block_indexes": [1]}
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 12_845_056})
    return _write(folder, "Qwen2_5_VLProcessor", tokenizer, pictures, QWEN_TEMPLATE, {}, config)


def qwen3_vl(folder: Path) -> str:
    tokenizer = _qwen_tokenizer()
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32, "patch_size": 16}
    config = {"model_type": "qwen3_vl", **_qwen_ids(tokenizer), "text_config": {"rope_parameters": rope, "head_dim": 8}}
    config["vision_config"] = vision | {"num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
    pictures = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 65_536, "longest_edge": 16_777_216}, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return _write(folder, "Qwen3VLProcessor", tokenizer, pictures, QWEN_TEMPLATE, {}, config)


def smolvlm(folder: Path) -> str:
    special = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
    special |= {f"row_{r}_col_{c}": f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)}
    tokenizer = words(special | {"end_of_utterance_token": "<end_of_utterance>"}, pad="<|im_end|>", end="<end_of_utterance>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    vision = SIGLIP | {"model_type": "smolvlm_vision", "image_size": 64, "patch_size": 16}
    config = {"model_type": "smolvlm", "image_token_id": image, "vision_config": vision, "scale_factor": 2}
    config["text_config"] = {"model_type": "llama"}
    pictures = SmolVLMImageProcessorPil(size={"longest_edge": 256}, max_image_size={"longest_edge": 64})
    template = (
        "<|im_start|>{% for m in messages %}{{m['role'] | capitalize}}{% if m['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}"
        "{% endif %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{c['text']}}{% elif c['type'] == 'image' %}{{ '<image>' }}"
        "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )
    return _write(folder, "SmolVLMProcessor", tokenizer, pictures, template, {"image_seq_len": 4}, config)


def llava_onevision(folder: Path) -> str:
    tokenizer = words({"image_token": "<image>", "video_token": "<video>"}, pad="<|endoftext|>", end="<|im_end|>")
    grid = [[32, 32], [32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]
    ids = {f"{name}_token_index": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("image", "video")}
    config = {"model_type": "llava_onevision", **ids, "image_grid_pinpoints": grid, "text_config": {"model_type": "qwen2"}}
    config["vision_config"] = SIGLIP | {"image_size": 32, "patch_size": 8}
    pictures = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=grid)
    options = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    return _write(folder, "LlavaOnevisionProcessor", tokenizer, pictures, TURNS.format(image="<image>\n", **CHATML), options, config)


def internvl(folder: Path) -> str:
    special = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
    tokenizer = words(special, pad="<|endoftext|>", end="<|im_end|>")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": [32, 32]}
    config = {"model_type": "internvl", "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), "image_seq_length": 4}
    config |= {"vision_config": vision | {"patch_size": [8, 8]}, "text_config": {"model_type": "qwen2"}}
    pictures = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32})
    return _write(
        folder, "InternVLProcessor", tokenizer, pictures, TURNS.format(image="<IMG_CONTEXT>\n", **CHATML), {"image_seq_length": 4}, config
    )


def gemma3(folder: Path) -> str:
    special = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = words(special | {"start_of_turn_token": "<start_of_turn>"}, pad="<pad>", end="<end_of_turn>", begin="<bos>")
    ids = {f"{name}_token_index": tokenizer.convert_tokens_to_ids(special[f"{name}_token"]) for name in ("boi", "eoi", "image")}
    config = {"model_type": "gemma3", **ids, "mm_tokens_per_image": 4, "vision_config": SIGLIP | {"image_size": 32, "patch_size": 8}}
    config["text_config"] = {"head_dim": 8, "sliding_window": 512, "query_pre_attn_scalar": 8}
    pictures = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<start_of_image>{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    return _write(folder, "Gemma3Processor", tokenizer, pictures, template, {"image_seq_length": 4}, config)


def paligemma2(folder: Path) -> str:
    """PaliGemma 2 has Gemma 2 as its language model, no chat template, and attends over the prompt in both directions."""
    tokenizer = words({"image_token": "<image>"}, pad="<pad>", end="<eos>", begin="<bos>")
    tokenizer.add_tokens([f"<loc{i:0>4}>" for i in range(1024)] + [f"<seg{i:0>3}>" for i in range(128)])
    text = {"model_type": "gemma2", "head_dim": 8, "sliding_window": 512, "query_pre_attn_scalar": 8, "num_key_value_heads": 2}
    vision = SIGLIP | {"image_size": 32, "patch_size": 8, "projection_dim": 32}
    config = {"model_type": "paligemma", "image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "projection_dim": 32}
    config |= {"hidden_size": 32, "text_config": text, "vision_config": vision}
    pictures = SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_seq_length=16)
    return _write(folder, "PaliGemmaProcessor", tokenizer, pictures, None, {}, config)


def mistral3(folder: Path) -> str:
    special = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    tokenizer = words(special | {"inst_token": "[INST]", "inst_end_token": "[/INST]"}, pad="<pad>", end="</s>", begin="<s>")
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "mistral3", "image_token_index": tokenizer.convert_tokens_to_ids("[IMG]"), "spatial_merge_size": 2}
    config |= {"vision_config": vision | {"head_dim": 8, "image_size": 1540, "patch_size": 14}, "tie_word_embeddings": False}
    config["text_config"] = {"model_type": "mistral", "head_dim": 8, "sliding_window": None}
    pictures = PixtralImageProcessorPil(size={"longest_edge": 1540}, patch_size={"height": 14, "width": 14})
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}[IMG]{% else %}{{ c['text'] }}{% endif %}{% endfor %}[/INST]"
        "{% elif m['role'] == 'system' %}{{ m['content'][0]['text'] }}\n\n{% else %}{{ m['content'][0]['text'] }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    options = {"patch_size": 14, "spatial_merge_size": 2}
    return _write(folder, "PixtralProcessor", tokenizer, pictures, template, options, config)


def mllama(folder: Path) -> str:
    """Llama 3.2 Vision reads pictures by cross-attention: captions only, no backbone of a tokenizer."""
    special = {"image_token": "<|image|>", "header_token": "<|start_header_id|>", "python_token": "<|python_tag|>"}
    tokenizer = words(special, pad="<|pad|>", end="<|eot_id|>", begin="<|begin_of_text|>")
    tiles = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4, "intermediate_size": 64}
    vision |= {"vision_output_dim": 64, "image_size": 32, "patch_size": 8, "intermediate_layers_indices": [0]}
    config = {"model_type": "mllama", "image_token_index": tokenizer.convert_tokens_to_ids("<|image|>")}
    config |= {"vision_config": vision | {"max_num_tiles": 4, "supported_aspect_ratios": tiles}}
    config["text_config"] = {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    pictures = MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=4)
    template = "{{ bos_token }}" + TURNS.format(image="<|image|>", start="<|start_header_id|>", end="<|eot_id|>")
    return _write(folder, "MllamaProcessor", tokenizer, pictures, template, {}, config)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Sixteen random patches of colour: what a random tower can tell apart."""
    patches = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height))


FAMILIES = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "smolvlm": smolvlm,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "gemma3": gemma3,
    "paligemma2": paligemma2,
    "mistral3": mistral3,
}
