"""Generator for OpenAI-compatible servers (vLLM, SGLang, hosted), through the official client (extra `openai`).

A request is retried until its deadline with exponential back-off and full jitter (Brooker, "Exponential Backoff And Jitter", 2015).
A `Retry-After` header delays all requests. A request that still fails becomes a `GenerationFailure`: its row is quarantined, and
retried when the job resumes. `server_checks` compares what came back with what was asked for.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import threading
from collections import Counter
from concurrent.futures import CancelledError
from typing import Any

from mmsid.annotate.generator import TRANSIENT, Answer, GenerationFailure, Request
from mmsid.annotate.server_checks import ServerChecks, named, same_model
from mmsid.annotate.server_config import ServerConfig
from mmsid.annotate.server_wire import ServerAnswer, error_words, messages, read_answer, retry_after
from mmsid.errors import AnnotationError, ConfigError

_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.5, 30.0  # seconds
_MAX_GARBLED = 4  # a model that gives this many empty answers to one request is not asked again
_LEAST_PATIENCE = 8  # equal errors before the first answer after which a server counts as broken


class OpenAIGenerator:
    """Generates with `POST {base_url}/chat/completions`, `concurrency` requests at a time.

    The client runs in an event loop in its own thread, from the first request to `close()`, which cancels pending requests.

    Args:
        model: name of the model on the server.
        revision: name of its weights for `model_id` and the cache key, because servers do not report it.
        schema: JSON schema of the record; sent if `server.json_schema` is set.
        batch_size: number of requests per `generate` call.
        system_prompt: sent before every prompt.
        template_arguments: sent as `chat_template_kwargs`, which vLLM, SGLang and llama.cpp hand to the chat template.

    Raises:
        ConfigError: the extra `openai` is not installed; from `generate`: the server refuses the key or the JSON schema, or another
            model answers.
        AnnotationError: from `generate`, reason `server_gone`: the server stopped answering; `server_broken`: it never answered
            anything but one error; `cancelled`: `close()` was called.
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
        system_prompt: str | None = None,
        template_arguments: dict[str, Any] | None = None,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError("generator: openai needs the official client; install it with: pip install 'mmsid[openai]'") from error
        self._openai = openai
        self.model, self.server, self.max_new_tokens = model, server, max_new_tokens
        self.system_prompt, self.template_arguments = system_prompt, template_arguments or {}
        self.model_id = f"{model}@{revision or 'server'}"
        self.schema = schema if server.json_schema else None
        self.max_concurrent_calls = -(-server.concurrency // batch_size) + 1  # enough to keep all requests busy while the last call ends
        self._arguments = {"revision": revision, "max_new_tokens": max_new_tokens, "schema": schema, "batch_size": batch_size}
        self._arguments |= {"system_prompt": system_prompt, "template_arguments": template_arguments}
        self._opening = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        patience = max(_LEAST_PATIENCE, 2 * server.concurrency)
        self._checks = ServerChecks(model, server.base_url, max_new_tokens, self.schema, patience)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.model, self.server, self._arguments)

    @property
    def parameters(self) -> dict[str, Any]:
        """Part of the cache key: token limit, picture format, and the schema if the server enforces it."""
        extra = {"system_prompt": self.system_prompt, "template_arguments": self.template_arguments}
        return {
            "max_new_tokens": self.max_new_tokens,
            "picture_format": self.server.picture_format,
            "json_schema": self.schema,
            **{name: value for name, value in extra.items() if value},
        }

    def take_notes(self) -> Counter[str]:
        """Counts since the last call: answers per model that answered, over the token limit, and inside and outside the schema."""
        return self._checks.take_notes()

    def generate(self, requests: list[Request]) -> list[Answer | GenerationFailure]:
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
        self._listing = asyncio.Lock()
        self._listed: list[str] | None = None  # models of the server, once they were asked for

    async def _disconnect(self) -> None:
        running = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._client.close()

    async def _all(self, requests: list[Request]) -> list[Answer | GenerationFailure]:
        tasks = [asyncio.ensure_future(self._one(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, request: Request) -> Answer | GenerationFailure:
        failure = GenerationFailure("server_timeout", "no attempt finished")
        async with self._slots:
            deadline = asyncio.get_running_loop().time() + self.server.deadline_seconds
            body = await asyncio.to_thread(self._body, request)  # in a thread, because encoding pictures would block the event loop
            garbled, limit_names = 0, set()
            for attempt in itertools.count():
                answer = await self._attempt(body, deadline, limit_names)
                if isinstance(answer, ServerAnswer):
                    self._consecutive_failures = 0
                    self._checks.add_answer(answer)
                    return Answer(answer.text, log_probability=answer.log_probability)
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

    async def _attempt(self, body: dict[str, Any], deadline: float, limit_names: set[str]) -> ServerAnswer | GenerationFailure:
        """Send one request. Failures with a reason in `TRANSIENT` may be retried.

        `limit_names` collects the names of the token limit that this request was sent with. A name that the server refuses or ignores
        is replaced by the other one, and log-probabilities that it refuses are left out, for this and all later requests.
        """
        while True:
            limit, wants = self._checks.limit_name, self._checks.log_probabilities
            limit_names.add(limit)
            options = {limit: self.max_new_tokens, **({"logprobs": True, "top_logprobs": 1} if wants else {})}
            try:
                answer = await self._send(body | options, deadline)
            except self._openai.APIStatusError as error:
                status, words = error.status_code, error_words(error.response.text).replace(self._key, "***")
                self._delay(error.response.headers)
                if status in (400, 422):
                    if wants and "logprobs" in words:
                        self._checks.log_probabilities = False
                        continue
                    if limit in words and self._checks.switch_limit_name(limit_names):
                        continue
                return await self._failure(status, words)
            if isinstance(answer, ServerAnswer):
                await self._check_model(answer)
                self._checks.answered += 1
                if self._checks.ignores_limit(answer, limit) and self._checks.limit_name not in limit_names:
                    continue
            return answer

    async def _send(self, body: dict[str, Any], deadline: float) -> ServerAnswer | GenerationFailure:
        """Post one request. Raises APIStatusError for an error of the server."""
        loop = asyncio.get_running_loop()
        if self._retry_at > loop.time():
            await asyncio.sleep(min(self._retry_at, deadline) - loop.time())
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._client.chat.completions.with_raw_response.create(**body)
            return read_answer(response.text)
        except (TimeoutError, self._openai.APITimeoutError):
            return GenerationFailure("server_timeout", f"no answer within {self.server.timeout_seconds:g} s")
        except self._openai.APIConnectionError as error:
            cause = error.__cause__ or error
            return GenerationFailure("server_unreachable", f"the connection failed ({type(cause).__name__}: {cause})"[:300])

    async def _failure(self, status: int, words: str) -> GenerationFailure:
        """The failure of a request that the server answered with an error. Raises for errors that all requests would meet."""
        if status in (401, 403):
            raise ConfigError(
                f"{self.server.base_url} refuses access ({status}: {words}); set the environment variable {self.server.api_key_env}"
            )
        if status == 404:
            raise self._checks.wrong_model(await self._models(), f"{status}: {words}")
        if status == 429:
            return GenerationFailure("server_busy", f"{status}: {words}")
        self._checks.check_error(status, words)
        if status >= 500 or status in (408, 409, 425):
            return GenerationFailure("server_error", f"{status}: {words}")
        if self.schema is not None and any(word in words for word in ("response_format", "json_schema")):
            raise ConfigError(f"{self.server.base_url} refuses the JSON schema ({status}: {words}); set server.json_schema: false")
        if not self._checks.answered:
            listed = await self._models()
            known = any(same_model(self.model, name) for name in listed) if listed else not named(self.model, words)
            if not known:
                raise self._checks.wrong_model(listed, f"{status}: {words}")
        return GenerationFailure("server_refused", f"{status}: {words}")

    async def _check_model(self, answer: ServerAnswer) -> None:
        """Raise for the answer of another model, unless the server lists the configured name (as a proxy does with its aliases)."""
        if answer.model is None or same_model(self.model, answer.model):
            return
        listed = await self._models()
        if self.model not in (listed or []):
            raise self._checks.wrong_model(listed, f"{answer.model!r} answered instead")

    async def _models(self) -> list[str]:
        """Names of the models that the server lists; empty if it lists none."""
        async with self._listing:
            if self._listed is None:
                try:
                    async with asyncio.timeout(self.server.timeout_seconds):
                        self._listed = [str(model.id) for model in (await self._client.models.list()).data]
                except (TimeoutError, AttributeError, TypeError, ValueError, self._openai.OpenAIError):
                    self._listed = []
            return self._listed

    def _delay(self, headers: Any) -> None:
        """Delay all requests by the header `Retry-After`."""
        seconds = retry_after(headers.get("retry-after"))
        if seconds is not None:
            self._retry_at = max(self._retry_at, asyncio.get_running_loop().time() + seconds)

    def _body(self, request: Request) -> dict[str, Any]:
        """The request without its token limit."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages(request, self.server.picture_format, self.system_prompt),
            "temperature": request.temperature,
        }
        if request.temperature > 0:
            body["seed"] = request.seed
        if self.schema is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "record", "schema": self.schema, "strict": True}}
        if self.template_arguments:
            body["extra_body"] = {"chat_template_kwargs": self.template_arguments}
        return body


def _rebuild(model: str, server: ServerConfig, arguments: dict[str, Any]) -> OpenAIGenerator:
    return OpenAIGenerator(model, server, **arguments)
