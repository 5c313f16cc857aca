"""Any OpenAI-compatible server (vLLM, SGLang, hosted) as a generator, through the official client (extra `serve`).

The world between us and the model is unfriendly: servers are slow, overloaded, restarted, and now and then answer with half a
body or with nothing. A request is tried until its deadline, backing off with full jitter (Brooker, "Exponential Backoff And
Jitter", 2015); a `Retry-After` holds all requests, not only the one it was told to. What still fails is a `GenerationFailure`:
its row is quarantined, and tried again when the job is resumed.
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
_MOST_GARBLED = 4  # an answer that is empty four times running is what this model has to say


class ServerConfig(Section):
    """An OpenAI-compatible server and how it is treated.

    All but `json_schema` and `picture_format` say how the work is done, not what comes out: they are in no manifest, and a draft
    outlives their change.

    Attributes:
        base_url: with the version, `http://127.0.0.1:8000/v1`.
        api_key_env: the environment variable that holds the key. The key is read from there only, and written nowhere; unset is
            fine for servers that ask for none.
        concurrency: requests under way at once.
        timeout_seconds: for one attempt.
        deadline_seconds: for one request, all its attempts and the pauses between them.
        json_schema: ask the server to hold the answer to the record's JSON schema (`response_format`), where it can.
        picture_format: pictures go out re-encoded. `png` shows the model the very pixels that a model in process sees; `jpeg`
            (quality 90) is a fifth to a tenth of the bytes.
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
            raise ValueError("expected http(s)://host[:port]/path, without user, password or query; a key belongs into api_key_env")
        return value


