"""The server generator against a real HTTP server on loopback that speaks the protocol and misbehaves on command."""

import json
import os
import pickle
import signal
import threading
import time

import pytest
from annotate_stub import StubGenerator, caption_config, rows_of, write_catalog
from chat_server import FAULTS, ChatServer, completion, read_request
from PIL import Image
from pydantic import ValidationError

from mmsid.annotate.caption import run
from mmsid.annotate.generator import GenerationFailure, Request
from mmsid.annotate.records import Caption
from mmsid.annotate.server import OpenAIGenerator
from mmsid.annotate.server_config import ServerConfig
from mmsid.annotate.server_wire import read_answer, retry_after
from mmsid.artifacts import is_complete, read_manifest
from mmsid.errors import AnnotationError, ConfigError

stub = StubGenerator()
SAME = ("item_id", "creative", "caption", "status", "reason", "flags", "attempts")


def answer(request: Request) -> str:
    return stub.generate([request])[0]


def generator(server: ChatServer, **options) -> OpenAIGenerator:
    return OpenAIGenerator("m", ServerConfig(base_url=server.url, **options))


def coloured(number: int) -> Request:
    return Request("Describe.", (Image.new("RGB", (6, 5), (number, 2, 3)),))


def server_config(catalog, out, server: ChatServer, *, treat=None, **options):
    treat = {"base_url": server.url, "concurrency": 4} | (treat or {})
    return caption_config(catalog, out, generator="openai", model="m", prompt="caption_demo", server=treat, **options)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return write_catalog(tmp_path_factory.mktemp("catalog"))


@pytest.fixture(scope="module")
def local_rows(catalog, tmp_path_factory):
    return rows_of(run(caption_config(catalog, tmp_path_factory.mktemp("local") / "caption"), StubGenerator()))


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt even where a shell started the tests in the background, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def told(rows):
    return [{name: row[name] for name in SAME} for row in rows]


def test_the_rows_are_those_of_a_model_in_process_and_no_more_requests_run_than_allowed(catalog, local_rows, tmp_path):
    with ChatServer(answer, delay=0.02) as server:
        out = run(server_config(catalog, tmp_path / "caption", server))
    assert told(rows_of(out)) == told(local_rows)
    assert server.good == 28
    assert 1 < server.most_at_once <= 4


@pytest.mark.parametrize("fault", FAULTS)
def test_every_passing_fault_is_tried_again(fault):
    with ChatServer(answer, plan=[fault], slow=30.0) as server:
        asking = generator(server, timeout_seconds=1.5 if fault == "slow" else 60.0)
        assert asking.generate([coloured(7)]) == [answer(coloured(7))]
        asking.close()
    assert server.good == 1 < len(server.seen)


def test_with_a_fifth_of_requests_failing_all_rows_end_ok_none_lost_none_doubled(catalog, local_rows, tmp_path):
    with ChatServer(answer, share=0.2, slow=0.2) as server:
        out = run(server_config(catalog, tmp_path / "caption", server, treat={"concurrency": 8}))
    assert server.faults_done.total() >= 3
    assert told(rows_of(out)) == told(local_rows)


def test_a_retry_after_holds_every_request_not_only_the_one_it_was_told_to():
    with ChatServer(answer, plan=["busy"], wait="0.6") as server:
        asking = generator(server, concurrency=1)
        assert asking.generate([coloured(1), coloured(2), coloured(3)]) == [answer(coloured(number)) for number in (1, 2, 3)]
        asking.close()
    assert len(server.arrivals) == 4
    assert server.arrivals[1] - server.arrivals[0] >= 0.6


@pytest.mark.parametrize(
    "fault, reason", [("error", "server_error"), ("busy", "server_busy"), ("cut", "server_unreachable"), ("slow", "server_timeout")]
)
def test_a_fault_that_lasts_is_a_failure_of_its_request_alone(fault, reason, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: 1_000.0)  # the next attempt would come after the deadline
    with ChatServer(answer, share=1.0, faults=[fault], slow=30.0) as server:
        failed = generator(server, timeout_seconds=0.5 if fault == "slow" else 60.0).generate([coloured(1)])
    assert [failure.reason for failure in failed] == [reason]
    assert len(server.seen) == 1


def test_what_the_server_refuses_is_not_asked_again():
    with ChatServer(answer, plan=["refuse"]) as server:
        failure, good = generator(server, concurrency=1).generate([coloured(1), coloured(2)])
    assert (failure.reason, good) == ("server_refused", answer(coloured(2)))
    assert "picture refused" in failure.detail
    assert len(server.seen) == 2


