"""A server on loopback that speaks chat completions and misbehaves on command, for tests and benchmarks of the server generator."""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from mmsid.annotate.generator import GenerationFailure, Generator, Request

FAULTS = ("slow", "busy", "error", "cut", "half_body", "no_choices", "wrong_type", "empty", "null", "hang_up")


class ChatServer:
    """`answer(request) -> text` behind `POST /v1/chat/completions`; a context manager.

    Args:
        share: of requests that end in one of `faults`: at .2 every fifth to arrive, the faults taking turns.
        plan: faults of the first requests, in order of arrival; None = none for that request.
        delay: seconds that every good answer takes.
        models: names that `GET /v1/models` lists; None = the address does not exist.
        dressed: (request, good reply) -> (status, reply that is sent); for servers with manners of their own.

    Attributes:
        seen: (headers, body) of every request; `faults_done`, `good`: what became of them; `most_at_once`: requests under way.
    """

    def __init__(
        self,
        answer: Callable[[Request], str],
        *,
        share: float = 0.0,
        faults: Sequence[str] = FAULTS,
        plan: Sequence[str | None] = (),
        delay: float = 0.0,
        slow: float = 0.3,
        wait: str = "0.05",
        models: Sequence[str] | None = None,
        dressed: Callable[[dict, dict], tuple[int, dict]] = lambda body, reply: (200, reply),
    ) -> None:
        self.answer, self.share, self.faults, self.plan = answer, share, faults, list(plan)
        self.delay, self.slow, self.wait = delay, slow, wait
        self.models, self.dressed = models, dressed
        self.lock = threading.Lock()
        self.seen: list[tuple[dict[str, str], dict]] = []
        self.arrivals: list[float] = []
        self.faults_done: Counter[str] = Counter()
        self.good = self.now = self.most_at_once = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                outer.serve(self)

            def do_GET(self) -> None:
                if outer.models is None:
                    return outer._send(self, 404, {"detail": "Not Found"})
                outer._send(self, 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in outer.models]})

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *args: object) -> None:
                pass  # a client that was cancelled hung up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> ChatServer:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.seen.append(({name.lower(): value for name, value in handler.headers.items()}, body))
            self.arrivals.append(time.monotonic())
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)
            if self.plan:
                fault = self.plan.pop(0)
            else:
                count = len(self.seen)
                spoiled = int(count * self.share) > int((count - 1) * self.share)
                fault = self.faults[self.faults_done.total() % len(self.faults)] if spoiled else None
            if fault is not None:
                self.faults_done[fault] += 1
        try:
            self._spoil(handler, fault, body) if fault else self._good(handler, body)
        finally:
            with self.lock:
                self.now -= 1

    def _good(self, handler: BaseHTTPRequestHandler, body: dict) -> None:
        time.sleep(self.delay)
        text = self.answer(read_request(body))
        with self.lock:
            self.good += 1
        self._send(handler, *self.dressed(body, completion(text)))

    def _spoil(self, handler: BaseHTTPRequestHandler, fault: str, body: dict) -> None:
        if fault == "slow":
            time.sleep(self.slow)
            self._good(handler, body)
        elif fault == "busy":
            self._send(handler, 429, {"error": {"message": "too many requests"}}, {"Retry-After": self.wait})
        elif fault == "error":
            self._send(handler, random.choice((500, 502, 503)), {"error": {"message": "worker died"}})
        elif fault == "cut":  # the connection goes away in the middle of the body
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [{"mess')
            handler.close_connection = True
        elif fault == "hang_up":  # and here before a word was said
            handler.close_connection = True
            handler.connection.close()
        elif fault == "half_body":  # a whole HTTP answer with half a JSON in it
            self._send(handler, 200, completion("x" * 30), cut=40)
        elif fault == "refuse":
            self._send(handler, 400, {"error": {"message": f"picture refused, {handler.headers['Authorization']}"}})
        elif fault == "reasoning":  # a reasoning parser took everything that the model wrote
            data = completion(None)
            data["choices"][0]["message"]["reasoning_content"] = "Let me look at the picture. " * 10
            data["choices"][0]["finish_reason"] = "length"
            self._send(handler, 200, data)
        elif fault == "stranger":
            self._send(handler, 401, {"error": {"message": f"bad key {handler.headers['Authorization']}"}})
        elif fault == "unknown_model":
            self._send(handler, 404, {"error": {"message": f"no model {body['model']}"}})
        else:
            wrong = {
                "no_choices": {"object": "chat.completion"},
                "wrong_type": completion({"caption": 3}),
                "empty": completion(""),
                "null": completion(None),
            }
            self._send(handler, 200, wrong[fault])

    def _send(self, handler: BaseHTTPRequestHandler, status: int, data: dict, headers: dict | None = None, cut: int | None = None) -> None:
        payload = json.dumps(data).encode()[:cut]
        handler.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(payload))} | (headers or {})).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(payload)


def completion(content: object) -> dict:
    message = {"role": "assistant", "content": content}
    return {"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def read_request(body: dict) -> Request:
    """The request that the client was handed, as far as the wire tells."""
    parts = body["messages"][-1]["content"]
    if isinstance(parts, str):
        return Request(parts, (), body["temperature"], body.get("seed", 0))
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    for picture in pictures:
        picture.load()
    text = next(part["text"] for part in parts if part["type"] == "text")
    return Request(text, tuple(pictures), body["temperature"], body.get("seed", 0))


class Batching:
    """What a serving engine does: requests that arrive together are answered in one batch by a generator in process."""

    def __init__(self, generator: Generator, batch_size: int = 16, gather_seconds: float = 0.02) -> None:
        self.generator, self.batch_size, self.gather_seconds = generator, batch_size, gather_seconds
        self.waiting: list[tuple[Request, threading.Event, list]] = []
        self.lock, self.working = threading.Lock(), threading.Lock()

    def __call__(self, request: Request) -> str:
        done, slot = threading.Event(), []
        with self.lock:
            self.waiting.append((request, done, slot))
        time.sleep(self.gather_seconds)
        while not done.is_set():
            with self.working:
                if done.is_set():
                    break
                with self.lock:
                    batch, self.waiting = self.waiting[: self.batch_size], self.waiting[self.batch_size :]
                for (_, event, place), answer in zip(batch, self.generator.generate([request for request, _, _ in batch])):
                    place.append(answer)
                    event.set()
        assert not isinstance(slot[0], GenerationFailure)
        return slot[0]