class OpenAIGenerator:
    """Answers through `POST {base_url}/chat/completions`, `concurrency` requests at a time.

    The client lives in an event loop of its own thread, from the first request to `close()`, which cancels whatever is under way.

    Args:
        model: as the server calls it.
        revision: names the weights behind it in `model_id` and so in the cache key; servers do not tell.
        schema: JSON schema of the record, used when `server.json_schema` is set.
        batch_size: how many requests come with one `generate` call.

    Raises:
        ConfigError: the extra `serve` is not installed; later, from `generate`: the server refuses the key, or knows no such model.
        AnnotationError: from `generate`, reason `server_gone`: nothing was answered any more; `cancelled`: `close()` was called.
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
            raise ConfigError("generator: openai needs the official client; install it with: pip install 'mmsid[serve]'") from error
        self._openai = openai
        self.model, self.server, self.max_new_tokens = model, server, max_new_tokens
        self.model_id = f"{model}@{revision or 'server'}"
        self.schema = schema if server.json_schema else None
        self.max_concurrent_calls = -(-server.concurrency // batch_size) + 1  # enough to fill every slot while the last call ends
        self._arguments = {"revision": revision, "max_new_tokens": max_new_tokens, "schema": schema, "batch_size": batch_size}
        self._opening = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.model, self.server, self._arguments)

    @property
    def parameters(self) -> dict[str, Any]:
        """Part of the cache key: token limit, picture format, and the schema when the server enforces it."""
        return {"max_new_tokens": self.max_new_tokens, "picture_format": self.server.picture_format, "json_schema": self.schema}

    def generate(self, requests: list[Request]) -> list[str | GenerationFailure]:
        """Answer in order; may be called from several threads."""
        with self._opening:
            if self._loop is None:
                self._open()
            waiting = asyncio.run_coroutine_threadsafe(self._all(requests), self._loop)
        try:
            return waiting.result()
        except CancelledError:
            raise AnnotationError("cancelled", f"requests to {self.server.base_url} were cancelled") from None

    def close(self) -> None:
        """Cancel what is under way and hang up. A later `generate` connects anew."""
        with self._opening:
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._hang_up(), loop).result()
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
        self._not_before = 0.0  # when the server will hear us again, on the loop's clock
        self._lost_in_a_row = 0

    async def _hang_up(self) -> None:
        running = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._client.close()

    async def _all(self, requests: list[Request]) -> list[str | GenerationFailure]:
        asked = [asyncio.ensure_future(self._one(request)) for request in requests]
        try:
            return await asyncio.gather(*asked)
        finally:
            for one in asked:
                one.cancel()

    async def _one(self, request: Request) -> str | GenerationFailure:
        seen = GenerationFailure("server_timeout", "no attempt came to an end")
        async with self._slots:
            deadline = asyncio.get_running_loop().time() + self.server.deadline_seconds
            body = await asyncio.to_thread(self._body, request)  # encoding a picture takes longer than sending it
            garbled = 0
            for attempt in itertools.count():
                answer = await self._attempt(body, deadline)
                if not isinstance(answer, GenerationFailure):
                    self._lost_in_a_row = 0
                    return answer
                if answer.reason not in TRANSIENT:
                    return answer
                seen = answer
                garbled += answer.reason == "server_garbled"
                pause = max(0.0, self._not_before - asyncio.get_running_loop().time())
                pause += random.uniform(0.0, min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**attempt))  # noise in time, never in rows
                if garbled >= _MOST_GARBLED or asyncio.get_running_loop().time() + pause >= deadline:
                    break
                await asyncio.sleep(pause)
        self._lost_in_a_row += seen.reason != "server_garbled"
        if self._lost_in_a_row >= 2 * self.server.concurrency:
            raise AnnotationError(
                "server_gone",
                f"{self.server.base_url} left {self._lost_in_a_row} requests in a row unanswered, each tried for up to "
                f"{self.server.deadline_seconds:g} s (last: {seen.reason}, {seen.detail}). Finished rows are kept: see to the server "
                "and run again.",
            )
        return seen

    async def _attempt(self, body: dict[str, Any], deadline: float) -> str | GenerationFailure:
        """One request over the wire. A failure whose reason is in `TRANSIENT` may be tried again."""
        openai, loop = self._openai, asyncio.get_running_loop()
        if self._not_before > loop.time():
            await asyncio.sleep(min(self._not_before, deadline) - loop.time())
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._client.chat.completions.with_raw_response.create(**body)
            return read_answer(response.text)
        except (TimeoutError, openai.APITimeoutError):
            return GenerationFailure("server_timeout", f"no answer within {self.server.timeout_seconds:g} s")
        except openai.APIConnectionError as error:
            return GenerationFailure("server_unreachable", f"the connection failed ({type(error.__cause__ or error).__name__})")
        except openai.APIStatusError as error:
            status, said = error.status_code, str(error.message).replace(self._key, "***")[:200]
            self._hold(error.response.headers)
            if status in (401, 403):
                raise ConfigError(
                    f"{self.server.base_url} refuses access ({status}); set the environment variable {self.server.api_key_env}"
                ) from None
            if status == 404:
                raise ConfigError(f"{self.server.base_url} has no model {self.model!r} ({said}); correct model or base_url") from None
            if status == 429:
                return GenerationFailure("server_busy", f"{status}: {said}")
            passing = status in (408, 409, 425) or status >= 500
            return GenerationFailure("server_error" if passing else "server_refused", f"{status}: {said}")

    def _hold(self, headers: Any) -> None:
        """Honour `Retry-After`: one overloaded server is overloaded for all our requests."""
        seconds = retry_after(headers.get("retry-after"))
        if seconds is not None:
            self._not_before = max(self._not_before, asyncio.get_running_loop().time() + seconds)

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


def _again(model: str, server: ServerConfig, arguments: dict[str, Any]) -> OpenAIGenerator:
    return OpenAIGenerator(model, server, **arguments)


def data_url(picture: Image.Image, picture_format: Literal["png", "jpeg"]) -> str:
    """The picture's pixels, and nothing else of its file, as `data:image/...;base64,...`."""
    encoded = io.BytesIO()
    picture.save(encoded, picture_format, **({"quality": 90} if picture_format == "jpeg" else {"compress_level": 1}))
    return f"data:image/{picture_format};base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}"


def read_answer(body: str) -> str | GenerationFailure:
    """The text in a chat completion; `server_garbled` when the body is cut, of the wrong shape, or holds no text.

    A model that declines through the protocol's own field has its refusal handed on, for the job to judge.
    """
    try:
        choice = json.loads(body)["choices"][0]
        message, ended = choice["message"], choice.get("finish_reason")
        content = message.get("refusal") or message["content"]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return GenerationFailure("server_garbled", f"not a chat completion: {body[:100]}")
    if ended == "content_filter":
        return GenerationFailure("content_filter", "the server's own filter held the answer back")
    if not isinstance(content, str) or not content.strip():
        return GenerationFailure("server_garbled", f"a chat completion without text: {str(content)[:100]}")
    return content


def retry_after(value: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for, given as seconds or as a date; None when there is no sense in it."""
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
