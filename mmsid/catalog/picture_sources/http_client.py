"""One HTTP request for one picture: redirects, time limit, byte limits, and failures as reasons.

Proxies of the environment are not used, because they would resolve names themselves. Nothing that identifies the user is sent.
"""

from __future__ import annotations

import contextlib
import email.utils
import ssl
import threading
import time
import zlib
from collections.abc import Iterator
from urllib.parse import quote, urljoin, urlsplit

import httpcore2

from mmsid._version import __version__
from mmsid.catalog.config import PictureLimits
from mmsid.catalog.picture_sources.addresses import CheckedBackend, Connector, Resolver, connect, resolve
from mmsid.catalog.picture_sources.reasons import refusal
from mmsid.errors import PictureError

MAX_REDIRECTS = 5
_URL_CHARACTERS = "/%:@!$&'()*+,;=~?[]"  # what a URL may contain unquoted
_HEADERS = [
    (b"User-Agent", f"mmsid/{__version__}".encode()),
    (b"Accept", b"image/*, */*;q=0.5"),
    (b"Accept-Encoding", b"identity"),
]
_REASON_OF_STATUS = dict.fromkeys((401, 402, 403, 407, 451), "http_403") | dict.fromkeys((404, 410), "http_404") | {429: "http_429"}
_REASON_OF_STATUS |= {408: "timeout", 425: "http_429"}


