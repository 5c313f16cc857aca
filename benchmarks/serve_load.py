"""`mmsid serve` under load on loopback: latency, errors and memory; overload and recovery; kill -9 while items are appended.

    python benchmarks/serve_load.py runs/demo/bundle --pictures demo/catalog/images --seconds 600 --out benchmarks/results/serve_load.json

Half of the requests encode an ad (a picture that no request sent before, and a title), half ask for recommendations for a history of
eight items. Every client sends its next request when it has its answer. Clients and service share the machine.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmsid.artifacts import read_table, write_json

TITLES = ["summer", "winter", "light", "oak", "red", "striped", "new", "classic", "small", "bold", "quiet", "fine", "weekend", "office"]


class Service:
    """A process of `mmsid serve` on a free port."""

    def __init__(self, bundle: Path, state: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "mmsid.cli", "serve", str(bundle), "--port", "0", "--state", str(state), *arguments]
        started = time.monotonic()
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise SystemExit("the service did not start")
        self.start_seconds = time.monotonic() - started
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def rss_mb(self) -> float:
        """Resident memory of the service without its decoding processes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def end(self, sign: int = signal.SIGTERM) -> None:
        self.process.send_signal(sign)
        self.process.wait(60)


class Client:
    """Keep-alive connection of one client."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, path: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, Any, dict[str, str]]:
        headers = {} if body is None else {"Content-Type": kind}
        try:
            self.connection.request("GET" if body is None else "POST", path, body, headers)
            answer = self.connection.getresponse()
            return answer.status, json.loads(answer.read()), dict(answer.getheaders())
        except BaseException:
            self.connection.close()
            raise


class Requests:
    """Bodies of requests. No two encode requests have the same picture."""

    def __init__(self, pictures: Path, ids: list[str]) -> None:
        self.ids = ids
        self.pictures = [Image.open(path).convert("RGB") for path in sorted(pictures.glob("*.jpg"))[:64]]

    def encode(self, rng: random.Random) -> tuple[str, bytes, str]:
        picture = rng.choice(self.pictures)
        left, top = rng.randrange(8), rng.randrange(8)
        picture = picture.crop((left, top, picture.width - rng.randrange(8), picture.height - rng.randrange(8)))
        picture.putpixel((rng.randrange(picture.width), rng.randrange(picture.height)), (rng.randrange(256), rng.randrange(256), 0))
        data = io.BytesIO()
        picture.save(data, "PNG", compress_level=1)
        mark = f"mark{rng.getrandbits(64):x}"
        parts = {"title": " ".join(rng.sample(TITLES, 4)), "k": "8"}
        body = b"".join(
            f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode() for name, text in parts.items()
        )
        body += f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'.encode() + data.getvalue()
        return "/encode", body + f"\r\n--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"

    def recommend(self, rng: random.Random) -> tuple[str, bytes, str]:
        return "/recommend", json.dumps({"histories": [rng.sample(self.ids, 8)], "k": 10}).encode(), "application/json"


def run_clients(service: Service, requests: Requests, clients: int, seconds: float, patient: bool) -> dict[str, Any]:
    """Load of some clients for some seconds. `patient` clients wait as long as an answer 429 says."""
    took: dict[str, list[tuple[float, float]]] = {"encode": [], "recommend": []}
    statuses, failures, lock = Counter(), Counter(), threading.Lock()
    started, memory = time.monotonic(), []
    missing_retry_after = 0

    def work(seed: int) -> None:
        nonlocal missing_retry_after
        rng, client = random.Random(seed), Client(service.port)
        while time.monotonic() - started < seconds:
            kind = "encode" if rng.random() < 0.5 else "recommend"
            request = getattr(requests, kind)(rng)
            begun = time.monotonic()
            try:
                status, _, headers = client.ask(*request)
            except Exception as error:
                with lock:
                    failures[type(error).__name__] += 1
                continue
            with lock:
                statuses[status] += 1
                if status == 200:
                    took[kind].append((begun - started, time.monotonic() - begun))
                if status == 429 and "retry-after" not in {name.lower() for name in headers}:
                    missing_retry_after += 1
            if status == 429 and patient:
                time.sleep(float(headers["retry-after"]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append((round(time.monotonic() - started, 1), round(service.rss_mb(), 1)))
        threads[0].join(5)
        time.sleep(0.2)
    figures = {kind: _latency(values, seconds) for kind, values in took.items()}
    return {
        "clients": clients,
        "seconds": seconds,
        **figures,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "failures": dict(failures),
        "answers_429_without_retry_after": missing_retry_after,
        "rss_mb": _memory(memory, seconds),
    }


def _latency(values: list[tuple[float, float]], seconds: float) -> dict[str, float]:
    times = np.array([took for _, took in values]) if values else np.zeros(1)
    p50, p95, p99 = np.percentile(times, [50, 95, 99])
    return {
        "requests": len(values),
        "per_second": round(len(values) / seconds, 2),
        "p50_ms": round(1000 * p50),
        "p95_ms": round(1000 * p95),
        "p99_ms": round(1000 * p99),
        "longest_ms": round(1000 * times.max()),
    }


def _memory(samples: list[tuple[float, float]], seconds: float) -> dict[str, Any]:
    """Memory over time: a dozen samples, the largest, and the slope of the second half."""
    late = np.array([sample for sample in samples if sample[0] >= seconds / 2])
    slope = 60 * np.polyfit(late[:, 0], late[:, 1], 1)[0] if len(late) > 2 else 0.0
    step = max(1, len(samples) // 12)
    return {
        "over_time": samples[::step],
        "largest": max(value for _, value in samples),
        "second_half_mb_per_minute": round(float(slope), 2),
    }


def overload(bundle: Path, requests: Requests, folder: Path, seconds: float) -> dict[str, Any]:
    """64 impatient clients on a queue of 8, then one client."""
    service = Service(bundle, folder / "overload.sqlite", "--set", "queue=8")
    try:
        loaded = run_clients(service, requests, 64, seconds, patient=True)
        time.sleep(1)
        after = run_clients(service, requests, 1, min(seconds, 10), patient=False)
    finally:
        service.end()
    return {"queue": 8, "under_load": loaded, "one_client_afterwards": after}


def kill(bundle: Path, requests: Requests, folder: Path, items: int) -> dict[str, Any]:
    """Append items from 8 clients; kill -9 at a third and at two thirds, start again, repeat what was not acknowledged."""
    waiting, acknowledged, lock = [f"load-{n}" for n in range(items)], {}, threading.Lock()
    statuses, restarts = Counter(), []
    for kill_at in (items // 3, 2 * items // 3, None):
        service = Service(bundle, folder / "kill.sqlite")
        restarts.append(round(service.start_seconds, 1))
        lost = threading.Event()

        def work(service: Service = service, lost: threading.Event = lost) -> None:
            client = Client(service.port)
            while not lost.is_set():
                with lock:
                    if not waiting:
                        return
                    item_id = waiting.pop()
                body = json.dumps({"item_id": item_id, "title": f"{TITLES[len(item_id) % len(TITLES)]} {item_id}"}).encode()
                try:
                    status, found, _ = client.ask("/items", body)
                except Exception:
                    with lock:
                        waiting.append(item_id)
                    lost.set()
                    return
                with lock:
                    statuses[found["results"][0]["status"] if status == 200 else str(status)] += 1
                    if status == 200:
                        acknowledged[item_id] = found["results"][0]["sid"]
                    else:
                        waiting.append(item_id)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        while kill_at is not None and len(acknowledged) < kill_at and any(thread.is_alive() for thread in threads):
            time.sleep(0.002)
        if kill_at is not None:
            service.end(signal.SIGKILL)
        for thread in threads:
            thread.join(120)
    client = Client(service.port)
    about = client.ask("/about")[1]
    kept = sum(client.ask(f"/items/{item_id}")[1].get("sid") == sid for item_id, sid in acknowledged.items())
    service.end()
    return {
        "acknowledged": len(acknowledged),
        "kills": 2,
        "there_with_the_acknowledged_codes": kept,
        "stored": about["appended"],
        "distinct_codes": len({tuple(sid) for sid in acknowledged.values()}),
        "answers": dict(statuses),
        "start_seconds": restarts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pictures", type=Path, required=True, help="folder of .jpg files")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--appends", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    requests = Requests(parsed.pictures, read_table(parsed.bundle / "items.parquet")["item_id"].to_pylist())
    with tempfile.TemporaryDirectory() as folder:
        service = Service(parsed.bundle, Path(folder) / "load.sqlite")
        load_before = os.getloadavg()[0]
        results: dict[str, Any] = {
            "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load_average_before": round(load_before, 2)},
            "items": len(requests.ids),
            "start_seconds": round(service.start_seconds, 1),
        }
        try:
            run_clients(service, requests, 4, min(parsed.seconds, 5), patient=False)  # warm-up, not counted
            results["load"] = run_clients(service, requests, parsed.clients, parsed.seconds, patient=False)
        finally:
            service.end()
        results["overload"] = overload(parsed.bundle, requests, Path(folder), min(parsed.seconds, 30))
        results["kill_9"] = kill(parsed.bundle, requests, Path(folder), parsed.appends)
    write_json(parsed.out, results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
