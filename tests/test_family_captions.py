"""Captions by eight families of vision-language models with random weights and their real processors: batches, sizes, picture budgets."""

import shutil

import pytest
import torch
from annotate_stub import caption_config, rows_of, write_catalog
from PIL import Image
from tiny_families import FAMILIES, mllama, picture, qwen3_vl, smolvlm
from transformers import AutoConfig

from mmsid.annotate.caption import run as run_caption
from mmsid.annotate.generator import GenerationFailure, Request
from mmsid.annotate.huggingface import HuggingFaceGenerator
from mmsid.backbone.chat import ChatFormat
from mmsid.backbone.model_loading import TESTED_FAMILIES
from mmsid.backbone.picture_budget import PictureBudget, count_tokens
from mmsid.backbone.processors import load_processor
from mmsid.backbone.vlm import VlmBackbone
from mmsid.errors import ConfigError

SIZES = ((1500, 1000), (600, 900), (64, 64), (200, 2000))


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory) -> str:
    return FAMILIES[request.param](tmp_path_factory.mktemp("family") / request.param)


def requests() -> list[Request]:
    one, wide, high = picture(0, 200, 120), picture(1, 60, 300), picture(2, 90, 90)
    prompts = ["Describe.", "Describe this ad, please, as a JSON object.", "What is it?", "Describe.", "No picture"]
    return [Request(prompt, pictures) for prompt, pictures in zip(prompts, [(one,), (wide,), (high, one), (wide, high), ()])]


def test_answers_do_not_depend_on_the_batch_and_depend_on_the_picture(family):
    generator = HuggingFaceGenerator(family, max_new_tokens=8, picture_tokens=64)
    alone = [generator.generate([request])[0] for request in requests()]
    assert not any(isinstance(answer, GenerationFailure) for answer in alone)
    assert generator.generate(requests()) == alone
    assert generator.generate(requests()[::-1]) == alone[::-1]
    again = [Request("Describe.", (picture(seed, 200, 120),)) for seed in range(6)]
    logits = [generator.model(**generator.inputs([request])).logits[0, -1] for request in again]
    assert all(not torch.allclose(logits[0], other, atol=1e-3) for other in logits[1:])


def test_a_family_with_cross_attention_captions_alone_as_in_a_batch(tmp_path):
    generator = HuggingFaceGenerator(mllama(tmp_path / "mllama"), max_new_tokens=8)
    with pytest.warns(UserWarning, match="tests do not cover"):
        alone = [generator.generate([request])[0] for request in requests()]
    assert generator.generate(requests()) == alone and len(set(alone)) == len(alone)
    other = Request(requests()[0].prompt, (picture(7, 200, 120),))
    logits = [generator.model(**generator.inputs([request])).logits[0, -1] for request in (requests()[0], other)]
    assert not torch.allclose(*logits, atol=1e-3)


