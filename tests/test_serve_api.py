"""The service by HTTP: encode, recommend, append, limits, keys, and what hostile requests get."""

from __future__ import annotations

import base64
import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from serve_world import ATTACK, ColourModel, picture, write_world

from mmsid.catalog import PictureLimits
from mmsid.cli import main
from mmsid.errors import ArtifactError, ConfigError
from mmsid.serve import annotation, schemas
from mmsid.serve.settings import ServeSettings

pytest.importorskip("fastapi", reason="the extra `serve` is absent: pip install -e '.[dev]'")
from fastapi.testclient import TestClient

from mmsid.serve.app import create_app
from mmsid.serve.guard import is_loopback_host
from mmsid.serve.server import serve, serve_settings

FAST = PictureLimits(isolate=False, max_bytes=200_000)  # the child process is tested once, below
RED = base64.b64encode(picture("red", 3)).decode()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("api"))[1]


@contextmanager
def serving(bundle, tmp_path, **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotation, "build_generator", lambda config, record: ColourModel(record))
        given = {"state": tmp_path / "items.sqlite", "pictures": FAST, **settings}
        with TestClient(create_app(bundle, ServeSettings(**given)), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
            yield client


@pytest.fixture
def client(bundle, tmp_path):
    with serving(bundle, tmp_path) as client:
        yield client


def test_one_ad_is_encoded_from_a_form_and_from_json_alike(client):
    fields = {"title": "red chair 3", "categories": ["home", "chair"], "k": "3"}
    form = client.post("/encode", data=fields, files={"image": picture("red", 3)})
    assert form.status_code == 200, form.text
    ad = {"title": "red chair 3", "categories": ["home", "chair"], "image": RED}
    one, many = client.post("/encode", json={**ad, "k": 3}), client.post("/encode", json={"ads": [ad], "k": 3})
    data_url = client.post("/encode", json={**ad, "image": f"data:image/png;base64,{RED}", "k": 3})
    assert form.json() == one.json() == many.json() == data_url.json()
    answer = schemas.EncodeAnswer.model_validate(form.json())
    (found,) = answer.results
    assert answer.counts == {"in": 1, "ok": 1}
    assert found.caption == "a red thing" and found.interests[0].descriptor == "likes red" and found.notes == []
    assert len(found.nearest) == 3 and found.nearest[0].picture is None and "red" in found.nearest[0].title
    assert client.post("/encode", json={**ad, "pictures": True}).json()["results"][0]["nearest"][0]["picture"].startswith("data:image/webp")


def test_many_ads_are_answered_in_order_and_bad_ones_spoil_nothing(client):
    ads = [{"item_id": str(n), "title": f"lamp {n}"} for n in range(5)]
    ads[2] = {"item_id": "2", "image": base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"x" * 80).decode()}
    ads[3] = {"item_id": "3", "image": "https://example.com/a.png"}
    answer = client.post("/encode", json={"ads": ads}).json()
    assert [one["item_id"] for one in answer["results"]] == list("01234")
    assert [one["status"] for one in answer["results"]] == ["ok", "ok", "quarantined", "quarantined", "ok"]
    assert answer["counts"] == {"in": 5, "ok": 3, "quarantined": 2} and "ads[3]" in answer["results"][3]["reason"]
    alone = client.post("/encode", json={"ads": ads[:1]}).json()
    assert alone["results"][0] == answer["results"][0], "an answer does not depend on the others"
    files = [("image", picture("red")), ("image", picture("blue"))]
    answer = client.post("/encode", data={"title": ["a", "b"]}, files=files).json()
    assert [(one["title"], one["caption"]) for one in answer["results"]] == [("a", "a red thing"), ("b", "a blue thing")]
    none = client.post("/encode", json={"ads": ads[2:4]})
    assert none.status_code == 422 and none.json()["counts"] == {"in": 2, "quarantined": 2}