def test_a_server_that_only_ever_says_nothing_is_asked_four_times():
    with ChatServer(answer, share=1.0, faults=["empty"]) as server:
        assert generator(server).generate([coloured(1)])[0].reason == "server_garbled"
    assert len(server.seen) == 4


def test_a_server_that_is_gone_ends_the_job_with_its_rows_kept(catalog, local_rows, tmp_path):
    with ChatServer(answer, share=1.0, faults=["hang_up"]) as server:
        config = server_config(catalog, tmp_path / "caption", server, treat={"concurrency": 2, "deadline_seconds": 0.2})
        with pytest.raises(AnnotationError, match=r"failed to answer 4 requests in a row.*run again") as raised:
            run(config)
    assert raised.value.reason == "server_gone"
    with ChatServer(answer) as server:
        out = run(server_config(catalog, tmp_path / "caption", server, treat={"concurrency": 2}))
    assert told(rows_of(out)) == told(local_rows)


def test_rows_that_a_server_failed_are_tried_again_on_every_resume(catalog, local_rows, tmp_path):
    config = caption_config(catalog, tmp_path / "caption", max_quarantined=1.0)

    class Fails(StubGenerator):
        def _answer(self, request):
            if request.pictures[0].getpixel((0, 0)) == last_shard:
                raise KeyboardInterrupt
            return super()._answer(request)

    last_shard = eval(local_rows[-1]["caption"].removeprefix("a plain card of colour "))
    down = Fails(broken=lambda colour, drawn: GenerationFailure("server_timeout") if colour[0] % 2 else None)
    with pytest.raises(KeyboardInterrupt):
        run(config, down)
    cleaned = StubGenerator()
    assert rows_of(run(config, cleaned)) == local_rows
    assert 0 < cleaned.num_requests < 28


def test_a_wrong_key_or_model_stops_the_job_at_once_and_the_key_is_written_nowhere(catalog, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MY_KEY", "sesame-1234")
    with ChatServer(answer) as server:
        run(server_config(catalog, tmp_path / "good" / "caption", server, treat={"api_key_env": "MY_KEY"}))
        assert {headers["authorization"] for headers, _ in server.seen} == {"Bearer sesame-1234"}
    for fault, said in (("stranger", "refuses access .401.*variable MY_KEY"), ("unknown_model", "has no model 'm'")):
        with ChatServer(answer, share=1.0, faults=[fault]) as server:
            config = server_config(
                catalog, tmp_path / fault / "caption", server, treat={"api_key_env": "MY_KEY"}, cache=tmp_path / "c.sqlite"
            )
            with pytest.raises(ConfigError, match=said) as raised:
                run(config)
            assert "sesame" not in str(raised.value)
        assert len(server.seen) <= 8
    with ChatServer(answer, share=1.0, faults=["refuse"]) as server:  # echoes the key, and what it says is kept in the rows
        treat = {"api_key_env": "MY_KEY"}
        refused = rows_of(run(server_config(catalog, tmp_path / "refused" / "caption", server, treat=treat, max_quarantined=1.0)))
    assert all("picture refused, Bearer ***" in row["rejected"] for row in refused)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if b"sesame" in path.read_bytes()]
    said = capfd.readouterr()
    assert "sesame" not in said.out + said.err


def test_an_interrupted_job_does_not_wait_for_the_server_and_goes_on_later(catalog, local_rows, tmp_path, interruptible):
    with ChatServer(answer, delay=60.0) as server:

        def interrupt() -> None:
            while len(server.seen) < 4:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run(server_config(catalog, tmp_path / "caption", server))
        assert time.monotonic() - started < 50.0
        assert not is_complete(tmp_path / "caption")
    with ChatServer(answer) as server:
        assert told(rows_of(run(server_config(catalog, tmp_path / "caption", server)))) == told(local_rows)


def test_closing_cancels_and_a_closed_generator_can_be_used_again():
    with ChatServer(answer, plan=["slow"], slow=60.0) as server:
        asking, met = generator(server), []

        def ask() -> None:
            try:
                asking.generate([coloured(1)])
            except AnnotationError as error:
                met.append(error.reason)

        thread = threading.Thread(target=ask)
        thread.start()
        while not server.seen:
            time.sleep(0.01)
        asking.close()
        thread.join(timeout=30)
        assert met == ["cancelled"]
        assert asking.generate([coloured(2)]) == [answer(coloured(2))]
        asking.close()


