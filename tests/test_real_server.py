"""The server generator against llama.cpp with SmolLM2: answers, the schema, and a server that dies in the middle of a job."""

from __future__ import annotations

import json
import threading
import time

import pytest
from llama_server import LlamaServer

from mmsid.annotate import interests, server
from mmsid.annotate.generator import Request
from mmsid.annotate.readers import read_rows
from mmsid.annotate.server import OpenAIGenerator
from mmsid.annotate.server_config import ServerConfig
from mmsid.artifacts import read_manifest
from mmsid.errors import ConfigError

pytestmark = pytest.mark.real_model

SHORT = "Name the interests that this product serves, as JSON.\n{{evidence}}\n"
TITLES = ["steel wool", "garden trowel", "wood glue", "safety gloves", "digital thermometer", "label printer", "cable ties", "syringe"]


@pytest.fixture(scope="module")
def llama(smollm2_gguf):
    pytest.importorskip("xllamacpp", reason="no llama.cpp: pip install xllamacpp")
    with LlamaServer(smollm2_gguf, slots=2) as running:
        yield running


def config(llama, folder, **options) -> interests.InterestsConfig:
    (folder / "items.jsonl").write_text("\n".join(json.dumps({"item_id": f"i{at}", "title": title}) for at, title in enumerate(TITLES)))
    (folder / "short.md").write_text(SHORT)
    treat = {"base_url": llama.url, "concurrency": 2, "json_schema": True} | options.pop("treat", {})
    given = {"generator": "openai", "model": llama.model.name, "server": treat, "prompt": str(folder / "short.md"), "batch_size": 2}
    given |= {"max_new_tokens": 64, "retries": 0, "max_quarantined": 1.0, "shard_rows": 4}
    return interests.InterestsConfig(out=folder / "interests", catalog={"items": folder / "items.jsonl"}, **given | options)


def test_a_real_server_answers_holds_the_token_limit_and_says_how_sure_it_is(llama):
    generator = OpenAIGenerator(llama.model.name, ServerConfig(base_url=llama.url), max_new_tokens=12)
    sure, long = generator.generate([Request("What is the capital of France? Answer in one sentence."), Request("Write a long story.")])
    assert sure == "The capital of France is Paris."
    assert -1.0 < sure.log_probability < 0.0
    assert 4 < len(long.split()) < 15
    assert generator.take_notes() == {f"answered_by {llama.model}": 2}
    generator.close()


def test_the_number_bounds_that_a_real_server_does_not_hold_are_counted(llama):
    schema = {
        "type": "object",
        "properties": {"confidence": {"type": "number", "minimum": 0, "maximum": 1}},
        "required": ["confidence"],
        "additionalProperties": False,
    }
    treat = ServerConfig(base_url=llama.url, json_schema=True)
    generator = OpenAIGenerator(llama.model.name, treat, max_new_tokens=40, schema=schema)
    answers = generator.generate([Request(f"How sure are you, in percent, that {two} is 4? Answer as JSON.") for two in ("2+2", "3+1")])
    generator.close()
    values = [json.loads(answer) for answer in answers]
    assert all(set(value) == {"confidence"} for value in values)  # the shape is held
    outside = sum(not 0 <= value["confidence"] <= 1 for value in values)
    assert (notes := generator.take_notes())["schema_broken"] == outside and notes["schema_held"] == 2 - outside


def test_a_model_that_a_real_server_does_not_have_stops_the_job(llama, tmp_path):
    with pytest.raises(ConfigError, match=r"has no model 'Qwen3-8B' .*answered instead; it lists"):
        interests.run(config(llama, tmp_path, model="Qwen3-8B"))


def test_a_server_that_is_killed_and_restarted_in_the_middle_costs_no_row(llama, tmp_path, monkeypatch):
    answered, third = [], threading.Event()

    def read(body):
        answered.append(time.monotonic())
        if len(answered) == 3:
            third.set()
        return read_answer(body)

    def restart() -> None:
        assert third.wait(120)
        llama.kill()
        killed.append(time.monotonic())
        time.sleep(1.0)
        llama.start()

    read_answer, killed = server.read_answer, []
    monkeypatch.setattr(server, "read_answer", read)
    thread = threading.Thread(target=restart)
    thread.start()
    out = interests.run(config(llama, tmp_path))
    thread.join()
    rows = list(read_rows(out, "interests"))
    assert sorted(row["item_id"] for row in rows) == [f"i{at}" for at in range(len(TITLES))]
    assert not [row["reason"] for row in rows if (row["reason"] or "").startswith("server")]
    assert sum(at > killed[0] for at in answered) >= len(TITLES) - 4  # most rows were made by the second server
    assert read_manifest(out)["extra"]["work"]["generated"] == len(TITLES)