def test_recommendations_say_their_sources_and_read_new_ads(client):
    history = ["i0", "i8", "i16"]
    asked = {"histories": [history, ["nobody"], [], [*history, {"title": "red shoe", "image": RED}], [{"title": "blue bag"}]], "k": 4}
    answer = client.post("/recommend", json=asked)
    assert answer.status_code == 200, answer.text
    found = schemas.RecommendAnswer.model_validate(answer.json()).results
    assert [one.status for one in found] == ["personal", "unknown_history", "empty_history", "personal", "personal"]
    assert found[1].unknown_ids == 1 and all(len(one.items) == 4 and all(item.sources for item in one.items) for one in found)
    assert not {item.item_id for item in found[0].items} & set(history)
    only = client.post("/recommend", json={"histories": [history], "k": 9, "only": ["i1", "i2", "i0"]}).json()["results"][0]
    assert {item["item_id"] for item in only["items"]} == {"i1", "i2"}
    seen = client.post("/recommend", json={"histories": [history], "k": 200, "exclude_seen": False}).json()["results"][0]
    assert {item["item_id"] for item in seen["items"]} >= set(history)
    bad = client.post("/recommend", json={"histories": [["i0", {"title": "x", "image": "nonsense"}]]})
    assert bad.status_code == 422 and "histories[0][1]" in bad.json()["detail"]


def test_appended_items_are_there_at_once_once_and_after_a_restart(bundle, tmp_path):
    new = {"item_id": "new/1 ä", "title": "red shoe 99", "categories": ["home", "shoe"], "image": RED}
    with serving(bundle, tmp_path) as client:
        before = client.get("/about").json()["items"]
        first = client.post("/items", json=new)
        assert first.status_code == 200 and schemas.AppendAnswer.model_validate(first.json()).results[0].status == "added"
        sid = first.json()["results"][0]["sid"]
        again = client.post("/items", json={"items": [new, new]})
        assert [one["status"] for one in again.json()["results"]] == ["known"] * 2 and again.json()["results"][0]["sid"] == sid
        other = client.post("/items", json={**new, "title": "something else"})
        assert other.status_code == 409 and other.json()["results"][0]["sid"] is None
        form = client.post("/items", data={"item_id": "form", "title": "blue bag 98"}, files={"image": picture("blue")})
        assert form.json()["counts"] == {"in": 1, "added": 1}
        twin = client.post("/items", json={**new, "item_id": "twin"}).json()["results"][0]
        assert twin["sid"] == sid, "the same content under another id shares the codes"
        items = [{"item_id": "empty"}, {"item_id": "i0", "title": "z"}, {"item_id": "ok", "title": "lamp"}]
        mixed = client.post("/items", json={"items": items})
        assert [one["status"] for one in mixed.json()["results"]] == ["quarantined", "conflict", "added"]
        shown = client.get("/items/new/1 ä", params={"pictures": "true"}).json()
        assert shown["sid"] == sid and shown["appended"] and shown["caption"] == "a red thing" and shown["picture"].startswith("data:")
        assert client.get("/items/none").status_code == 404
        assert client.get("/about").json()["items"] == before + 4
        asked = {"histories": [["i0", "i8"], ["new/1 ä"]], "k": 60}
        recommended = client.post("/recommend", json=asked).json()["results"]
        assert {"new/1 ä", "form", "ok"} <= {item["item_id"] for item in recommended[0]["items"]} and recommended[1]["status"] == "personal"
        near = client.post("/encode", json={"title": "red shoe 99", "categories": ["home", "shoe"], "image": RED, "k": 2}).json()
        assert {one["item_id"] for one in near["results"][0]["nearest"]} == {"new/1 ä", "twin"}
    with serving(bundle, tmp_path) as client:
        assert client.get("/about").json()["items"] == before + 4 and client.get("/items/new/1 ä").json()["sid"] == sid
        assert client.post("/recommend", json=asked).json()["results"][0] == recommended[0]
        assert client.post("/items", json=new).json()["results"][0]["status"] == "known"


