"""What real OpenAI-compatible servers do with a request beyond its text: each manner once, on a loopback server."""

import json
import time

import pytest
from annotate_stub import caption_config, rows_of, write_catalog
from chat_server import ChatServer

from mmsid.annotate.caption import run
from mmsid.annotate.generator import GenerationFailure, Request
from mmsid.annotate.interests import InterestsConfig
from mmsid.annotate.interests import run as mine
from mmsid.annotate.server import OpenAIGenerator
from mmsid.annotate.server_checks import same_model
from mmsid.annotate.server_config import ServerConfig
from mmsid.annotate.server_wire import error_words
from mmsid.artifacts import read_manifest
from mmsid.errors import AnnotationError, ConfigError

GOOD = json.dumps({"descriptors": [{"descriptor": "a gift for a gardener", "confidence": 0.5}], "summary": "For people who garden."})
WIDE = json.dumps({"descriptors": [{"descriptor": "a gift for a gardener", "confidence": 5}], "summary": "For people who garden."})


def answered(server: ChatServer, texts=("one",), **options) -> list[str | GenerationFailure]:
    treat = {"concurrency": 1} | options.pop("treat", {})
    generator = OpenAIGenerator("m", ServerConfig(base_url=server.url, **treat), **options)
    try:
        return generator.generate([Request(text) for text in texts])
    finally:
        generator.close()


def limits(server: ChatServer) -> list[str]:
    return [name for _, body in server.seen for name in ("max_tokens", "max_completion_tokens") if name in body]


def refusing(status: int, message: str):
    return lambda body, reply: (status, {"error": {"message": message, "type": "invalid_request_error"}})


def interests(server: ChatServer, folder, *, treat=None, **options):
    catalog = write_catalog(folder, items=6)
    treat = {"base_url": server.url, "concurrency": 2} | (treat or {})
    return InterestsConfig(out=folder / "interests", catalog=catalog, generator="openai", model="m", server=treat, **options)


def test_a_request_without_picture_is_plain_text():
    with ChatServer(lambda request: request.prompt) as server:
        assert answered(server, ["say this"], system_prompt="Be brief.", template_arguments={"enable_thinking": False}) == ["say this"]
    ((_, body),) = server.seen
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say this"}]
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


def test_system_prompt_and_template_arguments_are_part_of_the_cache_key_only_where_they_are_set():
    config = ServerConfig(base_url="http://x/v1")
    plain, asked = OpenAIGenerator("m", config).parameters, OpenAIGenerator("m", config, system_prompt="Be brief.").parameters
    assert asked == plain | {"system_prompt": "Be brief."} and "system_prompt" not in plain


def test_a_server_that_refuses_the_name_of_the_token_limit_gets_the_other_one_from_then_on():
    def newer(body, reply):
        if "max_tokens" not in body:
            return 200, reply
        return 400, {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}}

    with ChatServer(lambda request: request.prompt, dressed=newer) as server:
        assert answered(server, ["one", "two", "three"]) == ["one", "two", "three"]
    assert limits(server) == ["max_tokens", *["max_completion_tokens"] * 3]


def test_a_server_that_ignores_the_name_of_the_token_limit_gets_the_other_one_from_then_on():
    def counted(body, reply):
        return 200, reply | {"usage": {"completion_tokens": min(2_010, body.get("max_completion_tokens", 2_010))}}

    with ChatServer(lambda request: request.prompt, dressed=counted) as server:
        assert answered(server, ["one", "two", "three"], max_new_tokens=12) == ["one", "two", "three"]
    assert limits(server) == ["max_tokens", *["max_completion_tokens"] * 3]


def test_a_server_without_any_token_limit_is_reported_and_each_request_runs_once(tmp_path, recwarn):
    def endless(body, reply):
        return 200, reply | {"usage": {"completion_tokens": 2_010}}

    with ChatServer(lambda request: GOOD, dressed=endless) as server:
        out = mine(interests(server, tmp_path, max_new_tokens=12))
    assert len(server.seen) <= 6 + 2  # the requests that found out were sent under both names
    assert read_manifest(out)["extra"]["work"]["over_token_limit"] == 6
    assert any("6 answers are longer than max_new_tokens" in str(warning.message) for warning in recwarn)


def test_a_long_prompt_is_refused_once_under_each_name_and_the_next_row_is_answered():
    def short(body, reply):
        too_long = body["messages"][0]["content"] == "long"
        return (400, {"error": {"message": "max_tokens or max_completion_tokens is too large"}}) if too_long else (200, reply)

    with ChatServer(lambda request: request.prompt, dressed=short) as server:
        failure, good = answered(server, ["long", "short"])
    assert (failure.reason, good) == ("server_refused", "short")
    assert len(server.seen) == 3


