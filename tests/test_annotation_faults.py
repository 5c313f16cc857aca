"""Faults of annotation that must not end a job or pass silently: missing captions, early failure, refused pictures, other processes."""

import json

import pytest
from annotate_stub import StubGenerator, caption_config, rows_of, write_catalog
from chat_server import ChatServer

from mmsid.annotate.caption import run
from mmsid.artifacts import read_manifest
from mmsid.errors import AnnotationError


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return write_catalog(tmp_path_factory.mktemp("catalog"))


# answers


def test_reasoning_and_line_breaks_around_and_in_an_answer_cost_no_row(catalog, tmp_path):
    class Chatty(StubGenerator):
        def _answer(self, request):
            caption = json.loads(super()._answer(request))["caption"]
            return "<think>A card.\nIt is plain.</think>\nHere is the caption:\n```json\n" + f'{{"caption": "{caption}\nSALE"}}\n```'

    rows = rows_of(run(caption_config(catalog, tmp_path / "caption"), Chatty()))
    assert all(row["status"] == "ok" and row["attempts"] == ["ok"] and row["caption"].endswith(") SALE") for row in rows)


def test_a_model_that_only_reasons_is_asked_once_per_row_and_the_remedy_is_named(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=3)
    with ChatServer(StubGenerator()._answer, share=1.0, faults=["reasoning"]) as server:
        server_options = {"base_url": server.url, "concurrency": 2}
        options = {"generator": "openai", "model": "m", "prompt": "caption_demo", "server": server_options, "retries": 2}
        with pytest.raises(AnnotationError, match=r"reasoning_only 3 \(.*characters of reasoning and no answer.*raise max_new_tokens"):
            run(caption_config(catalog, tmp_path / "caption", **options))
    assert len(server.seen) == 3


# acceptance


def test_pictures_that_the_catalogue_refused_do_not_count_against_the_model(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=20)
    for at in range(0, 20, 2):
        (catalog.items.parent / "images" / f"{at}_0.png").unlink()
    out = run(caption_config(catalog, tmp_path / "caption", max_quarantined=0.0), StubGenerator())
    manifest = read_manifest(out)
    assert manifest["counts"] == {"in": 24, "ok": 14, "quarantined": 10}
    assert manifest["extra"]["gate"] == {"passed": True, "attempted": 14, "failed": 0, "not_asked": 10, "max_quarantined": 0.0}


def test_a_job_stops_after_200_asked_rows_when_most_of_them_fail(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=400)

    def broken(colour, sampled):
        return ("I see a card.", "I'm sorry, I cannot help with that.")[colour[0] % 2] if colour[1] > 60 else None

    config = caption_config(catalog, tmp_path / "caption", shard_rows=1_000)
    generator = StubGenerator(broken)
    with pytest.raises(AnnotationError) as raised:
        run(config, generator)
    assert generator.num_requests <= 2 * 200, "the other 280 rows are not asked"
    message = str(raised.value)
    assert "of the first 200 rows that the model was asked for failed" in message
    assert "invalid_json" in message and "(I see a card.)" in message and "(I'm sorry, I cannot help with that.)" in message

    share = json.loads((tmp_path / ".caption.draft" / "gate.json").read_text())["gate"]["failed"] / 200
    patient = StubGenerator(broken)
    out = run(caption_config(catalog, tmp_path / "caption", shard_rows=1_000, max_quarantined=share + 0.1), patient)
    assert read_manifest(out)["counts"]["in"] == 480, "a raised limit lets the job go on"


def test_early_failures_that_the_second_attempt_repairs_do_not_stop_the_job(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=300)
    generator = StubGenerator(lambda colour, sampled: None if sampled else "no JSON")
    assert read_manifest(run(caption_config(catalog, tmp_path / "caption"), generator))["counts"]["ok"] == 360


def test_a_raised_limit_accepts_the_draft_without_asking_again(catalog, tmp_path):
    broken = StubGenerator(lambda colour, sampled: "no JSON" if colour[0] < 49 else None)
    with pytest.raises(AnnotationError, match=r"8 of 28 attempted .* invalid_json 8 \(no JSON\)"):
        run(caption_config(catalog, tmp_path / "caption"), broken)
    second = StubGenerator()
    out = run(caption_config(catalog, tmp_path / "caption", max_quarantined=0.5, batch_size=7, cache=tmp_path / "cache.sqlite"), second)
    assert second.num_requests == 0
    assert read_manifest(out)["counts"] == {"in": 28, "ok": 20, "quarantined": 8}
    assert "max_quarantined" not in read_manifest(out)["config"]
