"""Answers of models in this process under their JSON schema: validity at any budget, unchanged good answers, unreadable tokenizers."""

import json
import warnings

import pytest
import torch
from annotate_stub import caption_config, rows_of, write_catalog
from PIL import Image
from test_annotate_huggingface import llava, requests, text_model, tokenizer  # noqa: F401 - two of them are fixtures
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmsid.annotate.caption import run as run_caption
from mmsid.annotate.decoding import in_values
from mmsid.annotate.generator import Request
from mmsid.annotate.huggingface import HuggingFaceGenerator
from mmsid.annotate.interests import InterestsConfig
from mmsid.annotate.interests import run as run_interests
from mmsid.annotate.record_outline import TEXT_TOKENS, Outline
from mmsid.annotate.records import Caption, Interests, Judgement, parse_caption, parse_interests, parse_judgement
from mmsid.annotate.structured_output import JsonConstraint, UnreadableTokenizerError
from mmsid.artifacts import read_manifest
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.catalog.demo import write_demo_catalog
from mmsid.errors import AnnotationError, ConfigError

SYNTAX = {"invalid_json", "truncated", "not_an_object", "extra_field", "missing_field", "wrong_type", "text_too_long", "duplicate_key"}
SYNTAX |= {"too_many_descriptors", "no_descriptors", "number_out_of_range", "control_character", "empty_output", "not_finite"}


def written(constraint: JsonConstraint, choose, budget: int) -> tuple[str, bool]:
    """The answer of a model whose scores are `choose(step)`, and whether it was cut short."""
    answer = constraint.answer()
    for step in range(budget):
        scores = choose(step)
        answer.next_token(int(scores.argmax()), scores)
        if answer.complete:
            return answer.text(), answer.cut_short
    raise AssertionError(f"no end after {budget} tokens: {answer.text()!r}")


@pytest.mark.parametrize(
    "record, parse, budgets",
    [(Caption, parse_caption, (40, 90, 256)), (Interests, parse_interests, (110, 200, 384)), (Judgement, parse_judgement, (16,))],
)
def test_random_scores_give_a_valid_record_at_any_budget(record, parse, budgets):
    words = tokenizer()
    for budget in budgets:
        constraint = JsonConstraint(words, record.model_json_schema(), budget)
        for seed in range(4):
            noise = torch.Generator().manual_seed(seed)
            text, _ = written(constraint, lambda step, noise=noise: 3 * torch.randn(len(words), generator=noise), budget)
            try:
                parse(text)
            except AnnotationError as error:
                assert error.reason not in SYNTAX, (text, error)


@pytest.mark.parametrize("letter", ["a", "\\", "é", " "])
def test_a_model_that_never_ends_a_text_is_cut_within_its_budget_and_says_so(letter):
    words = tokenizer()
    stubborn = torch.zeros(len(words))
    for part, token in enumerate(words.encode(letter, add_special_tokens=False)):
        stubborn[token] = 9.0 + part  # a character of two bytes: its second byte is wanted most
    constraint = JsonConstraint(words, Interests.model_json_schema(), 150)
    text, cut_short = written(constraint, lambda step: stubborn, 150)
    assert cut_short
    record = json.loads(text)
    assert record["descriptors"] and len(record["summary"]) >= 1


def test_good_json_is_not_touched_in_any_usual_layout():
    words = tokenizer()
    constraint = JsonConstraint(words, Interests.model_json_schema(), 384)
    record = {
        "descriptors": [{"descriptor": 'a "wet" trail', "confidence": 0.85}, {"descriptor": "naïve", "confidence": 1}],
        "summary": "so",
    }
    for layout in ({}, {"indent": 2}, {"separators": (",", ":")}):
        text = json.dumps(record, ensure_ascii=False, **layout)
        ids = words.encode(text, add_special_tokens=False)
        wanted = torch.nn.functional.one_hot(torch.tensor(ids), len(words)).float()
        assert written(constraint, lambda step, wanted=wanted: wanted[step], 384) == (text, False)


def test_a_refused_token_is_replaced_by_its_allowed_beginning():
    words = tokenizer()
    words.add_tokens(['"}', "```json"])
    ids = [*words.encode('{"descriptors": [{"descriptor": "a', add_special_tokens=False), words.convert_tokens_to_ids('"}')]
    constraint = JsonConstraint(words, Interests.model_json_schema(), 384)
    answer = constraint.answer()
    for token in ids:
        answer.next_token(token, torch.nn.functional.one_hot(torch.tensor(token), len(words)).float())
    assert answer.text().endswith('"a"')  # the text is closed, although the record goes on