def test_published_codes_and_scores_do_not_change_by_appending(client):
    history = {"histories": [["i0", "i8", "i16"]], "k": 5, "only": [f"i{n}" for n in range(48)]}
    before, codes = client.post("/recommend", json=history).json(), [client.get(f"/items/i{n}").json()["sid"] for n in range(48)]
    client.post("/items", json={"items": [{"item_id": f"n{n}", "title": f"red shoe {n}"} for n in range(20)]})
    assert client.post("/recommend", json=history).json() == before
    assert [client.get(f"/items/i{n}").json()["sid"] for n in range(48)] == codes
    new = [tuple(client.get(f"/items/n{n}").json()["sid"]) for n in range(20)]
    assert len({*new, *map(tuple, codes)}) == len(new) + len(set(map(tuple, codes))), "distinct ads have distinct codes"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/encode", b"{", "not JSON"),
        ("/encode", b"[1]", "body"),
        ("/encode", b'{"ads": []}', "at least 1"),
        ("/encode", b'{"title": 3}', "ads.0.title"),
        ("/encode", b'{"title": "x", "colour": "red"}', "colour"),
        ("/encode", b"[" * 100_000, "JSON"),
        ("/encode", b'{"title": NaN}', "ads.0.title"),
        ("/encode", json.dumps({"ads": [{"title": "x"}] * 65}).encode(), "at most 64"),
        ("/recommend", b'{"histories": "i0"}', "histories"),
        ("/recommend", b'{"histories": [["i0"]], "k": 0}', "k:"),
        ("/items", b'{"title": "no id"}', "item_id"),
        ("/items", b'{"item_id": "", "title": "x"}', "item_id"),
    ],
)
def test_requests_of_a_wrong_form_are_explained(client, path, body, words):
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422 and words in answer.json()["detail"], answer.text


def test_forms_of_a_wrong_form_are_explained(client):
    wrong = [({"image": "text"}, None), ({"other": "x"}, None), ({"title": ["a", "b"]}, {"image": picture("red")}), ({"k": "many"}, None)]
    for data, files in wrong:
        answer = client.post("/encode", data=data, files=files or {"image": b""})
        assert answer.status_code == 422 and answer.json()["detail"], answer.text
    assert client.post("/encode", content=b"x", headers={"content-type": "text/plain"}).status_code == 415
    assert client.get("/encode").status_code == 405 and client.get("/nothing").status_code == 404


def test_too_long_bodies_and_pictures_are_refused(bundle, tmp_path):
    with serving(bundle, tmp_path, body_bytes=5_000) as client:
        assert client.post("/encode", content=b" " * 6_000).status_code == 413

        def chunks():
            for _ in range(10):
                yield b" " * 1_000

        answer = client.post("/encode", content=chunks(), headers={"content-type": "application/json"})
        assert answer.status_code == 413 and "5,000" in answer.json()["detail"]
        assert client.post("/encode", json={"title": "small"}).status_code == 200


def test_hostile_pictures_are_decoded_in_a_child_process(bundle, tmp_path):
    limits = PictureLimits(isolate=True, max_pixels=10_000)
    with serving(bundle, tmp_path, pictures=limits) as client:
        assert client.post("/encode", json={"image": RED}).json()["results"][0]["caption"] == "a red thing"
        large = client.post("/encode", files={"image": picture("red", size=120)})
        assert large.status_code == 422 and "pixels" in large.json()["results"][0]["reason"]
        metrics = client.get("/metrics").text
        assert 'mmsid_pictures_refused_total{reason="too_many_pixels"} 1.0' in metrics


def test_overload_is_answered_429_and_passes(bundle, tmp_path):
    """While the engine is held up, requests beyond the queue are refused; afterwards all is answered."""
    with serving(bundle, tmp_path, queue=3) as client:
        engine, gate = client.app.state.service.engine, threading.Event()
        encode = engine.encode
        engine.encode = lambda ads: (gate.wait(20), encode(ads))[1]
        answers = []
        threads = [threading.Thread(target=lambda n=n: answers.append(client.post("/encode", json={"title": f"x{n}"}))) for n in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: client.app.state.service.metrics.in_flight._value.get() == 3)
        refused = client.post("/encode", json={"title": "too many"})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200 and client.get("/items/i0").status_code == 200
        gate.set()
        for thread in threads:
            thread.join(20)
        assert [answer.status_code for answer in answers] == [200] * 3
        assert client.post("/encode", json={"title": "now"}).status_code == 200
        assert "mmsid_requests_rejected_total 1.0" in client.get("/metrics").text


