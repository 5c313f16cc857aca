"""Caption and interests from one request: `caption.with_interests`, taken over by `interests.generator: captions`."""

import json

import pytest
from annotate_stub import StubGenerator, caption_config, rows_of, write_catalog

from mmsid.annotate.caption import run as run_caption
from mmsid.annotate.generator import Answer, Request
from mmsid.annotate.interests import InterestsConfig
from mmsid.annotate.interests import run as run_interests
from mmsid.annotate.readers import read_captions, read_interests
from mmsid.annotate.reannotate import reannotate
from mmsid.artifacts import read_manifest
from mmsid.errors import AnnotationError, ConfigError


class Joint(StubGenerator):
    """A model that answers with both texts; `broken` as in `StubGenerator`."""

    constrained = True

    def _answer(self, request: Request) -> str:
        text = super()._answer(request)
        if "caption" not in text:
            return text
        colour = request.pictures[0].getpixel((0, 0))
        descriptors = [{"descriptor": f"need of colour {colour[0]}", "confidence": 0.75}, {"descriptor": "plain cards", "confidence": 0.5}]
        return Answer(json.dumps({**json.loads(text), "descriptors": descriptors, "summary": "who likes it"}), log_probability=-0.5)


@pytest.fixture
def catalog(tmp_path):
    return write_catalog(tmp_path / "catalog", items=10)


def joint_captions(catalog, out, generator=None, **options):
    return run_caption(caption_config(catalog, out, model="some/hub", with_interests=True, **options), generator or Joint())


def test_one_answer_gives_the_rows_of_both_stages(catalog, tmp_path):
    model = Joint()
    captions = joint_captions(catalog, tmp_path / "caption", model)
    assert model.num_requests == 12  # one per creative
    prompts = [request.prompt for call in model.calls for request in call]
    assert all('"title": "thing number' in prompt and '{"caption": "<your description>", "descriptors"' in prompt for prompt in prompts)
    assert read_manifest(captions)["config"]["max_new_tokens"] == 512
    folder = run_interests(InterestsConfig(out=tmp_path / "interests", catalog=catalog, generator="captions", captions=captions))
    rows = rows_of(folder, "interests")
    assert [row["status"] for row in rows] == ["ok"] * 10
    assert {row["model_id"] for row in rows} == {"stub@0"} and {row["source"] for row in rows} == {"llm"}
    assert {row["log_probability"] for row in rows} == {-0.5}
    assert read_manifest(folder)["extra"]["constrained"] is True
    mined, texts = read_interests(folder), read_captions(captions)
    assert len(mined) == 10 and texts["i4"].count(" ; ") == 1
    assert mined["i4"].descriptors[0].descriptor == "need of colour 28"  # of the first creative
    assert mined["i4"].descriptors[0].confidence == 0.75 and mined["i4"].summary == "who likes it"


def test_the_first_usable_creative_counts_and_items_without_one_are_not_asked(catalog, tmp_path):
    def broken(colour, sampled):
        return "no JSON" if colour in ((28, 124, 0), (7, 31, 0)) else None  # the first creative of i4, the only one of i1

    captions = joint_captions(catalog, tmp_path / "caption", Joint(broken), max_quarantined=0.5, retries=0)
    config = InterestsConfig(out=tmp_path / "interests", catalog=catalog, generator="captions", captions=captions, max_quarantined=0.0)
    rows = {row["item_id"]: row for row in rows_of(run_interests(config), "interests")}
    assert rows["i4"]["status"] == "ok"
    assert (rows["i1"]["status"], rows["i1"]["reason"]) == ("quarantined", "invalid_json")


def test_an_answer_with_equal_descriptors_is_rejected_like_interests(catalog, tmp_path):
    class Twice(Joint):
        def _answer(self, request: Request) -> str:
            answer = json.loads(super()._answer(request))
            return json.dumps(answer | {"descriptors": answer["descriptors"][:1] * 2})

    with pytest.raises(AnnotationError, match="duplicate_descriptor"):
        joint_captions(catalog, tmp_path / "caption", Twice())


def test_captions_alone_cannot_be_taken_over(catalog, tmp_path):
    captions = run_caption(caption_config(catalog, tmp_path / "caption"), StubGenerator())
    with pytest.raises(ConfigError, match=r"holds captions alone; set caption\.with_interests: true"):
        run_interests(InterestsConfig(out=tmp_path / "interests", catalog=catalog, generator="captions", captions=captions))
    with pytest.raises(ConfigError, match=r"needs interests\.captions"):
        run_interests(InterestsConfig(out=tmp_path / "interests", catalog=catalog, generator="captions"))


def test_a_second_model_for_interests_that_exist_is_told(catalog, tmp_path):
    captions = joint_captions(catalog, tmp_path / "caption")

    class Miner(StubGenerator):
        def _answer(self, request: Request) -> str:
            return json.dumps({"descriptors": [{"descriptor": "a need", "confidence": 0.5}], "summary": "who needs it"})

    config = InterestsConfig(out=tmp_path / "interests", catalog=catalog, model="some/hub", captions=captions)
    with pytest.warns(UserWarning, match=r"holds interests already.*interests\.generator: captions"):
        run_interests(config, Miner())


def test_the_small_captioners_are_refused(catalog, tmp_path):
    with pytest.raises(ValueError, match="with_interests: demo is a small captioner"):
        caption_config(catalog, tmp_path / "caption", with_interests=True)


def test_another_catalogue_is_annotated_in_one_pass_as_well(catalog, tmp_path, monkeypatch):
    captions = joint_captions(catalog, tmp_path / "caption")
    mined = run_interests(InterestsConfig(out=tmp_path / "interests", catalog=catalog, generator="captions", captions=captions))
    monkeypatch.setattr("mmsid.annotate.caption.build_generator", lambda config, record: Joint())
    other = write_catalog(tmp_path / "other", items=4)
    new_captions, new_mined = reannotate(captions, mined, other, tmp_path / "new")
    assert len(read_captions(new_captions)) == len(read_interests(new_mined)) == 4
