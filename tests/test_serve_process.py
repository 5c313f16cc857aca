"""`mmsid serve` as a process: kill -9 during appends, a second process on the same file, and a graceful stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from serve_world import write_world

pytestmark = pytest.mark.slow
httpx = pytest.importorskip("httpx2", reason="httpx2 is absent: pip install -e '.[dev]'")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("process"))[1]


class Served:
    """A service in a process of its own, on a free port of loopback."""

    def __init__(self, bundle, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "mmsid.cli", "serve", str(bundle), "--port", "0", "--no-caption", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.client = httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=30)
                break

    def end(self, sign: int) -> int:
        self.process.send_signal(sign)
        return self.process.wait(40)


def test_every_acknowledged_item_is_there_once_after_kill_9(bundle, tmp_path):
    """Four clients append 200 items. The process is killed in the middle, twice, and started again; clients repeat what failed."""
    state = ["--state", str(tmp_path / "items.sqlite")]
    acknowledged: dict[str, list[str]] = {}
    waiting = [f"new{n}" for n in range(200)]
    for kill_at in (60, 130, None):
        served = Served(bundle, *state)
        lost = threading.Event()

        def append(served=served, lost=lost) -> None:
            while waiting and not lost.is_set():
                try:
                    item_id = waiting.pop()
                except IndexError:
                    return
                try:
                    answer = served.client.post("/items", json={"item_id": item_id, "title": f"red shoe of {item_id}"})
                    answer.raise_for_status()
                except httpx.HTTPError:
                    waiting.append(item_id)
                    lost.set()
                    return
                (found,) = answer.json()["results"]
                assert found["status"] in ("added", "known") and item_id not in acknowledged
                acknowledged[item_id] = found["sid"]

        threads = [threading.Thread(target=append) for _ in range(4)]
        for thread in threads:
            thread.start()
        while kill_at is not None and len(acknowledged) < kill_at and any(thread.is_alive() for thread in threads):
            time.sleep(0.005)
        if kill_at is not None:
            assert served.end(signal.SIGKILL) == -signal.SIGKILL
        for thread in threads:
            thread.join(60)
        assert kill_at is None or waiting, "the kill came too late"
    assert len(acknowledged) == 200 and not waiting
    about = served.client.get("/about").json()
    assert about["appended"] == 200, "each item is there once, also those whose answer was lost and that were sent again"
    for item_id, sid in acknowledged.items():
        assert served.client.get(f"/items/{item_id}").json()["sid"] == sid
    assert len({tuple(sid) for sid in acknowledged.values()}) == 200
    found = served.client.post("/recommend", json={"histories": [["i0", "i4"]], "k": 200}).json()["results"][0]["items"]
    assert {item["item_id"] for item in found} & set(acknowledged)
    assert served.end(signal.SIGTERM) == 0


def test_a_graceful_stop_answers_what_has_begun(bundle, tmp_path):
    served = Served(bundle, "--state", str(tmp_path / "items.sqlite"))
    ads = [{"item_id": f"n{n}", "title": f"blue bag {n}"} for n in range(64)]
    answers = []
    thread = threading.Thread(target=lambda: answers.append(served.client.post("/items", json={"items": ads})))
    thread.start()
    while "mmsid_requests_in_flight 1.0" not in served.client.get("/metrics").text and thread.is_alive():
        time.sleep(0.005)
    assert served.end(signal.SIGTERM) == 0
    thread.join(30)
    assert answers[0].status_code == 200 and answers[0].json()["counts"] == {"in": 64, "added": 64}
    again = Served(bundle, "--state", str(tmp_path / "items.sqlite"))
    assert again.client.get("/about").json()["appended"] == 64
    other = subprocess.run(
        [sys.executable, "-m", "mmsid.cli", "serve", str(bundle), "--port", "0", "--state", str(tmp_path / "items.sqlite"), "--no-caption"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert other.returncode == 1 and "another job" in other.stderr and "Traceback" not in other.stderr
    assert again.end(signal.SIGINT) == 0


def test_a_key_from_the_environment(bundle, tmp_path):
    served = Served(bundle, "--state", str(tmp_path / "items.sqlite"), MMSID_API_KEY="a-key-of-16-chars")
    assert served.client.get("/about").status_code == 401
    assert served.client.get("/about", headers={"X-API-Key": "a-key-of-16-chars"}).status_code == 200
    assert not any("a-key" in line for line in served.lines)
    served.end(signal.SIGTERM)