def spelled(tokens: list[tuple[str, float]]):
    """A server that gives the log-probability of every token of its answer, if it is asked to."""

    def reply(body, answer):
        if body.get("logprobs"):
            answer["choices"][0]["logprobs"] = {
                "content": [{"token": token, "logprob": value, "bytes": list(token.encode())} for token, value in tokens]
            }
        return 200, answer

    return reply


def test_log_probabilities_of_the_texts_and_numbers_are_handed_on():
    tokens = [('{"', -9.0), ("caption", -9.0), ('": "', -9.0), ("a", -0.5), (" café", -1.5), ('", "n": ', -9.0), ("3", -4.0), ("}", -9.0)]
    with ChatServer(lambda request: "".join(token for token, _ in tokens), dressed=spelled(tokens)) as server:
        (answer,) = answered(server)
    assert answer == '{"caption": "a café", "n": 3}'
    assert answer.log_probability == pytest.approx(-2.0)
    assert (server.seen[0][1]["logprobs"], server.seen[0][1]["top_logprobs"]) == (True, 1)
    with ChatServer(lambda request: "plain words", dressed=spelled([("plain", -1.0), (" words", -3.0)])) as server:
        assert answered(server)[0].log_probability == pytest.approx(-2.0)


def test_a_server_that_refuses_log_probabilities_is_asked_without_them_from_then_on():
    def strict(body, reply):
        return (422, {"detail": "Unsupported fields: {'logprobs', 'top_logprobs'}"}) if "logprobs" in body else (200, reply)

    with ChatServer(lambda request: request.prompt, dressed=strict) as server:
        answers = answered(server, ["one", "two", "three"])
    assert answers == ["one", "two", "three"] and all(answer.log_probability is None for answer in answers)
    assert ["logprobs" in body for _, body in server.seen] == [True, False, False, False]


def test_an_error_that_answers_every_first_request_stops_the_job_with_the_servers_words(tmp_path):
    def broken(body, reply):
        return 500, {"error": {"message": f"content must be a string (request {id(body)}a)"}}

    with ChatServer(lambda request: GOOD, dressed=broken) as server:
        started = time.monotonic()
        told = r"answered the first 8 requests with the same error, 500: content must be a string"
        with pytest.raises(AnnotationError, match=told) as met:
            mine(interests(server, tmp_path, treat={"concurrency": 4}))
        assert time.monotonic() - started < 60.0
    assert met.value.reason == "server_broken"
    assert len(server.seen) <= 12


def attempts(server: ChatServer, monkeypatch, number: int) -> None:
    """Requests follow each other without a pause; after `number` of them the next one would come after its deadline."""
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0 if len(server.seen) < number else 1_000.0)


def test_errors_that_pass_are_waited_for(monkeypatch):
    with ChatServer(lambda request: request.prompt, dressed=refusing(503, "Loading model")) as server:
        attempts(server, monkeypatch, 40)
        failures = answered(server, ["one"] * 12, treat={"concurrency": 12})
        assert {failure.reason for failure in failures} == {"server_error"}
        assert all(failure.detail == "503: Loading model" for failure in failures)
    assert len(server.seen) >= 40


def test_errors_after_the_first_answer_are_failures_of_their_rows(monkeypatch):
    def poisoned(body, reply):
        return (500, {"error": "CUDA error"}) if body["messages"][0]["content"] == "bad" else (200, reply)

    with ChatServer(lambda request: request.prompt, dressed=poisoned) as server:
        attempts(server, monkeypatch, 20)
        answers = answered(server, ["good", "bad", "good"])
    assert (answers[0], answers[1].reason, answers[1].detail, answers[2]) == ("good", "server_error", "500: CUDA error", "good")
    assert len(server.seen) == 21


@pytest.mark.parametrize(
    "status, message, models",
    [
        (404, "The model `m` does not exist.", ["served-model"]),
        (400, "model 'm' not found", None),
        (400, "Bad Request", ["served-model"]),
        (422, "unknown model: m", ["served-model"]),
    ],
)
def test_a_model_that_the_server_does_not_have_stops_the_job_whatever_the_status(tmp_path, status, message, models):
    with (
        ChatServer(lambda request: GOOD, models=models, dressed=refusing(status, message)) as server,
        pytest.raises(ConfigError, match=r"has no model 'm'.*correct model or server\.base_url") as met,
    ):
        mine(interests(server, tmp_path))
    assert message in str(met.value) and ("it lists 'served-model'" if models else "it lists no models") in str(met.value)


