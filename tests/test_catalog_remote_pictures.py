"""Pictures of web servers. All servers are on loopback; other addresses exist only in a resolver made for the test."""

import base64
import gzip
import hashlib
import http.server
import io
import os
import socket
import ssl
import threading
import time
from collections import Counter
from pathlib import Path

import httpcore2
import pytest
from PIL import Image

from mmsid.catalog import PictureLimits
from mmsid.catalog.picture_sources.addresses import connect, is_public
from mmsid.catalog.picture_sources.cache import PictureCache
from mmsid.catalog.picture_sources.downloads import Downloader
from mmsid.catalog.picture_sources.inspection import inspect_pictures
from mmsid.catalog.picture_sources.reasons import REASONS
from mmsid.catalog.pictures import InspectedPicture
from mmsid.errors import CatalogError

TRUSTED = PictureLimits(allow_private_hosts=True, request_seconds=1.0, connections=8)
PUBLIC = "93.184.215.14"


def png(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, colour % 256, colour // 256)).save(buffer, "PNG")
    return buffer.getvalue()


class Server:
    """A server on loopback whose paths say what it does. `asked` counts requests by path."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.hosts: list[str] = []
        self.times: list[float] = []
        self.now = self.most_at_once = 0
        self.down = False
        outer, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with lock:
                    outer.asked[self.path] += 1
                    outer.hosts.append(self.headers["Host"])
                    outer.times.append(time.monotonic())
                    outer.now += 1
                    outer.most_at_once = max(outer.most_at_once, outer.now)
                try:
                    outer.answer(self)
                except OSError:
                    pass  # the client went away
                finally:
                    with lock:
                        outer.now -= 1

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler) -> None:
        what, _, argument = handler.path.partition("?")[0][1:].partition("/")
        times = self.asked[handler.path]
        if self.down:
            self.send(handler, 503)
        elif what == "status":
            self.send(handler, int(argument))
        elif what == "then_good":  # fails at first
            self.send(handler, *((200, png()) if times > 2 else (int(argument), b"")))
        elif what == "busy":
            self.send(handler, *((200, png()) if times > 1 else (429, b"")), **{"Retry-After": argument})
        elif what == "slow":
            time.sleep(float(argument))
            self.send(handler, 200, png())
        elif what == "drip":  # a byte at a time, so that no single read takes long
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            for _ in range(1000):
                handler.wfile.write(b"x")
                time.sleep(0.05)
        elif what == "endless":
            handler.send_response(200)
            handler.send_header("Connection", "close")
            handler.end_headers()
            while True:
                handler.wfile.write(bytes(100_000))
        elif what == "accented":
            self.send(handler, 302, Location="/é/9".encode().decode("latin-1"))
        elif what == "redirect":
            self.send(handler, 302, Location=argument.replace("PORT", str(self.port)) if ":" in argument else f"/{argument}")
        elif what == "loop":
            self.send(handler, 301, Location=f"/loop/{int(argument or 0) + 1}")
        elif what == "count_down":
            self.send(handler, 307, Location=f"/count_down/{int(argument) - 1}" if int(argument) > 1 else "/ok")
        elif what == "promises_more":
            handler.send_response(200)
            handler.send_header("Content-Length", "100000")
            handler.end_headers()
            handler.wfile.write(png())
            handler.close_connection = True
        elif what == "promises_less":
            handler.send_response(200)
            handler.send_header("Content-Length", "40")
            handler.end_headers()
            handler.wfile.write(png())
            handler.close_connection = True
        elif what == "page":
            self.send(handler, 200, b"<!doctype html><html>not found</html>", **{"Content-Type": "image/jpeg"})
        elif what == "gzip":
            self.send(handler, 200, gzip.compress(png()), **{"Content-Encoding": "gzip"})
        elif what == "gzip_bomb":
            self.send(handler, 200, gzip.compress(bytes(30_000_000)), **{"Content-Encoding": "gzip"})
        elif what == "hang_up":
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        elif what == "empty":
            self.send(handler, 200, b"")
        else:  # any other path is a picture of its own, called a text
            self.send(handler, 200, png(int(argument or 0)), **{"Content-Type": "text/html"})

    @staticmethod
    def send(handler, status: int, body: bytes = b"", **headers: str) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)


@pytest.fixture
def server():
    running = Server()
    yield running
    running.server.shutdown()
    running.server.server_close()


def downloader(folder: Path, limits: PictureLimits = TRUSTED, **options) -> Downloader:
    return Downloader(limits, folder / "cache", **{"first_wait": 0.02, **options})


def download(folder: Path, *urls: str, limits: PictureLimits = TRUSTED, **options) -> list[InspectedPicture]:
    with downloader(folder, limits, **options) as running:
        found = list(inspect_pictures(urls, limits, folder, folder / "cache", downloader=running))
    assert all(one.reason is None or one.reason in REASONS for one in found)
    return found


@pytest.mark.parametrize(
    ("path", "reason", "asked"),
    [
        ("ok", None, 1),
        ("a%20b c/7?v=1#part", None, 1),
        ("gzip", None, 1),
        ("then_good/500", None, 3),
        ("then_good/503", None, 3),
        ("count_down/5", None, 1),
        ("accented", None, 1),
        ("status/404", "http_404", 1),
        ("status/410", "http_404", 1),
        ("status/403", "http_403", 1),
        ("status/401", "http_403", 1),
        ("status/429", "http_429", 4),
        ("status/500", "http_5xx", 4),
        ("status/204", "http_status", 1),
        ("status/418", "http_status", 1),
        ("loop/", "too_many_redirects", 1),
        ("count_down/6", "too_many_redirects", 1),
        ("redirect/ftp://127.0.0.1/a.png", "scheme", 1),
        ("redirect/file:///etc/passwd", "scheme", 1),
        ("redirect/http://user:word@127.0.0.1:PORT/ok", "bad_url", 1),
        ("promises_more", "connection", 4),
        ("promises_less", "truncated", 1),
        ("hang_up", "connection", 4),
        ("page", "html", 1),
        ("empty", "empty", 1),
        ("endless", "too_many_bytes", 1),
        ("gzip_bomb", "too_many_bytes", 1),
    ],
)
def test_every_answer_is_a_picture_or_a_reason(tmp_path, server, path, reason, asked):
    (found,) = download(tmp_path, f"{server.url}/{path}")
    assert found.reason == reason
    assert (found.path is None) == (reason is not None)
    assert sum(server.asked.values()) >= asked and max(server.asked.values()) == asked
    if reason and reason.startswith("http_"):
        assert f"HTTP {path.rpartition('/')[2]}" in found.detail
    if reason is None:
        assert found.path.read_bytes() and found.format == "PNG" and found.width == 40


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://user:word@host/a.png", "bad_url"),
        ("http:///a.png", "bad_url"),
        ("http://host:99999/a.png", "bad_url"),
        ("http://[::1/a.png", "bad_url"),
        ("http://a..b/a.png", "dns"),
        ("http://host\r\nX-Header: 1/a.png", ("bad_url", "dns")),
        ("//no-such-host.invalid/a.png", "dns"),
    ],
)
def test_a_url_that_cannot_be_used(tmp_path, url, reason):
    def resolver(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    (found,) = download(tmp_path, url, resolver=resolver)
    assert found.reason in ((reason,) if isinstance(reason, str) else reason)


def test_a_server_that_is_too_slow_is_given_up(tmp_path, server):
    limits = TRUSTED.model_copy(update={"request_seconds": 0.3})
    started = time.monotonic()
    found = download(tmp_path, f"{server.url}/slow/3", f"{server.url}/drip", f"{server.url}/slow/0.1", limits=limits)
    assert [one.reason for one in found] == ["timeout", "timeout", None]
    assert time.monotonic() - started < 4 * 0.3 + 1.5, "all tries of a picture have one limit"


def test_a_busy_server_is_obeyed(tmp_path, server):
    (found,) = download(tmp_path, f"{server.url}/busy/1")
    assert found.reason is None
    assert server.times[1] - server.times[0] >= 0.99
    (found,) = download(tmp_path, f"{server.url}/busy/3600")
    assert (found.reason, found.detail) == ("http_429", "HTTP 429, retry after 3600 s")
    assert server.asked["/busy/3600"] == 1, "nobody waits an hour"


def test_a_busy_server_pauses_its_other_pictures(tmp_path, server):
    limits = TRUSTED.model_copy(update={"connections": 1})
    urls = [f"{server.url}/busy/1", *(f"{server.url}/ok/{number}" for number in range(3))]
    assert [one.reason for one in download(tmp_path, *urls, limits=limits)] == [None] * 4
    assert server.times[1] - server.times[0] >= 0.99


def test_a_refused_connection_and_a_missing_certificate(tmp_path, server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        found = download(tmp_path, f"http://127.0.0.1:{unused.getsockname()[1]}/a.png", f"https://127.0.0.1:{server.port}/a.png")
    assert found[0].reason == "connection"
    assert found[1].reason == "tls"


def test_nothing_more_is_asked_after_the_limit_of_all_bytes(tmp_path, server):
    limits = TRUSTED.model_copy(update={"max_total_bytes": 3 * len(png()) - 1, "connections": 1})
    found = download(tmp_path, *(f"{server.url}/ok/{number}" for number in range(6)), limits=limits)
    assert [one.reason for one in found] == [None, None, *["total_limit"] * 4]
    assert sum(server.asked.values()) == 3


# Concurrency and order


def test_results_are_in_order_and_connections_are_bounded(tmp_path, server):
    urls = [f"{server.url}/picture/{number}" for number in range(60)]
    urls[3], urls[10] = f"{server.url}/slow/0.3", f"{server.url}/status/404"
    references = [*urls, base64.b64encode(png(5)).decode(), urls[5], png(6)]
    found = download(tmp_path, *references)
    expected = [hashlib.sha256(png(number)).hexdigest() for number in range(60)]
    for at, one in enumerate(found[:60]):
        assert at in (3, 10) or one.sha256 == expected[at]
    assert found[10].reason == "http_404" and found[60].sha256 == expected[5] == found[61].sha256
    assert server.asked["/picture/5"] == 1, "a URL that occurs twice is downloaded once"
    assert 1 < server.most_at_once <= 4, "half of the connections for one host"


def test_a_slow_host_does_not_hold_up_another(tmp_path, server):
    other = Server()
    limits = TRUSTED.model_copy(update={"connections": 2})
    with downloader(tmp_path, limits) as running:
        slow = [running.submit(f"{server.url}/slow/0.{number}") for number in (5, 6)]
        quick = [running.submit(f"{other.url}/picture/{number}") for number in range(5)]
        assert all(one.result(5).reason is None for one in quick)
        assert not slow[1].done()
        assert all(one.result(5).reason is None for one in slow)
    other.server.shutdown()


def test_a_dead_host_is_not_asked_for_every_picture(tmp_path, server):
    server.down = True
    limits = TRUSTED.model_copy(update={"connections": 2})
    found = download(tmp_path, *(f"{server.url}/picture/{number}" for number in range(100)), limits=limits, first_wait=0.001)
    assert {one.reason for one in found} == {"http_5xx"}
    assert sum(server.asked.values()) <= 4 * 25
    assert "not asked" in found[-1].detail


def test_closing_ends_downloads_that_wait(tmp_path, server):
    limits = TRUSTED.model_copy(update={"request_seconds": 30.0})
    with downloader(tmp_path, limits) as running:
        futures = [running.submit(f"{server.url}/slow/20") for _ in range(8)]
        time.sleep(0.3)
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert all(one.cancelled() or one.result().reason == "connection" for one in futures)


# Cache


def test_a_second_run_asks_for_failures_only(tmp_path, server):
    urls = [f"{server.url}/picture/1", f"{server.url}/status/404", f"{server.url}/page", f"{server.url}/picture/2"]
    first = download(tmp_path, *urls)
    server.asked.clear()
    assert download(tmp_path, *urls) == first
    assert server.asked == {"/status/404": 1, "/page": 1}
    names = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert names == {"urls.sqlite", *(one.sha256 for one in first if one.path)}
    first[0].path.write_bytes(b"damaged")
    assert download(tmp_path, *urls)[0].reason is None
    assert server.asked["/picture/1"] == 1 and first[0].path.read_bytes() == png(1), "a damaged file is replaced"


def test_known_pictures_of_urls_need_no_index(tmp_path, server):
    url = f"{server.url}/picture/1"
    found = download(tmp_path, url)
    (tmp_path / "cache" / "urls.sqlite").unlink()
    again = list(inspect_pictures([url], TRUSTED, tmp_path, tmp_path / "cache", {url: found[0]}))
    assert again == found and server.asked["/picture/1"] == 1


def test_two_downloaders_share_a_cache_folder(tmp_path, server):
    urls = [f"{server.url}/picture/{number}" for number in range(40)]
    found: dict[int, list] = {}
    threads = [threading.Thread(target=lambda at=at: found.update({at: download(tmp_path, *urls)})) for at in range(3)]
    [one.start() for one in threads], [one.join() for one in threads]
    assert found[0] == found[1] == found[2] and all(one.reason is None for one in found[0])
    server.asked.clear()
    assert download(tmp_path, *urls) == found[0] and not server.asked


def test_a_damaged_index_is_named(tmp_path, server):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "urls.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(CatalogError, match=r"urls\.sqlite.*delete this file"):
        download(tmp_path, f"{server.url}/ok")


def test_a_process_that_is_killed_leaves_whole_files_only(tmp_path):
    cache = PictureCache(tmp_path)
    child = os.fork()
    if child == 0:
        number = 0
        while True:
            data = png(number % 500) * 50
            cache.store(data, hashlib.sha256(data).hexdigest())
            number += 1
    time.sleep(0.3)
    os.kill(child, 9), os.waitpid(child, 0)
    files = [path for path in tmp_path.glob("??/*") if path.is_file()]
    assert files and all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in files)


# Private addresses


class FakeInternet:
    """Names and addresses of a test. Public addresses lead to the loopback server, all others must never be connected to."""

    def __init__(self, port: int, names: dict[str, list[list[str]]]) -> None:
        self.port, self.names = port, names
        self.resolved: list[str] = []
        self.connected: list[str] = []

    def resolver(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        answers = self.names.get(host, [[host]])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def connector(self, address: str, port: int, timeout: float | None) -> httpcore2.NetworkStream:
        self.connected.append(address)
        assert address == PUBLIC, f"a connection to {address} was opened"
        return connect("127.0.0.1", self.port, timeout)

    def get(self, folder: Path, url: str) -> InspectedPicture:
        limits = TRUSTED.model_copy(update={"allow_private_hosts": False})
        return download(folder, url, limits=limits, resolver=self.resolver, connector=self.connector)[0]


PRIVATE = [
    "127.0.0.1",
    "10.0.0.8",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "0.0.0.0",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:169.254.169.254",
    "fe80::1%eth0",
    "fd00:ec2::254",
    "fec0::1",
    "ff02::1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::a00:1",
    "2002:7f00:1::",
    "2001:0:7f00:1::",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_a_private_address_is_refused_before_a_connection_is_opened(tmp_path, server, address):
    literal = f"[{address}]" if ":" in address and "%" not in address else address if "%" not in address else "fe80.test"
    internet = FakeInternet(server.port, {"named.test": [[address]], "mixed.test": [[PUBLIC, address]], "fe80.test": [[address]]})
    for host in ("named.test", "mixed.test", literal):
        found = internet.get(tmp_path, f"http://{host}/ok")
        assert (found.reason, found.path) == ("private_address", None)
    for target in ("http://named.test/ok", "https://named.test/ok", f"http://{literal}/ok"):
        internet.names["shop.test"] = [[PUBLIC]]
        server_redirect = f"http://shop.test/redirect/{target}"
        assert internet.get(tmp_path, server_redirect).reason == "private_address"
    assert set(internet.connected) == {PUBLIC}, "only the redirecting server was asked"
    assert server.asked["/ok"] == 0


def test_a_public_address_is_connected_to_and_keeps_its_name(tmp_path, server):
    internet = FakeInternet(server.port, {"shop.test": [[PUBLIC]], "bücher.test".encode("idna").decode(): [[PUBLIC]]})
    assert internet.get(tmp_path, "http://shop.test/ok/1").reason is None
    assert internet.get(tmp_path, "http://bücher.test:8080/ok/2").reason is None
    assert server.hosts == ["shop.test", "xn--bcher-kva.test:8080"]
    assert internet.connected == [PUBLIC, PUBLIC]


def test_a_name_that_changes_its_address_is_not_trusted(tmp_path, server):
    """DNS rebinding: the first look-up is public, the next is private. Each connection uses the look-up that was checked."""
    internet = FakeInternet(server.port, {"rebind.test": [[PUBLIC], ["127.0.0.1"]]})
    assert internet.get(tmp_path, "http://rebind.test/ok/1").reason is None
    assert (internet.resolved, internet.connected) == (["rebind.test"], [PUBLIC])
    assert internet.get(tmp_path, "http://rebind.test/ok/2").reason == "private_address"
    assert internet.connected == [PUBLIC]


def test_numbers_that_spell_loopback_are_refused(tmp_path, server):
    def connector(address: str, port: int, timeout: float | None) -> httpcore2.NetworkStream:
        raise AssertionError(f"a connection to {address} was opened")

    limits = TRUSTED.model_copy(update={"allow_private_hosts": False})
    urls = [f"http://{host}:{server.port}/ok" for host in ("127.1", "2130706433", "0x7f.1", "0177.0.0.1", "localhost", "[::ffff:7f00:1]")]
    found = download(tmp_path, *urls, limits=limits, connector=connector)
    assert {one.reason for one in found} <= {"private_address", "dns"} and found[0].reason == "private_address"
    assert not server.asked


def test_the_name_of_a_tls_connection_is_that_of_the_url(tmp_path):
    class Stream(httpcore2.NetworkStream):
        names: list[str | None] = []  # noqa: RUF012

        def start_tls(self, ssl_context, server_hostname=None, timeout=None):
            assert ssl_context.check_hostname
            self.names.append(server_hostname)
            raise httpcore2.ConnectError(ssl.SSLError("stop"))

    connected = []
    options = {"resolver": lambda host, port: [PUBLIC], "connector": lambda *where: connected.append(where[:2]) or Stream()}
    found = download(tmp_path, "https://shop.test/a.png", limits=TRUSTED.model_copy(update={"allow_private_hosts": False}), **options)
    assert (found[0].reason, Stream.names, connected) == ("tls", ["shop.test"], [(PUBLIC, 443)])


def test_proxies_of_the_environment_are_not_used(tmp_path, server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert download(tmp_path, f"{server.url}/ok")[0].reason is None


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:4700::6810:85e5", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert is_public(address)