def test_what_goes_over_the_wire(tmp_path):
    secret = Image.Exif()
    secret[0x010E] = "where this was taken"
    Image.effect_noise((300, 200), 50).convert("RGB").save(tmp_path / "one.jpg", exif=secret)
    (tmp_path / "items.jsonl").write_text(json.dumps({"item_id": "a", "title": "t", "image": "one.jpg"}))
    catalog = caption_config({"items": tmp_path / "items.jsonl"}, tmp_path / "x").catalog
    for treat in ({}, {"json_schema": True, "picture_format": "jpeg"}):
        with ChatServer(lambda request: '{"caption": "noise"}') as server:
            run(server_config(catalog, tmp_path / f"caption{len(treat)}", server, treat=treat, max_side=100, temperature=0.5))
        ((_, body),) = server.seen
        picture, text = body["messages"][0]["content"]
        assert picture["image_url"]["url"].startswith(f"data:image/{treat.get('picture_format', 'png')};base64,")
        (decoded,) = read_request(body).pictures
        assert decoded.size == (100, 67)
        assert not decoded.getexif() and text["text"]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 256)
        assert isinstance(body["seed"], int)
        if treat:
            schema = body["response_format"]["json_schema"]
            assert schema["strict"] and schema["schema"] == Caption.model_json_schema()
            assert schema["schema"]["additionalProperties"] is False
        else:
            assert "response_format" not in body


def test_how_the_server_is_treated_is_in_no_manifest_and_what_changes_answers_is(catalog, tmp_path):
    with ChatServer(answer) as server:
        out = run(server_config(catalog, tmp_path / "caption", server, treat={"concurrency": 3}))
    config = read_manifest(out)["config"]
    assert config["server"] == {"json_schema": False, "picture_format": "png"}
    assert not {"ray", "readers"} & set(config)
    one, other = (OpenAIGenerator("m", ServerConfig(base_url="http://x/v1", picture_format=form)) for form in ("png", "jpeg"))
    assert one.parameters != other.parameters
    assert OpenAIGenerator("m", one.server, revision="r7").model_id == "m@r7" != one.model_id == "m@server"


def test_a_generator_is_the_same_after_a_journey(catalog, tmp_path):
    with ChatServer(answer) as server:
        asking = OpenAIGenerator("m", ServerConfig(base_url=server.url), revision="r", max_new_tokens=9, schema={"a": 1}, batch_size=2)
        asking.generate([coloured(1)])
        there = pickle.loads(pickle.dumps(asking))
        assert (there.model_id, there.parameters, there.max_concurrent_calls) == (
            asking.model_id,
            asking.parameters,
            asking.max_concurrent_calls,
        )
        assert there.generate([coloured(2)]) == [answer(coloured(2))]
        asking.close(), there.close()


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "http://me:secret@host/v1", "ftp://host/v1", "http:///v1", "http://host/v1?key=1"])
def test_addresses_that_are_none_or_hold_a_secret_are_refused(url):
    with pytest.raises(ValidationError, match="without user, password or query"):
        ServerConfig(base_url=url)


def test_server_and_generator_go_together(catalog, tmp_path):
    with pytest.raises(ValidationError, match="write both or neither"):
        caption_config(catalog, tmp_path, generator="openai")
    with pytest.raises(ValidationError, match="write both or neither"):
        caption_config(catalog, tmp_path, server={"base_url": "http://x/v1"})
    with pytest.raises(ValidationError, match="server's own processor decides"):
        caption_config(catalog, tmp_path, generator="openai", server={"base_url": "http://x/v1"}, picture_tokens=256)


@pytest.mark.parametrize(
    "body, expected",
    [
        (json.dumps(completion("hello")), "hello"),
        (json.dumps({"choices": [{"message": {"content": None, "refusal": "I cannot"}}]}), "I cannot"),
        (json.dumps({"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}), "content_filter"),
        (json.dumps(completion("hello"))[:-9], "server_garbled"),
        (json.dumps(completion(["hello"])), "server_garbled"),
        (json.dumps(completion("  \n")), "server_garbled"),
        ("[" * 100_000, "server_garbled"),
        ('{"choices": {}}', "server_garbled"),
        ('{"choices": [7]}', "server_garbled"),
        ('{"choices": [{"message": "hello"}]}', "server_garbled"),
        ("", "server_garbled"),
        ("<html>502 Bad Gateway</html>", "server_garbled"),
    ],
)
def test_reading_an_answer(body, expected):
    found = read_answer(body)
    assert (found.reason if isinstance(found, GenerationFailure) else found.text) == expected


@pytest.mark.parametrize(
    "value, seconds", [("3", 3.0), ("0.5", 0.5), ("-1", None), ("nan", None), ("inf", None), ("1e9", None), ("soon", None), (None, None)]
)
def test_reading_retry_after(value, seconds):
    assert retry_after(value) == seconds


def test_retry_after_may_be_a_date():
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 50.0 < retry_after(later) <= 61.0
    assert retry_after("Mon, 01 Jan 2001 00:00:00 GMT") is None