def test_a_budget_holds_for_every_size_and_the_smallest_count_is_named(family):
    least = min(count_tokens(load_processor(family), size) for size in SIZES)
    for tokens in (40, 120):
        processor = load_processor(family)
        budget = PictureBudget(processor, tokens, strict=True, name=family)
        found = [count_tokens(processor, budget.fit(Image.new("RGB", size)).size) for size in SIZES]
        assert max(found) <= tokens, found
        assert min(found) >= min(least, tokens // 10), "the budget is used"
    if any(name in family for name in ("gemma3", "paligemma", "internvl", "smolvlm", "onevision")):  # a tile has a fixed number of tokens
        with pytest.raises(ConfigError, match=r"picture_tokens is 2, .* at least \d+ tokens; raise"):
            HuggingFaceGenerator(family, picture_tokens=2).generate(requests()[:1])


def test_control_tokens_in_a_text_neither_end_the_turn_nor_announce_a_picture(family):
    processor = load_processor(family)
    chat = ChatFormat(processor, family)
    controls = " ".join([processor.image_token, *processor.tokenizer.all_special_tokens])
    harmless, hostile = (chat.tokens(chat.prompt(text, 1), [picture(0, 64, 64)])["input_ids"][0] for text in ("a", f"a {controls}"))
    special = torch.tensor(processor.tokenizer.all_special_ids)
    assert torch.isin(hostile, special).sum() == torch.isin(harmless, special).sum()


@pytest.mark.slow
def test_the_caption_stage_finishes_without_refusing_a_picture(family, tmp_path):
    config = caption_config(write_catalog(tmp_path / "catalog", items=5), tmp_path / "caption", model=family, max_quarantined=1.0)
    rows = rows_of(run_caption(config.model_copy(update={"max_new_tokens": 4, "retries": 0})))
    assert len(rows) == 6 and not {row["reason"] for row in rows} & {"model_refused", "out_of_memory"}


def test_the_first_token_is_written_once(family):
    chat = ChatFormat(load_processor(family), family)
    begin = chat.tokenizer.bos_token_id
    ids = chat.tokens(chat.prompt("Describe.", 1), [picture(0, 64, 64)])["input_ids"][0]
    assert begin is None or int((ids == begin).sum()) == 1


def test_every_family_of_the_tests_is_listed_as_tested(family, recwarn):
    HuggingFaceGenerator(family, max_new_tokens=1).generate(requests()[:1])
    assert not [warning for warning in recwarn if "tests do not cover" in str(warning.message)]
    assert AutoConfig.from_pretrained(family).model_type in TESTED_FAMILIES


@pytest.fixture(scope="module")
def thinking(tmp_path_factory) -> str:
    """A Qwen3-VL whose template closes an empty thought unless thinking is switched on."""
    folder = tmp_path_factory.mktemp("family") / "thinking"
    path = qwen3_vl(folder)
    template = folder / "chat_template.jinja"
    thought = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    text = template.read_text()
    assert text.endswith("{% endif %}")
    template.write_text(text.removesuffix("{% endif %}") + thought)
    return path


def test_thinking_is_off_unless_the_template_arguments_ask_for_it(thinking):
    processor = load_processor(thinking)
    assert ChatFormat(processor, "x").prompt("Describe.", 1).endswith("<think>\n\n</think>\n\n")
    assert not ChatFormat(processor, "x", template_arguments={"enable_thinking": True}).prompt("Describe.", 1).endswith("\n\n")
    with pytest.raises(ConfigError, match="reads no thinking_budget"):
        ChatFormat(processor, "x", template_arguments={"thinking_budget": 3})


def test_a_system_prompt_is_rendered_or_refused(thinking, tmp_path):
    assert "You write JSON." in ChatFormat(load_processor(thinking), "x", system_prompt="You write JSON.").prompt("Describe.", 1)
    one = HuggingFaceGenerator(thinking, max_new_tokens=4, system_prompt="You write JSON.")
    other = HuggingFaceGenerator(thinking, max_new_tokens=4)
    assert one.parameters != other.parameters and one.generate(requests()[:1]) != other.generate(requests()[:1])
    folder = tmp_path / "deaf"
    qwen3_vl(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages if m['role'] == 'user' %}{{ m['content'][-1]['text'] }}{% endfor %}")
    with pytest.raises(ConfigError, match="shows no system message"):
        ChatFormat(load_processor(folder), "x", system_prompt="You write JSON.")


def test_a_family_without_chats_is_refused_before_its_weights_are_read(tmp_path):
    folder = tmp_path / "model"
    qwen3_vl(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8] + bytes(8))
    with pytest.raises(ConfigError, match="has no chat template; use an instruction-tuned model"):
        HuggingFaceGenerator(folder).generate(requests()[:1])


def test_a_missing_package_of_a_processor_is_named_before_the_weights_are_downloaded(tmp_path, monkeypatch):
    folder = smolvlm(tmp_path / "model")
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    asked = []

    def download(name, revision, allow_patterns):
        asked.append(allow_patterns)
        assert "*.safetensors" not in allow_patterns
        small = tmp_path / "snapshot"
        shutil.copytree(folder, small, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        return str(small)

    monkeypatch.setattr("mmsid.backbone.model_files.snapshot_download", download)
    for load in (HuggingFaceGenerator, VlmBackbone):
        with pytest.raises(ConfigError, match=r"'some/model' needs a package that is not installed: .*pip install num2words"):
            load("some/model")
    assert len(asked) == 2


def test_an_untested_family_gets_a_warning(tmp_path, monkeypatch):
    folder = qwen3_vl(tmp_path / "model")
    monkeypatch.delitem(TESTED_FAMILIES, "qwen3_vl")
    with pytest.warns(UserWarning, match=r"family 'qwen3_vl', which mmsid's tests do not cover"):
        assert HuggingFaceGenerator(folder, max_new_tokens=2).generate(requests()[:1])