class DownloadError(PictureError):
    """A failed try. `again`: whether another may succeed. `retry_after`: seconds that the server asks to wait, or 0."""

    def __init__(self, reason: str, url: str, detail: str = "", *, again: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(reason, str(refusal(reason, url, detail)), detail)
        self.again = again
        self.retry_after = retry_after


class HttpClient:
    """A pool of connections to public hosts. Threads may share it.

    Args:
        limits: `max_bytes` per picture, `max_total_bytes` of all, `connections`, `allow_private_hosts`.
        resolver, connector: look-up of names and opening of connections, exchanged in tests.
    """

    def __init__(self, limits: PictureLimits, resolver: Resolver = resolve, connector: Connector = connect) -> None:
        self.limits = limits
        self._backend = CheckedBackend(limits.allow_private_hosts, resolver, connector)
        self._pool = httpcore2.ConnectionPool(
            httpcore2.default_ssl_context(),
            max_connections=limits.connections,
            max_keepalive_connections=limits.connections,
            keepalive_expiry=30,
            network_backend=self._backend,
        )
        self._total = 0
        self._lock = threading.Lock()

    def get(self, url: str, seconds: float) -> bytes:
        """The body of the picture at a URL, within `seconds`. At most five redirects are followed, and each target is checked.

        Raises:
            DownloadError: any failure, as a reason.
        """
        self.count(0, url)
        self._backend.set_deadline(time.monotonic() + seconds)
        target = url
        for _ in range(MAX_REDIRECTS + 1):
            parsed = checked_url(target)
            with self._failures(url), self._pool.stream("GET", parsed, headers=[(b"Host", _host(parsed)), *_HEADERS]) as response:
                headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
                location = headers.get(b"location")
                if response.status in (301, 302, 303, 307, 308) and location:
                    target = urljoin(target, location.encode("latin-1").decode("utf-8", "replace"))
                    continue
                if response.status != 200:
                    raise _status_error(response.status, headers, url)
                return self._body(response, headers, url)
        raise DownloadError("too_many_redirects", url)

    def _body(self, response: httpcore2.Response, headers: dict[bytes, str], url: str) -> bytes:
        limit = self.limits.max_bytes
        length = headers.get(b"content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise DownloadError("too_many_bytes", url, f"{int(length):,} bytes")
        body = bytearray()
        for part in response.iter_stream():
            self.count(len(part), url)
            body += part
            if len(body) > limit:
                raise DownloadError("too_many_bytes", url, f"more than {limit:,} bytes")
        encoding = headers.get(b"content-encoding", "identity").strip().lower()
        return bytes(body) if encoding in ("identity", "") else _decompressed(bytes(body), limit, url)

    def count(self, size: int, url: str) -> None:
        """Add to the bytes of the run. Raises DownloadError `total_limit` when there are too many."""
        with self._lock:
            self._total += size
            if self._total > self.limits.max_total_bytes:
                raise DownloadError("total_limit", url)

    @contextlib.contextmanager
    def _failures(self, url: str) -> Iterator[None]:
        """Turns exceptions of httpcore2 and of the checks into a DownloadError."""
        try:
            yield
        except DownloadError:
            raise
        except PictureError as error:
            again = error.reason == "dns" and error.detail != "unknown host"
            raise DownloadError(error.reason, url, error.detail, again=again) from None
        except httpcore2.TimeoutException:
            raise DownloadError("timeout", url, again=True) from None
        except httpcore2.LocalProtocolError:
            raise DownloadError("bad_url", url) from None
        except Exception as error:  # of httpcore2, or of its parser for what a hostile server sends
            if isinstance(error, httpcore2.ConnectError) and error.args and isinstance(error.args[0], ssl.SSLError):
                raise DownloadError("tls", url, getattr(error.args[0], "reason", None) or "") from None
            raise DownloadError("connection", url, type(error).__name__, again=True) from None

    def close(self) -> None:
        """Close all connections. Requests under way fail."""
        self._backend.abort()
        self._pool.close()


def checked_url(url: str) -> httpcore2.URL:
    """A parsed http or https URL, with characters quoted that a URL must not contain.

    Raises:
        DownloadError: `scheme`, or `bad_url` if it has a user name or password, no host, or cannot be parsed.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
        if parts.scheme not in ("http", "https"):
            raise DownloadError("scheme", url, parts.scheme)
        if not host or parts.username is not None or parts.password is not None:
            raise DownloadError("bad_url", url)
        host = host if host.isascii() else host.encode("idna").decode("ascii")
        target = quote(parts.path or "/", safe=_URL_CHARACTERS) + (f"?{quote(parts.query, safe=_URL_CHARACTERS)}" if parts.query else "")
        return httpcore2.URL(scheme=parts.scheme, host=host, port=port, target=target)
    except (ValueError, UnicodeError):
        raise DownloadError("bad_url", url) from None


def _host(url: httpcore2.URL) -> bytes:
    host = b"[%b]" % url.host if b":" in url.host else url.host
    return host if url.port is None or url.port == {b"http": 80, b"https": 443}[url.scheme] else b"%b:%d" % (host, url.port)


def _status_error(status: int, headers: dict[bytes, str], url: str) -> DownloadError:
    reason = "http_5xx" if 500 <= status < 600 else _REASON_OF_STATUS.get(status, "http_status")
    wait = _seconds_to_wait(headers.get(b"retry-after", ""))
    detail = f"HTTP {status}" + (f", retry after {wait:.0f} s" if wait else "")
    return DownloadError(reason, url, detail, again=reason in ("http_429", "http_5xx", "timeout"), retry_after=wait)


def _seconds_to_wait(text: str) -> float:
    """Seconds of a Retry-After header, which holds a number or a date."""
    with contextlib.suppress(ValueError):
        return max(float(text), 0.0) if text.strip().isdecimal() else _seconds_until(text)
    return 0.0


def _seconds_until(date: str) -> float:
    return max(email.utils.parsedate_to_datetime(date).timestamp() - time.time(), 0.0)


def _decompressed(body: bytes, limit: int, url: str) -> bytes:
    """Body of a server that compresses although it was asked not to."""
    try:
        decompressor = zlib.decompressobj(wbits=47)  # gzip or zlib
        data = decompressor.decompress(body, limit + 1)
    except zlib.error:
        raise DownloadError("connection", url, "unknown Content-Encoding") from None
    if len(data) > limit:
        raise DownloadError("too_many_bytes", url, f"more than {limit:,} bytes")
    return data