def test_another_model_that_answers_stops_the_job_unless_the_server_lists_the_name(tmp_path):
    def loaded(body, reply):
        return 200, reply | {"model": "whatever-is-loaded"}

    with (
        ChatServer(lambda request: GOOD, models=["whatever-is-loaded"], dressed=loaded) as server,
        pytest.raises(ConfigError, match=r"has no model 'm' .'whatever-is-loaded' answered instead; it lists 'whatever-is-loaded'"),
    ):
        mine(interests(server, tmp_path))
    with ChatServer(lambda request: GOOD, models=["m", "n"], dressed=loaded) as server:  # a proxy: m is its name for that model
        out = mine(interests(server, tmp_path / "proxy"))
    assert read_manifest(out)["extra"]["work"]["answered_by whatever-is-loaded"] == 6


@pytest.mark.parametrize(
    "asked, answered_by, same",
    [
        ("gpt-4o", "gpt-4o-2026-08-06", True),
        ("Qwen/Qwen3-4B", "qwen3-4b", True),
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B@main", True),
        ("smollm2", "/models/SmolLM2.gguf", True),
        ("llama3", "llama3:latest", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("Qwen3-4B", "Qwen3-4B-Thinking", False),
        ("m", "n", False),
    ],
)
def test_names_of_one_model(asked, answered_by, same):
    assert same_model(asked, answered_by) is same


def test_a_refusal_of_one_row_is_not_taken_for_a_wrong_model():
    def picky(body, reply):
        return (400, {"error": {"message": "prompt too long"}}) if body["messages"][0]["content"] == "long" else (200, reply)

    with ChatServer(lambda request: request.prompt, models=["org/M"], dressed=picky) as server:
        failure, good = answered(server, ["long", "short"])
    assert (failure.reason, failure.detail, good) == ("server_refused", "400: prompt too long", "short")


@pytest.mark.parametrize("json_schema", [False, True])
def test_the_manifest_counts_the_answers_that_hold_the_schema_and_those_that_do_not(tmp_path, recwarn, json_schema):
    replies = iter([GOOD, f"Here you are:\n{GOOD}", WIDE, GOOD[:20], "no", GOOD, GOOD, GOOD, GOOD, GOOD])

    def ended(body, reply):
        reply["choices"][0]["finish_reason"] = "length" if reply["choices"][0]["message"]["content"] == GOOD[:20] else "stop"
        return 200, reply

    with ChatServer(lambda request: next(replies), dressed=ended) as server:
        config = interests(server, tmp_path, treat={"json_schema": json_schema, "concurrency": 1}, max_quarantined=1.0)
        work = read_manifest(mine(config))["extra"]["work"]
    assert ("response_format" in server.seen[0][1]) is json_schema
    told = [str(warning.message) for warning in recwarn if "do not fit the JSON schema" in str(warning.message)]
    if json_schema:  # prose around the object, a number out of its bounds and plain text are all outside the schema
        assert (work["schema_held"], work["schema_broken"], work["schema_cut_off"]) == (5, 3, 1)
        assert len(told) == 1 and "3 of 8 whole answers" in told[0]
    else:
        assert not {"schema_held", "schema_broken"} & set(work) and not told


def test_a_server_that_refuses_the_schema_stops_the_job_with_the_key_to_change(tmp_path):
    with (
        ChatServer(lambda request: GOOD, dressed=refusing(422, "Unsupported fields: {'response_format'}")) as server,
        pytest.raises(ConfigError, match=r"refuses the JSON schema .422: Unsupported fields.*set server\.json_schema: false"),
    ):
        mine(interests(server, tmp_path, treat={"json_schema": True}))


@pytest.mark.parametrize(
    "body, words",
    [
        ('{"error": {"message": "no such\\n field", "code": 3}}', "no such field"),
        ('{"error": "plain"}', "plain"),
        ('{"detail": [{"loc": ["body", "x"], "msg": "bad"}]}', '[{"loc": ["body", "x"], "msg": "bad"}]'),
        ('{"message": "top"}', "top"),
        ("<html><h1>502</h1>Bad Gateway</html>", "502 Bad Gateway"),
        ("", "no text"),
        ("x" * 1_000, "x" * 300),
    ],
)
def test_the_words_of_an_error(body, words):
    assert error_words(body) == words


def test_the_words_of_a_server_stand_in_the_rows_and_in_the_message_of_the_gate(tmp_path):
    catalog = write_catalog(tmp_path, items=6)
    with ChatServer(lambda request: "", dressed=refusing(400, "this picture has 7 channels")) as server:
        config = caption_config(
            catalog, tmp_path / "caption", generator="openai", model="org/M7", prompt="caption_demo", server={"base_url": server.url}
        )
        with pytest.raises(AnnotationError, match=r"server_refused 7 .400: this picture has 7 channels."):
            run(config)
        rows = rows_of(run(config.model_copy(update={"max_quarantined": 1.0})))
    assert {row["rejected"] for row in rows} == {"400: this picture has 7 channels"}