@pytest.mark.parametrize(
    "text, rest",
    [
        ("", ['{"descriptors":[{"descriptor":"', TEXT_TOKENS, '","confidence":', 4, '}],"summary":"', TEXT_TOKENS, '"}']),
        ('{"descriptors": [{"descriptor": "a', ['","confidence":', 4, '}],"summary":"', TEXT_TOKENS, '"}']),
        ('{"descriptors": [{"descriptor": "a", "confidence": 0.', [2, '}],"summary":"', TEXT_TOKENS, '"}']),
        ('{"descriptors": [{"descriptor": "a", "confidence": 0.9', ['}],"summary":"', TEXT_TOKENS, '"}']),
        (
            '{"descriptors": [{"descriptor": "a", "confidence": 1}, ',
            ['{"descriptor":"', 16, '","confidence":', 4, '}],"summary":"', 16, '"}'],
        ),
        ('{"descriptors": [{"descriptor": "a", "confidence": 1}]\n, "summ', ['ary":"', TEXT_TOKENS, '"}']),
        ('{"descriptors": [{"descriptor": "a", "confidence": 1}], "summary": "\\"', ['"}']),
        ('{"descriptors": [{"descriptor": "a", "confidence": 1}], "summary": "b"}', []),
    ],
)
def test_the_outline_names_the_shortest_completion(text, rest):
    outline = Outline(Interests.model_json_schema(), len)
    assert outline.rest(text) == rest
    assert outline.cost(rest) == sum(part if isinstance(part, int) else len(part) for part in rest)
    completed = text + "".join("0.85"[-part:] if isinstance(part, int) and part < TEXT_TOKENS else str(part) for part in rest)
    assert set(json.loads(completed)) == {"descriptors", "summary"}


def test_only_values_count_for_the_confidence():
    pieces = [b'{"', b"caption", b'": ', b'"a', b" red", b' shoe"', b', "n": ', b"0.5", b"}"]
    assert in_values(pieces) == [False, False, False, True, True, True, False, True, False]


def test_random_weights_finish_the_stages_with_valid_json_alone(llava, text_model, tmp_path):  # noqa: F811
    catalog = write_catalog(tmp_path / "catalog", items=8)
    options = {"max_quarantined": 1.0, "retries": 0}
    captions = run_caption(caption_config(catalog, tmp_path / "caption", model=llava, max_new_tokens=80, **options))
    config = InterestsConfig(
        out=tmp_path / "interests", catalog=catalog, captions=captions, model=text_model, max_new_tokens=160, **options
    )
    for folder, stage in ((captions, "caption"), (run_interests(config), "interests")):
        rows = rows_of(folder, stage)
        assert not {row["reason"] for row in rows} & SYNTAX
        assert sum(row["status"] == "ok" for row in rows) >= 5
        assert read_manifest(folder)["extra"]["constrained"] is True
        random = [row for row in rows if row["status"] == "ok"]
        assert all(row["log_probability"] < -0.1 for row in random)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_constrained_answers_do_not_depend_on_the_batch(llava, temperature):  # noqa: F811
    generator = HuggingFaceGenerator(llava, max_new_tokens=64, schema=Caption.model_json_schema())
    batch = requests(True, temperature)
    alone = [generator.generate([request])[0] for request in batch]
    together = generator.generate(batch)
    assert together == alone and len(set(alone)) == len(batch)
    assert [answer.log_probability for answer in together] == pytest.approx([answer.log_probability for answer in alone], abs=1e-4)
    assert all(parse_caption(answer) for answer in alone)


def test_the_demo_model_answers_as_without_the_schema(tmp_path):
    items = write_demo_catalog(tmp_path / "ads", items=12, users=0, seed=3) / "items.parquet"
    pictures = [Image.open(path).convert("RGB") for item in read_catalog(CatalogConfig(items=items)).items for path in item.images]
    for record, prompt in ((Caption, "Describe this ad as JSON."), (Interests, "Name the interests behind this ad as JSON.")):
        asked = [Request(prompt, (picture,)) for picture in pictures]
        free = HuggingFaceGenerator("demo", max_new_tokens=256).generate(asked)
        held = HuggingFaceGenerator("demo", max_new_tokens=256, schema=record.model_json_schema()).generate(asked)
        assert held == free
        assert not any(answer.cut_short for answer in held)


def test_a_budget_below_the_shortest_record_is_an_error_with_the_number(llava):  # noqa: F811
    generator = HuggingFaceGenerator(llava, max_new_tokens=20, schema=Caption.model_json_schema())
    with pytest.raises(ConfigError, match=r"max_new_tokens is 20, but the shortest answer needs (\d+) tokens"):
        generator.generate(requests()[:1])


def test_an_unreadable_tokenizer_leads_to_a_warning_and_free_answers(llava, monkeypatch, tmp_path):  # noqa: F811
    def unreadable(tokenizer):
        raise UnreadableTokenizerError("a kind from the future")

    monkeypatch.setattr("mmsid.annotate.structured_output.readable_tokenizer", unreadable)
    catalog = write_catalog(tmp_path / "catalog", items=3)
    config = caption_config(catalog, tmp_path / "caption", model=llava, max_new_tokens=40, max_quarantined=1.0, retries=0)
    with pytest.warns(UserWarning, match=r"llguidance cannot read its tokenizer \(a kind from the future\).*not held to the JSON schema"):
        out = run_caption(config)
    assert read_manifest(out)["extra"]["constrained"] is False
    assert {row["reason"] for row in rows_of(out)} <= SYNTAX  # random weights do not write JSON by themselves


def test_tokenizers_that_lose_characters_are_unreadable():
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "caption": 1}, unk_token="<unk>")), unk_token="<unk>", eos_token="<unk>"
    )
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with warnings.catch_warnings(), pytest.raises(UnreadableTokenizerError):
        JsonConstraint(words, Caption.model_json_schema(), 64)
    with pytest.raises(UnreadableTokenizerError, match="not a fast tokenizer"):
        JsonConstraint(object(), Caption.model_json_schema(), 64)
