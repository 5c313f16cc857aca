"""Generator for OpenAI-compatible servers (vLLM, SGLang, hosted), through the official client (extra `openai`).

A request is retried until its deadline with exponential back-off and full jitter (Brooker, "Exponential Backoff And Jitter", 2015).
A `Retry-After` header delays all requests. A request that still fails becomes a `GenerationFailure`: its row is quarantined, and
retried when the job resumes.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import io
import itertools
import json
import os
import random
import threading
import time
from concurrent.futures import CancelledError
from typing import Any, Literal
from urllib.parse import urlsplit

from PIL import Image
from pydantic import Field, field_validator

from mmsid.annotate.generator import TRANSIENT, GenerationFailure, Request
from mmsid.config import Section
from mmsid.errors import AnnotationError, ConfigError

_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.5, 30.0  # seconds
_MAX_GARBLED = 4  # a model that gives this many empty answers to one request is not asked again


class ServerConfig(Section):
    """Address and limits of an OpenAI-compatible server.

    Only `json_schema` and `picture_format` influence the output. The other keys are not part of the manifest, so a draft can be resumed
    after they change.

    Attributes:
        base_url: address with the version, for example `http://127.0.0.1:8000/v1`.
        api_key_env: environment variable that contains the key. The key is never written. Leave the variable unset for servers
            without keys.
        concurrency: number of concurrent requests.
        timeout_seconds: time limit of one attempt.
        deadline_seconds: time limit of one request, including all attempts and pauses.
        json_schema: send the record's JSON schema as `response_format`.
        picture_format: encoding of the pictures in requests. `png` is lossless; `jpeg` (quality 90) takes a fifth to a tenth of the
            bytes.
    """

    base_url: str = Field(exclude=True)
    api_key_env: str = Field(default="OPENAI_API_KEY", exclude=True)
    concurrency: int = Field(default=16, ge=1, exclude=True)
    timeout_seconds: float = Field(default=120.0, gt=0.0, exclude=True)
    deadline_seconds: float = Field(default=600.0, gt=0.0, exclude=True)
    json_schema: bool = False
    picture_format: Literal["png", "jpeg"] = "png"

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ValueError(
                "expected http(s)://host[:port]/path, without user, password or query; put a key into the variable named by api_key_env"
            )
        return value


class OpenAIGenerator:
    """Generates with `POST {base_url}/chat/completions`, `concurrency` requests at a time.

    The client runs in an event loop in its own thread, from the first request to `close()`, which cancels pending requests.

    Args:
        model: name of the model on the server.
        revision: name of its weights for `model_id` and the cache key, because servers do not report it.
        schema: JSON schema of the record; sent if `server.json_schema` is set.
        batch_size: number of requests per `generate` call.

    Raises:
        ConfigError: the extra `openai` is not installed; from `generate`: the server refuses the key or has no such model.
        AnnotationError: from `generate`, reason `server_gone`: the server stopped answering; `cancelled`: `close()` was called.
    """

    def __init__(
        self,
        model: str,
        server: ServerConfig,
        *,
        revision: str | None = None,
        max_new_tokens: int = 256,
        schema: dict[str, Any] | None = None,
        batch_size: int = 16,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError("generator: openai needs the official client; install it with: pip install 'mmsid[openai]'") from error
        self._openai = openai
        self.model, self.server, self.max_new_tokens = model, server, max_new_tokens
        self.model_id = f"{model}@{revision or 'server'}"
        self.schema = schema if server.json_schema else None
        self.max_concurrent_calls = -(-server.concurrency // batch_size) + 1  # enough to keep all requests busy while the last call ends
        self._arguments = {"revision": revision, "max_new_tokens": max_new_tokens, "schema": schema, "batch_size": batch_size}
        self._opening = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.model, self.server, self._arguments)

    @property
    def parameters(self) -> dict[str, Any]:
        """Part of the cache key: token limit, picture format, and the schema if the server enforces it."""
        return {"max_new_tokens": self.max_new_tokens, "picture_format": self.server.picture_format, "json_schema": self.schema}

    def generate(self, requests: list[Request]) -> list[str | GenerationFailure]:
        """Generate answers in the order of `requests`. Thread-safe."""
        with self._opening:
            if self._loop is None:
                self._open()
            waiting = asyncio.run_coroutine_threadsafe(self._all(requests), self._loop)
        try:
            return waiting.result()
        except CancelledError:
            raise AnnotationError("cancelled", f"requests to {self.server.base_url} were cancelled") from None

    def close(self) -> None:
        """Cancel pending requests and disconnect. A later `generate` reconnects."""
        with self._opening:
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._disconnect(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
            loop.close()

    def _open(self) -> None:
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, name="openai", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._connect(), loop).result()
        self._loop = loop

    async def _connect(self) -> None:
        self._key = os.environ.get(self.server.api_key_env) or "none"
        self._client = self._openai.AsyncOpenAI(
            base_url=self.server.base_url, api_key=self._key, timeout=self.server.timeout_seconds, max_retries=0
        )
        self._slots = asyncio.Semaphore(self.server.concurrency)
        self._retry_at = 0.0  # event-loop time before which no request is sent
        self._consecutive_failures = 0

    async def _disconnect(self) -> None:
        running = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._client.close()

    async def _all(self, requests: list[Request]) -> list[str | GenerationFailure]:
        tasks = [asyncio.ensure_future(self._one(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, request: Request) -> str | GenerationFailure:
        failure = GenerationFailure("server_timeout", "no attempt finished")
        async with self._slots:
            deadline = asyncio.get_running_loop().time() + self.server.deadline_seconds
            body = await asyncio.to_thread(self._body, request)  # in a thread, because encoding pictures would block the event loop
            garbled = 0
            for attempt in itertools.count():
                answer = await self._attempt(body, deadline)
                if not isinstance(answer, GenerationFailure):
                    self._consecutive_failures = 0
                    return answer
                if answer.reason not in TRANSIENT:
                    return answer
                failure = answer
                garbled += answer.reason == "server_garbled"
                pause = max(0.0, self._retry_at - asyncio.get_running_loop().time())
                pause += random.uniform(0.0, min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**attempt))  # jitter changes the timing only
                if garbled >= _MAX_GARBLED or asyncio.get_running_loop().time() + pause >= deadline:
                    break
                await asyncio.sleep(pause)
        self._consecutive_failures += failure.reason != "server_garbled"
        if self._consecutive_failures >= 2 * self.server.concurrency:
            raise AnnotationError(
                "server_gone",
                f"{self.server.base_url} failed to answer {self._consecutive_failures} requests in a row, each tried for up to "
                f"{self.server.deadline_seconds:g} s (last: {failure.reason}, {failure.detail}). Finished rows are kept: restart the "
                "server and run again.",
            )
        return failure

    async def _attempt(self, body: dict[str, Any], deadline: float) -> str | GenerationFailure:
        """Send one request. Failures with a reason in `TRANSIENT` may be retried."""
        openai, loop = self._openai, asyncio.get_running_loop()
        if self._retry_at > loop.time():
            await asyncio.sleep(min(self._retry_at, deadline) - loop.time())
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._client.chat.completions.with_raw_response.create(**body)
            return read_answer(response.text)
        except (TimeoutError, openai.APITimeoutError):
            return GenerationFailure("server_timeout", f"no answer within {self.server.timeout_seconds:g} s")
        except openai.APIConnectionError as error:
            return GenerationFailure("server_unreachable", f"the connection failed ({type(error.__cause__ or error).__name__})")
        except openai.APIStatusError as error:
            status, message = error.status_code, str(error.message).replace(self._key, "***")[:200]
            self._delay(error.response.headers)
            if status in (401, 403):
                raise ConfigError(
                    f"{self.server.base_url} refuses access ({status}); set the environment variable {self.server.api_key_env}"
                ) from None
            if status == 404:
                raise ConfigError(f"{self.server.base_url} has no model {self.model!r} ({message}); correct model or base_url") from None
            if status == 429:
                return GenerationFailure("server_busy", f"{status}: {message}")
            transient = status in (408, 409, 425) or status >= 500
            return GenerationFailure("server_error" if transient else "server_refused", f"{status}: {message}")

    def _delay(self, headers: Any) -> None:
        """Delay all requests by the header `Retry-After`."""
        seconds = retry_after(headers.get("retry-after"))
        if seconds is not None:
            self._retry_at = max(self._retry_at, asyncio.get_running_loop().time() + seconds)

    def _body(self, request: Request) -> dict[str, Any]:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(picture, self.server.picture_format)}} for picture in request.pictures
        ]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": request.prompt}]}],
            "max_completion_tokens": self.max_new_tokens,
            "temperature": request.temperature,
        }
        if request.temperature > 0:
            body["seed"] = request.seed
        if self.schema is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "record", "schema": self.schema, "strict": True}}
        return body


def _rebuild(model: str, server: ServerConfig, arguments: dict[str, Any]) -> OpenAIGenerator:
    return OpenAIGenerator(model, server, **arguments)


def data_url(picture: Image.Image, picture_format: Literal["png", "jpeg"]) -> str:
    """Encode the pixels as `data:image/...;base64,...`. Metadata of the file is not sent."""
    encoded = io.BytesIO()
    picture.save(encoded, picture_format, **({"quality": 90} if picture_format == "jpeg" else {"compress_level": 1}))
    return f"data:image/{picture_format};base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}"


def read_answer(body: str) -> str | GenerationFailure:
    """Text of a chat completion, or a failure.

    The failures: `server_garbled` for a truncated or malformed body or one without text, `reasoning_only` for a model that reasoned and
    gave no answer, `content_filter`. The text of the field `refusal` is returned like an answer; the job detects refusals.
    """
    try:
        choice = json.loads(body)["choices"][0]
        message, ended = choice["message"], choice.get("finish_reason")
        content = message.get("refusal") or message["content"]
        reasoning = message.get("reasoning_content") or message.get("reasoning")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return GenerationFailure("server_garbled", f"not a chat completion: {body[:100]}")
    if ended == "content_filter":
        return GenerationFailure("content_filter", "the content filter of the server blocked the answer")
    if not isinstance(content, str) or not content.strip():
        if isinstance(reasoning, str) and reasoning.strip():
            cut = "its tokens ran out; raise max_new_tokens, or" if ended == "length" else "raise max_new_tokens, or"
            return GenerationFailure(
                "reasoning_only",
                f"the model wrote {len(reasoning):,} characters of reasoning and no answer: {cut} switch the reasoning off on the server",
            )
        return GenerationFailure("server_garbled", f"a chat completion without text: {str(content)[:100]}")
    return content


def retry_after(value: str | None) -> float | None:
    """Seconds of a `Retry-After` header, given as seconds or as a date; None if it is invalid."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return seconds if 0.0 < seconds < 86_400.0 else None