def test_requests_that_wait_are_worked_on_together(bundle, tmp_path):
    with serving(bundle, tmp_path) as client:
        engine, gate, sizes, answers = client.app.state.service.engine, threading.Event(), [], {}
        encode = engine.encode
        engine.encode = lambda ads: (sizes.append(len(ads)), gate.wait(20), encode(ads))[2]

        def ask(n):
            answers[n] = client.post("/encode", json={"title": f"x{n}"}).json()

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(7)]
        threads[0].start()
        until(lambda: sizes == [1])
        for thread in threads[1:]:
            thread.start()
        until(lambda: client.app.state.service.worker.waiting == 6)
        gate.set()
        for thread in threads:
            thread.join(20)
        assert sizes == [1, 6]
        assert all(answers[n]["results"][0]["title"] == f"x{n}" for n in range(7))


def test_one_ad_that_breaks_the_engine_does_not_break_the_others(bundle, tmp_path):
    with serving(bundle, tmp_path) as client:
        engine = client.app.state.service.engine
        encode = engine.encode

        def fragile(ads):
            if any(ad.item.title == "poison" for ad in ads):
                raise RuntimeError("secret detail")
            return encode(ads)

        engine.encode = fragile
        poison = client.post("/encode", json={"title": "poison"})
        assert poison.status_code == 500 and "secret" not in poison.text
        assert client.post("/encode", json={"title": "fine"}).status_code == 200


def test_a_request_that_takes_too_long_is_answered_504(bundle, tmp_path):
    with serving(bundle, tmp_path, seconds=0.3) as client:
        engine = client.app.state.service.engine
        encode = engine.encode
        engine.encode = lambda ads: (time.sleep(1), encode(ads))[1]
        assert client.post("/encode", json={"title": "x"}).status_code == 504
        engine.encode = encode
        until(lambda: client.post("/encode", json={"title": "x"}).status_code == 200)


def test_a_disk_that_is_full_loses_nothing_and_acknowledges_nothing(client):
    store = client.app.state.service.engine.store
    add = store.add

    def full(items):
        raise ArtifactError("the disk is full")

    store.add = full
    refused = client.post("/items", json={"item_id": "n", "title": "lamp"})
    assert refused.status_code == 503 and "full" in refused.json()["detail"] and client.get("/items/n").status_code == 404
    store.add = add
    assert client.post("/items", json={"item_id": "n", "title": "lamp"}).json()["results"][0]["status"] == "added"


def test_the_key_is_asked_for(bundle, tmp_path):
    with serving(bundle, tmp_path, api_key="a-key-of-16-chars") as client:
        for path in ("/about", "/items/i0", "/metrics"):
            assert client.get(path).status_code == 401 and client.get(path, headers={"X-API-Key": "wrong"}).status_code == 401
            assert client.get(path, headers={"X-API-Key": "a-key-of-16-chars"}).status_code == 200
            assert client.get(path, headers={"Authorization": "Bearer a-key-of-16-chars"}).status_code == 200
        assert client.post("/encode", json={"title": "x"}).headers["www-authenticate"] == "Bearer"
        assert [client.get(path).status_code for path in ("/", "/healthz", "/docs", "/openapi.json")] == [200] * 4
        assert client.get("/about", headers={"X-API-Key": "a-key-of-16-chars", "Host": "ads.example.com"}).status_code == 200


def test_without_a_key_other_hosts_and_origins_are_refused(client):
    assert client.get("/about", headers={"Host": "evil.example"}).status_code == 403
    assert client.post("/items", json={"item_id": "x", "title": "x"}, headers={"Origin": "https://evil.example"}).status_code == 403
    assert client.post("/encode", json={"title": "x"}, headers={"Origin": "http://127.0.0.1"}).status_code == 200
    assert client.get("/items/x").status_code == 404
    named = {"localhost": True, "127.0.0.5": True, "[::1]": True, "0.0.0.0": False, "127.0.0.1.evil.example": False, "": False}
    assert {name: is_loopback_host(name) for name in named} == named


