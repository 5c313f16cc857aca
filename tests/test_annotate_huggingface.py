"""Hugging Face models in this process: padding, sampling, model ids, default prompts. Tiny models, no hub access."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from annotate_stub import StubGenerator, caption_config, rows_of, write_catalog
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from mmsid.annotate.caption import run as run_caption
from mmsid.annotate.decoding import SeededGumbel
from mmsid.annotate.generator import Request
from mmsid.annotate.huggingface import HuggingFaceGenerator
from mmsid.annotate.interests import InterestsConfig
from mmsid.annotate.interests import run as run_interests
from mmsid.annotate.prompts import load_prompt
from mmsid.errors import ConfigError

CHAT = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}<answer>"
)


def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<pad>", "<end>", "<image>", "<answer>"], initial_alphabet=alphabet))
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", padding_side="right")
    made.chat_template = CHAT
    return made


def text_config(size: int) -> dict:
    return {
        "vocab_size": size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True, "initializer_range": 0.3,
    }  # fmt: skip


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny_llava"
    words = tokenizer()
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=16,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=Qwen2Config(**text_config(len(words))), image_token_id=2, image_token_index=2,
        vision_feature_layer=-1, vision_feature_select_strategy="full", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    model.save_pretrained(folder)
    LlavaProcessor(
        SiglipImageProcessorPil(size={"height": 32, "width": 32}), words, patch_size=16, vision_feature_select_strategy="full",
        num_additional_image_tokens=0, image_token="<image>", chat_template=CHAT,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny_text"
    words = tokenizer()
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**text_config(len(words)), pad_token_id=0, eos_token_id=1))
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def requests(pictures: bool = True, temperature: float = 0.0) -> list[Request]:
    prompts = ["Describe.", "Describe this ad, please, as a JSON object.", "What?", "Name the interests behind this ad as JSON."]
    colours = ["red", "green", "blue", "white"]
    return [
        Request(prompt, (Image.new("RGB", (40, 30), colour),) if pictures else (), temperature, seed)
        for seed, (prompt, colour) in enumerate(zip(prompts, colours))
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("pictures", [True, False])
def test_a_vision_model_answers_the_same_alone_and_in_a_batch(llava, pictures, temperature):
    generator = HuggingFaceGenerator(llava, max_new_tokens=12)
    batch = requests(pictures, temperature)
    alone = [generator.generate([request])[0] for request in batch]
    assert generator.generate(batch) == alone
    assert generator.generate(batch[::-1]) == alone[::-1]
    assert len(set(alone)) > 1
    assert all(alone)


def test_a_text_model_answers_the_same_alone_and_in_a_batch(text_model):
    generator = HuggingFaceGenerator(text_model, max_new_tokens=12)
    batch = requests(pictures=False)
    alone = [generator.generate([request])[0] for request in batch]
    assert generator.generate(batch) == alone
    with pytest.raises(ConfigError, match="reads text only"):
        generator.generate(requests())


def test_pictures_and_texts_may_share_a_call(llava):
    generator = HuggingFaceGenerator(llava, max_new_tokens=6)
    mixed = [requests()[0], requests(pictures=False)[1], requests()[2]]
    assert generator.generate(mixed) == [generator.generate([request])[0] for request in mixed]


def test_a_batch_that_exceeds_the_device_is_halved_and_only_an_oversized_request_fails(text_model, monkeypatch):
    generator = HuggingFaceGenerator(text_model, max_new_tokens=4)
    batch = requests(pictures=False)
    expected = generator.generate(batch)
    generate_once = generator._generate_once

    def small_device(requests):
        if len(requests) > 1 or "interests" in requests[0].prompt:
            raise torch.OutOfMemoryError("no")
        return generate_once(requests)

    monkeypatch.setattr(generator, "_generate_once", small_device)
    answers = generator.generate(batch)
    assert answers[:3] == expected[:3]
    assert answers[3].reason == "out_of_memory"


def test_inputs_are_prepared_while_the_model_runs_another_call(text_model):
    both_prepared = threading.Barrier(2, timeout=60)

    class Synchronised(HuggingFaceGenerator):
        def inputs(self, requests):
            inputs = super().inputs(requests)
            both_prepared.wait()  # passes only when the inputs of both calls are ready
            return inputs

    generator = Synchronised(text_model, max_new_tokens=4)
    batch = requests(pictures=False)
    with ThreadPoolExecutor(generator.max_concurrent_calls) as calls:
        halves = list(calls.map(generator.generate, [batch[:2], batch[2:]]))
    assert halves[0] + halves[1] == HuggingFaceGenerator(text_model, max_new_tokens=4).generate(batch)


def test_picture_tokens_is_refused_for_a_processor_of_one_size(llava):
    with pytest.raises(ConfigError, match=r"picture_tokens is 3, .* at least 4 tokens"):
        HuggingFaceGenerator(llava, picture_tokens=3).generate(requests()[:1])
    assert HuggingFaceGenerator(llava, picture_tokens=4, max_new_tokens=6).generate(requests()[:1])


def test_a_pickled_generator_answers_the_same(llava, tmp_path, monkeypatch):
    generator = HuggingFaceGenerator(llava, max_new_tokens=6)
    expected = generator.generate(requests())
    monkeypatch.chdir(tmp_path)
    copy = pickle.loads(pickle.dumps(generator))
    assert (copy.model_id, copy.parameters) == (generator.model_id, generator.parameters)
    assert copy.generate(requests()) == expected


def test_sampling_follows_the_softmax():
    scores = torch.log(torch.tensor([[0.7, 0.2, 0.1]])).repeat(4_000, 1)
    noise = SeededGumbel([Request("", temperature=1.0, seed=seed) for seed in range(4_000)])
    share = torch.bincount(noise(None, scores).argmax(dim=1), minlength=3) / 4_000
    assert torch.allclose(share, torch.tensor([0.7, 0.2, 0.1]), atol=0.025)  # 3.5 standard errors of a share at n = 4,000


def test_the_model_id_depends_on_the_weights(llava, tmp_path):
    copy = shutil.copytree(llava, tmp_path / "tiny_llava")
    first = HuggingFaceGenerator(llava)
    assert first.model_id.startswith("tiny_llava@") and len(first.model_id) == len("tiny_llava@") + 12
    assert HuggingFaceGenerator(copy).model_id == first.model_id
    model = LlavaForConditionalGeneration.from_pretrained(copy)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1
    model.save_pretrained(copy)
    assert HuggingFaceGenerator(copy).model_id != first.model_id
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert HuggingFaceGenerator(copy).parameters != first.parameters


def test_missing_and_pickled_models_raise_errors_with_a_remedy(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        HuggingFaceGenerator(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="neither a folder nor"):
        HuggingFaceGenerator("nobody/nothing")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match="pickled weights are refused"):
        HuggingFaceGenerator(tmp_path)


def test_both_stages_finish_with_models_that_answer_nonsense(llava, text_model, tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=5)
    config = caption_config(catalog, tmp_path / "caption", model=llava, max_new_tokens=48, max_quarantined=1.0)
    rows = rows_of(run_caption(config))
    assert len(rows) == 6
    assert all(row["status"] == "ok" or (len(row["attempts"]) == 2 and row["rejected"]) for row in rows)
    assert {row["prompt_sha256"] for row in rows} == {load_prompt("caption").sha256}
    options = {"model": text_model, "captions": config.out, "max_new_tokens": 160, "max_quarantined": 1.0}
    rows = rows_of(run_interests(InterestsConfig(out=tmp_path / "interests", catalog=catalog, **options)), "interests")
    assert [row["creative"] for row in rows] == [0] * 5
    assert {row["source"] for row in rows} == {"llm"}


def test_the_interest_prompt_gets_title_description_and_caption(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=5)
    run_caption(caption_config(catalog, tmp_path / "caption"), StubGenerator())
    answer = json.dumps({"descriptors": [{"descriptor": "a need", "confidence": 0.5}], "summary": "who needs it"})

    class Miner(StubGenerator):
        def _answer(self, request: Request) -> str:
            return answer

    miner = Miner()
    config = InterestsConfig(out=tmp_path / "interests", catalog=catalog, captions=tmp_path / "caption", prompt="interests")
    run_interests(config, miner)
    sent = [request for call in miner.calls for request in call]
    assert len(sent) == 5 and not any(request.pictures for request in sent)
    assert any(
        '"title": "thing number 4"' in request.prompt and "a plain card of colour (28, 124, 0) ; " in request.prompt for request in sent
    )


def test_a_trained_captioner_gets_the_prompt_of_its_training(tmp_path):
    from mmsid.annotate.caption import default_prompt
    from mmsid.artifacts import writing

    catalog = write_catalog(tmp_path / "catalog", items=1)
    for name in ("demo", "some-hub/model"):
        assert default_prompt("caption", caption_config(catalog, tmp_path, model=name)) == ("caption_demo" if name == "demo" else "caption")
    with writing(tmp_path / "trained", stage="train_captioner", config={"caption_prompt": "mine.md"}):
        pass
    config = caption_config(catalog, tmp_path, model=tmp_path / "trained")
    assert (default_prompt("caption", config), default_prompt("interests", config)) == ("mine.md", "interests_demo")


@pytest.mark.slow
def test_the_caption_command_killed_at_random_moments_ends_with_the_same_rows(llava, tmp_path):
    write_catalog(tmp_path / "catalog", items=40)
    caption = f"{{model: {llava}, max_quarantined: 1.0, max_new_tokens: 40, batch_size: 4, shard_rows: 6, cache: null}}"
    for name in ("clean", "killed"):
        text = f"name: {name}\nruns: {tmp_path}\ncatalog: {{items: {tmp_path}/catalog/items.jsonl}}\ncaption: {caption}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    command = [sys.executable, "-m", "mmsid.cli", "caption", "--config"]
    subprocess.run([*command, str(tmp_path / "clean.yaml")], check=True, capture_output=True)
    rng, kills, finished = random.Random(3), 0, tmp_path / "killed" / "caption" / "manifest.json"
    for _ in range(10):
        if finished.exists():
            break
        job = subprocess.Popen([*command, str(tmp_path / "killed.yaml")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shards = tmp_path / "killed" / ".caption.draft" / "shards"
        before = len(list(shards.glob("*.parquet")))
        while job.poll() is None and kills < 3 and len(list(shards.glob("*.parquet"))) == before:
            time.sleep(0.02)  # imports take seconds: wait for a first shard before the kill
        if kills < 3 and job.poll() is None:
            time.sleep(rng.uniform(0.0, 0.5))
            os.kill(job.pid, signal.SIGKILL)
            kills += 1
        job.wait()
    assert kills >= 2
    assert rows_of(tmp_path / "killed" / "caption") == rows_of(tmp_path / "clean" / "caption")
