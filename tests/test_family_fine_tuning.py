"""LoRA fine-tuning of eight families of vision-language models on captions: labels, training, and the model that is saved."""

import pytest
import torch
from annotate_stub import write_catalog
from tiny_families import FAMILIES, picture, qwen3_vl

from mmsid.annotate.captioner.config import LoraSection, Phase, TrainCaptionerConfig
from mmsid.annotate.captioner.lora import conversation_batch
from mmsid.annotate.captioner.model import ModelSizes
from mmsid.annotate.captioner.stage import run
from mmsid.annotate.generator import Request
from mmsid.annotate.huggingface import HuggingFaceGenerator
from mmsid.artifacts import read_manifest
from mmsid.backbone.chat import ChatFormat
from mmsid.backbone.processors import load_processor
from mmsid.errors import ConfigError

ANSWERS = ['{"caption": "a red mug"}', '{"caption": "a very large blue mug on a table"}']


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory) -> str:
    return FAMILIES[request.param](tmp_path_factory.mktemp("family") / request.param)


def test_labels_are_the_answers_and_the_prompt_is_that_of_generation(family):
    chat = ChatFormat(load_processor(family), family)
    pictures = [picture(0, 200, 120), picture(1, 60, 90)]
    batch = conversation_batch(chat, pictures, ["Describe.", "Describe it as JSON."], ANSWERS)
    for row, answer in enumerate(ANSWERS):
        labels = batch["labels"][row]
        assert chat.tokenizer.decode(labels[labels >= 0], skip_special_tokens=True).strip() == answer
        assert int(labels[labels >= 0][-1]) == chat.tokenizer.eos_token_id or chat.tokenizer.eos_token in chat.tokenizer.decode(
            labels[labels >= 0]
        )
        prompt = chat.tokens(chat.prompt(["Describe.", "Describe it as JSON."][row], 1), [pictures[row]])["input_ids"][0]
        assert torch.equal(batch["input_ids"][row, : len(prompt)], prompt)
        assert (labels[: len(prompt)] < 0).all() and labels[len(prompt)] >= 0


@pytest.mark.slow
def test_fine_tuning_learns_and_the_saved_model_captions(family, tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=10)
    config = TrainCaptionerConfig(
        out=tmp_path / "tuned", catalog=catalog, base_model=family, caption_template="a {title}", fields=("title",), digit_fields=(),
        interest_share=0.0, sizes=ModelSizes(image_size=48), lora=LoraSection(rank=4), evaluate_pictures=2,
        captioning=Phase(steps=6, batch_size=4, warmup_steps=1, adamw_lr=2e-2),
    )  # fmt: skip
    run(config)
    figures = read_manifest(config.out, "train_captioner")["extra"]["phases"]["captioning"]
    assert figures["steps"] == 6 and 0 < figures["last_loss"] < 20
    tuned, base = (HuggingFaceGenerator(name, max_new_tokens=6) for name in (config.out, family))
    before, after = (generator.model.state_dict() for generator in (base, tuned))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all("_proj" in name and "vis" not in name for name in changed)
    request = Request("Describe this ad.", (picture(0, 80, 60),))
    assert isinstance(tuned.generate([request])[0], str)


def test_a_template_without_an_answer_is_refused(tmp_path):
    folder = tmp_path / "deaf"
    qwen3_vl(folder)
    template = "{% for m in messages if m['role'] == 'user' %}<|image_pad|>{{ m['content'][-1]['text'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    chat = ChatFormat(load_processor(folder), "deaf")
    with pytest.raises(ConfigError, match="shows no answer of an assistant"):
        conversation_batch(chat, [picture(0, 64, 64)], ["Describe."], ANSWERS[:1])