def test_an_address_that_others_reach_needs_a_key(bundle, monkeypatch):
    monkeypatch.delenv("MMSID_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="MMSID_API_KEY"):
        serve(bundle, "0.0.0.0", 8765)
    monkeypatch.setenv("MMSID_API_KEY", "short")
    with pytest.raises(ConfigError, match="api_key"):
        serve(bundle, "0.0.0.0", 8765)
    with pytest.raises(ConfigError, match="use --state"):
        serve(bundle, "127.0.0.1", 8765, overrides=["state=x"])
    with pytest.raises(ArtifactError, match="does not exist"):
        serve(bundle / "nowhere", "127.0.0.1", 8765)


def test_settings_of_the_command_keep_what_they_do_not_name(tmp_path, monkeypatch):
    monkeypatch.delenv("MMSID_API_KEY", raising=False)
    settings = serve_settings(tmp_path / "s", overrides=["queue=5", "pictures.max_bytes=5000"])
    assert (settings.queue, settings.pictures.max_bytes, settings.pictures.isolate) == (5, 5000, True)
    with pytest.raises(ConfigError, match="queu"):
        serve_settings(tmp_path / "s", overrides=["queu=5"])


def test_the_dockerfile_names_files_and_options_that_exist(monkeypatch, capsys):
    root = Path(__file__).parents[1]
    lines = (root / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            assert all((root / name).exists() for name in line.split()[1:-1]), line
    entry = next(json.loads(line.removeprefix("ENTRYPOINT ")) for line in lines if line.startswith("ENTRYPOINT"))
    with pytest.raises(SystemExit):
        main(entry[1:])
    assert "/bundle does not exist" in capsys.readouterr().err


def test_every_answer_has_security_headers_and_the_page_permits_only_itself(client):
    for path in ("/", "/docs", "/about", "/nothing", "/healthz"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["content-security-policy"].startswith("default-src 'none'") and "unsafe" not in headers["content-security-policy"]
    page = client.get("/").text
    assert "http://" not in page and "https://" not in page and "<script>" in page and "page.css" not in page


def test_markup_in_titles_stays_data(client):
    client.post("/items", json={"item_id": "attack", "title": f"5 < 6 {ATTACK}"})
    shown = client.get("/items/attack")
    assert shown.headers["content-type"] == "application/json" and "<script" not in shown.json()["title"]
    assert "<script>window" not in client.get("/docs").text


def test_the_interface_is_described_with_examples_that_work(client):
    document = client.get("/openapi.json").json()
    assert {"/encode", "/recommend", "/items", "/items/{item_id}", "/about", "/healthz", "/metrics"} <= set(document["paths"])
    for path in ("/encode", "/recommend", "/items"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        for example in content["application/json"]["examples"].values():
            answer = client.post(path, json=example["value"])
            assert answer.status_code == 200, (path, answer.text)
            assert all(one["status"] != "quarantined" for one in answer.json()["results"])
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in document["components"]["schemas"]
    page = client.get("/docs").text
    assert "curl http://127.0.0.1:8765/encode" in page and "NewItem" in page


def test_metrics_are_counted(client):
    client.post("/encode", json={"title": "x"})
    client.post("/encode", json={"titel": "x"})
    client.post("/items", json={"item_id": "m", "title": "x"})
    text = client.get("/metrics").text
    for line in (
        'mmsid_requests_total{route="/encode",status="200"} 1.0',
        'mmsid_requests_total{route="/encode",status="422"} 1.0',
        'mmsid_ads_total{result="added"} 1.0',
        "mmsid_items 49.0",
        "process_resident_memory_bytes",
        'mmsid_request_seconds_count{route="/items"} 1.0',
    ):
        assert line in text


def test_a_state_of_another_bundle_or_of_another_process_is_refused(bundle, tmp_path):
    from mmsid.serve.store import AppendedStore

    with serving(bundle, tmp_path), pytest.raises(ArtifactError, match="another job"):
        AppendedStore(tmp_path / "items.sqlite", "v")
    with pytest.raises(ArtifactError, match="bundle version"):
        AppendedStore(tmp_path / "items.sqlite", "v")
    (tmp_path / "torn.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(ArtifactError, match="cannot be used"):
        AppendedStore(tmp_path / "torn.sqlite", "v")


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
