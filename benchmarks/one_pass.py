"""Cost of caption and interests from one request beside two requests: a small vision-language model with random weights, one thread.

    python benchmarks/one_pass.py --out benchmarks/results/one_pass.json

Prompts are those of mmsid with the text of drawn ads, a picture has 256 tokens, and every answer has a fixed number of tokens: caption 60,
interests 120, both 180. Random weights say nothing about the texts, so agreement is not measured. Seconds are CPU seconds, in turn, in one
run. `two_passes` mines interests from the text alone (the default), `two_passes_with_picture` with `interests.pictures: true`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from mmsid.annotate.generator import Request
from mmsid.annotate.huggingface import HuggingFaceGenerator
from mmsid.annotate.prompts import evidence_json, item_evidence, load_prompt, prompt_folder
from mmsid.artifacts import write_json
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.catalog.demo import write_demo_catalog

BATCH = 8
CAPTION_TOKENS, INTERESTS_TOKENS = 60, 120
CHAT = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}<answer>"
)


def main() -> None:
    """Measure the three ways and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ads", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/one_pass.json"))
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        items = write_demo_catalog(Path(folder) / "ads", items=parsed.ads, users=0, seed=11) / "items.parquet"
        found = [(item, Image.open(item.images[0]).convert("RGB")) for item in read_catalog(CatalogConfig(items=items)).items]
        model = write_model(Path(folder) / "model", [item_evidence(item)["description"] for item, _ in found])
        results = measured(model, found)
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(parsed.out, {"ads": parsed.ads, "threads": 1, **results})
    print(results)


def measured(model: Path, found: list[tuple[Any, Image.Image]]) -> dict[str, Any]:
    """CPU seconds per ad of each way and of its requests, and the tokens of the requests."""
    caption_text = "a navy running shoe with a white sole, seen from the side on a plain ground, the words TRAIL 900 printed in orange"
    texts = [evidence_json(**item_evidence(item)) for item, _ in found]
    texts_with_caption = [evidence_json(**item_evidence(item, caption_text)) for item, _ in found]
    interests = [load_prompt("interests").render(text) for text in texts_with_caption]
    requests = {
        "caption": [Request(load_prompt("caption").text, (picture,)) for _, picture in found],
        "interests": [Request(text) for text in interests],
        "interests_with_picture": [Request(text, (picture,)) for text, (_, picture) in zip(interests, found)],
        "both": [Request(load_prompt("caption_with_interests").render(text), (picture,)) for text, (_, picture) in zip(texts, found)],
    }
    lengths = {"caption": CAPTION_TOKENS, "both": CAPTION_TOKENS + INTERESTS_TOKENS}
    generators = {name: HuggingFaceGenerator(model, max_new_tokens=lengths.get(name, INTERESTS_TOKENS)) for name in requests}
    seconds = dict.fromkeys(requests, 0.0)
    for name, generator in generators.items():
        generator.generate(requests[name][:1])
    for start in range(0, len(found), BATCH):
        for name in sorted(requests, reverse=start % (2 * BATCH) == 0):
            started = time.process_time()
            generators[name].generate(requests[name][start : start + BATCH])
            seconds[name] += time.process_time() - started
    each = {name: value / len(found) for name, value in seconds.items()}
    ways = {
        "two_passes": each["caption"] + each["interests"],
        "two_passes_with_picture": each["caption"] + each["interests_with_picture"],
        "one_pass": each["both"],
    }
    prompt_tokens = {name: int(generators[name].inputs(asked[:1])["input_ids"].shape[1]) for name, asked in requests.items()}
    return {
        "prompt_tokens": prompt_tokens,
        "cpu_seconds_per_request": {name: round(value, 4) for name, value in each.items()},
        "cpu_seconds_per_ad": {name: round(value, 4) for name, value in ways.items()},
        "one_pass_over_two_passes": round(ways["one_pass"] / ways["two_passes"], 3),
        "one_pass_over_two_passes_with_picture": round(ways["one_pass"] / ways["two_passes_with_picture"], 3),
    }


def write_model(folder: Path, texts: list[str]) -> Path:
    """A llava model with random weights and a tokenizer that is trained on the prompts and `texts` (about four letters per token)."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<end>", "<image>", "<answer>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4_000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator([*texts, *(path.read_text() for path in prompt_folder().glob("*.md"))], trainer)
    words = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>")
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=224, patch_size=14,
        vision_use_head=False,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=len(words), hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=2, image_token_index=2, vision_feature_layer=-1,
        vision_feature_select_strategy="full", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    model.generation_config.suppress_tokens = [1]  # the end token: every answer has the same length
    model.save_pretrained(folder)
    LlavaProcessor(
        SiglipImageProcessorPil(size={"height": 224, "width": 224}), words, patch_size=14, vision_feature_select_strategy="full",
        num_additional_image_tokens=0, image_token="<image>", chat_template=CHAT,
    ).save_pretrained(folder)  # fmt: skip
    return folder


if __name__ == "__main__":
    main()
