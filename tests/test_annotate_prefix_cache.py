"""The common prefix of prompts is computed once by a text model, and answers do not change."""

import pytest
import torch
from tiny_backbones import tiny_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from mmsid.annotate.generator import Request
from mmsid.annotate.huggingface import HuggingFaceGenerator

RULES = "name the interests behind this ad and answer as one object of descriptors and a summary, never more. " * 8
EVIDENCE = ["red shoe", "a blue bag of leather for travel", "lamp", "chair chair chair"]


def text_model(folder, window=None):
    words = tiny_tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.3, pad_token_id=words.pad_token_id, eos_token_id=None, use_sliding_window=window is not None,
        sliding_window=window, max_window_layers=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return HuggingFaceGenerator(folder, max_new_tokens=16)


def requests(rules=RULES, temperature=0.0):
    return [Request(rules + evidence, (), temperature, seed) for seed, evidence in enumerate(EVIDENCE)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_do_not_change_and_the_prefix_is_computed_once(tmp_path, temperature):
    model = text_model(tmp_path / "model")
    alone = [HuggingFaceGenerator(tmp_path / "model", max_new_tokens=16).generate([one])[0] for one in requests(temperature=temperature)]
    assert len(set(alone)) == len(alone)
    assert model.generate(requests(temperature=temperature)) == alone
    assert model.generate(requests(temperature=temperature)[::-1]) == alone[::-1]
    assert model.generate(requests(temperature=temperature)[1:2]) == alone[1:2], "a single row with the known prefix"
    assert model.prefix_cache.computed == 1


def test_other_instructions_replace_the_prefix(tmp_path):
    model = text_model(tmp_path / "model")
    others = requests("find out who would want this and why, in few words that could be said of no other product. " * 8)
    expected = [HuggingFaceGenerator(tmp_path / "model", max_new_tokens=16).generate([one])[0] for one in others]
    model.generate(requests())
    assert model.generate(others) == expected and model.prefix_cache.computed == 2


@pytest.mark.parametrize("rules, window", [("short ", None), (RULES, 16)])
def test_short_prefixes_and_sliding_windows_do_not_use_the_cache(tmp_path, rules, window):
    model = text_model(tmp_path / "model", window)
    alone = [model.generate([one])[0] for one in requests(rules)]
    assert model.generate(requests(rules)) == alone and model.prefix_cache.computed == 0
