"""Answers of which the model is not sure, answers that repeat the prompt, and what becomes of them in the rows and messages."""

import json

import numpy as np
import pytest
from annotate_stub import StubGenerator, caption_config, rows_of, write_catalog

from mmsid.annotate.caption import run as run_caption
from mmsid.annotate.confidence import ANY_MODEL, DEMO_MODEL
from mmsid.annotate.generator import Answer, Request
from mmsid.annotate.interests import InterestsConfig
from mmsid.annotate.interests import run as run_interests
from mmsid.annotate.prompts import load_prompt
from mmsid.annotate.text_flags import echoes_prompt
from mmsid.artifacts import read_manifest
from mmsid.catalog import CatalogConfig
from mmsid.catalog.demo import write_demo_catalog
from mmsid.errors import AnnotationError


class Unsure(StubGenerator):
    """A captioner that is unsure of pictures whose first pixel is odd."""

    constrained = True

    def _answer(self, request: Request) -> str:
        text = super()._answer(request)
        odd = request.pictures[0].getpixel((0, 0))[0] % 2
        return Answer(text, log_probability=-1.5 if odd else -0.25, cut_short=bool(odd))


def test_an_unsure_answer_is_flagged_counted_and_stored_with_its_probability(tmp_path, capsys):
    catalog = write_catalog(tmp_path / "catalog", items=8)
    config = caption_config(catalog, tmp_path / "caption", model="some/hub", cache=tmp_path / "cache.sqlite")
    rows = rows_of(run_caption(config, Unsure()))
    assert {row["log_probability"] for row in rows} == {-1.5, -0.25}
    assert all(row["status"] == "ok" for row in rows)
    unsure = [row for row in rows if "low_confidence" in row["flags"]]
    assert [row["log_probability"] for row in unsure] == [-1.5] * len(unsure) and unsure
    assert all("cut_short" in row["flags"] for row in unsure)
    assert f"{len(unsure)} ok rows flagged low_confidence" in capsys.readouterr().err.replace("\n", " ")
    extra = read_manifest(config.out)["extra"]
    assert extra["flags"]["low_confidence"] == len(unsure) and extra["constrained"] is True
    again = Unsure()
    second = run_caption(config.model_copy(update={"out": tmp_path / "again"}), again)
    assert rows_of(second) == rows and again.num_requests == 0  # the cache keeps flags and probabilities


def test_a_plain_answer_has_no_probability_and_no_flag(tmp_path):
    rows = rows_of(run_caption(caption_config(write_catalog(tmp_path / "catalog", items=3), tmp_path / "caption"), StubGenerator()))
    assert all(row["log_probability"] is None and row["flags"] == [] for row in rows)


def test_the_demo_model_refuses_pictures_that_are_no_drawn_ads(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=6)  # plain cards of one colour
    config = caption_config(catalog, tmp_path / "caption", model="demo", max_new_tokens=96)
    with pytest.raises(AnnotationError, match=r"low_confidence 7 \(`demo` reads drawn demo ads only .*name another model"):
        run_caption(config)
    rows = rows_of(run_caption(config.model_copy(update={"max_quarantined": 1.0})))
    assert {(row["status"], row["reason"]) for row in rows} == {("quarantined", "low_confidence")}
    assert all(row["attempts"] == ["low_confidence"] for row in rows)  # asking again would not make the model surer
    assert all(row["log_probability"] < DEMO_MODEL.least and 'It wrote: {"caption"' in row["rejected"] for row in rows)


def test_the_demo_model_keeps_drawn_ads(tmp_path):
    items = write_demo_catalog(tmp_path / "ads", items=24, users=0, seed=5) / "items.parquet"
    for stage, run, config in (
        ("caption", run_caption, caption_config(CatalogConfig(items=items), tmp_path / "caption", model="demo", batch_size=16)),
        ("interests", run_interests, InterestsConfig(out=tmp_path / "interests", catalog=CatalogConfig(items=items), model="demo")),
    ):
        rows = rows_of(run(config), stage)
        assert sum(row["status"] == "ok" for row in rows) >= len(rows) - 1
        assert np.median([row["log_probability"] for row in rows]) > -0.01


def test_a_server_model_that_is_named_demo_is_any_model(tmp_path):
    from mmsid.annotate.caption import confidence_of

    catalog = write_catalog(tmp_path / "catalog", items=1)
    server = {"generator": "openai", "server": {"base_url": "http://127.0.0.1:1/v1"}}
    assert confidence_of(caption_config(catalog, tmp_path, model="demo", **server)) is ANY_MODEL
    assert confidence_of(caption_config(catalog, tmp_path, model="demo")) is DEMO_MODEL


@pytest.mark.parametrize(
    "text", ["<text>", "trail running in wet weather", "Trail running in wet weather.", "Health", "nice things", "...", "[...]"]
)
def test_placeholders_and_words_of_the_prompt_are_echoes(text):
    prompt = load_prompt("interests").text
    assert echoes_prompt([text], prompt, "")
    assert echoes_prompt(["a fast bicycle", text], prompt, "")


@pytest.mark.parametrize("text", ["trail running shoes", "a gift for a new job", "mountain hikes", "健康的跑步"])
def test_own_words_are_no_echoes(text):
    assert not echoes_prompt([text], load_prompt("interests").text, "")


def test_words_of_the_evidence_are_no_echoes():
    prompt = load_prompt("interests").text
    assert not echoes_prompt(["trail running in wet weather"], prompt, '{"title": "Shoe for trail running in wet weather"}')
    assert not echoes_prompt(["Health"], prompt, '{"title": "Health monitor"}')


class Parrot(StubGenerator):
    """A miner that repeats the prompt's example for every second item, unless it is sampled and `repeats` is False."""

    def __init__(self, repeats: bool) -> None:
        super().__init__()
        self.repeats = repeats

    def _answer(self, request: Request) -> str:
        echo = '"thing number 1"' in request.prompt and (self.repeats or request.temperature == 0)
        descriptor = "trail running in wet weather" if echo else "counting things"
        return json.dumps({"descriptors": [{"descriptor": descriptor, "confidence": 0.9}], "summary": "people who count"})


@pytest.mark.parametrize("repeats, attempts", [(False, ["prompt_example", "ok"]), (True, ["prompt_example", "prompt_example"])])
def test_an_echo_is_asked_again_and_then_quarantined(tmp_path, repeats, attempts):
    catalog = write_catalog(tmp_path / "catalog", items=4)
    config = InterestsConfig(out=tmp_path / "interests", catalog=catalog, model="some/hub", max_quarantined=0.5)
    rows = {row["item_id"]: row for row in rows_of(run_interests(config, Parrot(repeats)), "interests")}
    assert rows["i1"]["attempts"] == attempts
    assert (rows["i1"]["status"], rows["i1"]["reason"]) == (("quarantined", "prompt_example") if repeats else ("ok", None))
    assert all(row["attempts"] == ["ok"] for name, row in rows.items() if name != "i1")
