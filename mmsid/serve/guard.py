"""Middleware of the service: key, origin, size and time limits, admission, security headers, metrics.

Without a key only a person on this machine may use the service. A page of another site that this person has open is kept out, too: the
`Host` must be a loopback name (no DNS rebinding), and an `Origin` must be the service itself (no forged requests).
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import math
import time
from typing import Any

from mmsid.serve.metrics import Metrics
from mmsid.serve.settings import KEY_VARIABLE, ServeSettings

_log = logging.getLogger("mmsid.serve")
OPEN = ("/", "/docs", "/openapi.json", "/healthz")  # pages and state without data
WORK = ("/encode", "/recommend", "/items")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
API_POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")


class BodyTooLong(Exception):
    """The body is longer than the limit."""


class Guard:
    """ASGI middleware around the routes."""

    def __init__(self, app: Any, settings: ServeSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.in_flight = 0
        self.mean_seconds = 0.5

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no websockets
        answer = _Answer(send)
        started = time.perf_counter()
        try:
            await self._answer(scope, receive, answer)
        except Exception:
            _log.exception("%s %s failed", scope["method"], _label(scope["path"]))
            await answer.refuse(500, "internal", "the service failed; its log has the reason")
        finally:
            self.metrics.request(_label(scope["path"]), answer.status, time.perf_counter() - started)

    async def _answer(self, scope: dict[str, Any], receive: Any, answer: _Answer) -> None:
        refusal = self._refusal(scope)
        if refusal is not None:
            await answer.refuse(*refusal)
        elif scope["method"] == "POST" and scope["path"] in WORK:
            await self._work(scope, receive, answer)
        else:
            await self.app(scope, receive, answer)

    async def _work(self, scope: dict[str, Any], receive: Any, answer: _Answer) -> None:
        """Let one request in, under the limits of size and time."""
        settings = self.settings
        if self.in_flight >= settings.queue:
            self.metrics.rejected.inc()
            await answer.refuse(429, "overloaded", f"{self.in_flight} requests are waiting; try again", self.retry_after())
            return
        self.in_flight += 1
        self.metrics.in_flight.set(self.in_flight)
        started = time.perf_counter()
        try:
            async with asyncio.timeout(settings.seconds):
                await self.app(scope, _limited(receive, settings.body_bytes), answer)
            self.mean_seconds += 0.1 * (time.perf_counter() - started - self.mean_seconds)
        except BodyTooLong:
            await answer.refuse(413, "body_too_long", f"the body has more than {settings.body_bytes:,} bytes; send fewer pictures at once")
        except TimeoutError:
            await answer.refuse(504, "timeout", f"no answer within {settings.seconds:g} seconds; send the request again")
        finally:
            self.in_flight -= 1
            self.metrics.in_flight.set(self.in_flight)

    def retry_after(self) -> int:
        """Whole seconds until a request that is refused now has a chance."""
        return min(30, max(1, math.ceil(self.mean_seconds)))

    def _refusal(self, scope: dict[str, Any]) -> tuple[int, str, str] | None:
        """Status, code and text of a request that is refused by its headers."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self.settings.api_key is not None:
            if scope["path"] not in OPEN and not _has_key(headers, self.settings.api_key):
                return 401, "key", f"send the key of {KEY_VARIABLE} as `Authorization: Bearer KEY` or `X-API-Key: KEY`"
        else:
            host = headers.get("host", "")
            if not _is_loopback(host):
                return 403, "host", f"without a key ({KEY_VARIABLE}) only requests to a loopback name are answered, not to {host[:100]!r}"
            origin = headers.get("origin")
            if origin is not None and origin.partition("://")[2] != host:
                return 403, "origin", "without a key, pages of other origins are not answered"
        length = headers.get("content-length", "")
        if length and (not length.isdigit() or int(length) > self.settings.body_bytes):
            return 413, "body_too_long", f"the body has {length[:20]} bytes, at most {self.settings.body_bytes:,} are read"
        return None


class _Answer:
    """`send` with security headers. It knows whether an answer has begun, and its status."""

    def __init__(self, send: Any) -> None:
        self._send, self.status = send, 0

    async def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            names = {name.lower() for name, _ in message["headers"]}
            message = message | {"headers": [*message["headers"], *(pair for pair in (*HEADERS, API_POLICY) if pair[0] not in names)]}
        await self._send(message)

    async def refuse(self, status: int, code: str, detail: str, retry_after: int | None = None) -> None:
        """Send an error, unless an answer has begun."""
        if self.status:
            return
        body = json.dumps({"error": code, "detail": detail}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(b"connection", b"close")] if status == 413 else []
        headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
        headers += [] if retry_after is None else [(b"retry-after", str(retry_after).encode())]
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def is_loopback_host(host: str) -> bool:
    """Whether a host name or address is one of this machine alone."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    """`is_loopback_host` for a `Host` header, with or without a port."""
    name, sign, port = host.rpartition(":")
    return is_loopback_host(name if sign and port.isdigit() and not host.endswith("]") else host)


def _has_key(headers: dict[str, str], key: str) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    given = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return hmac.compare_digest(given.encode(), key.encode())


def _limited(receive: Any, limit: int) -> Any:
    """`receive` that raises BodyTooLong beyond `limit` bytes."""
    seen = 0

    async def counted() -> dict[str, Any]:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise BodyTooLong
        return message

    return counted


def _label(path: str) -> str:
    if path in (*OPEN, *WORK, "/metrics", "/about"):
        return path
    return "/items/{id}" if path.startswith("/items/") else "other"
