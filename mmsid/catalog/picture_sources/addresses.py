"""Network connections to public addresses only, as protection against server-side request forgery (SSRF).

A catalogue from strangers may name `http://169.254.169.254/` or a host name that resolves to a private address, and make this machine read
services that only it can reach. Each name is resolved once, all its addresses are checked, and the connection is made to a checked
address. A second look-up, whose answer may differ (DNS rebinding), never happens. The Host header and the TLS name stay those of the URL.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import httpcore2

from mmsid.catalog.picture_sources.reasons import refusal

Resolver = Callable[[str, int], Sequence[str]]
"""(host, port) -> its addresses as texts. Raises socket.gaierror."""
Connector = Callable[[str, int, float | None], httpcore2.NetworkStream]
"""(address, port, time limit in seconds) -> stream. Raises the exceptions of httpcore2."""

_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))
_SPECIAL = (
    ipaddress.ip_network("192.0.0.0/24"),  # protocol assignments, which older versions of Python call public
    ipaddress.ip_network("168.63.129.16/32"),  # the management service of Azure, on a public address
)


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address, given as text, belongs to the public Internet.

    Private, loopback, link-local, shared, multicast, reserved and unspecified addresses do not. An IPv6 address that contains an IPv4
    address (mapped, NAT64, 6to4) is public only if the inner one is too. Teredo addresses are not public.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return is_public(str(parsed.ipv4_mapped))
        if parsed in _NAT64[1]:
            return False
        if parsed in _NAT64[0]:
            return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
        if parsed.sixtofour is not None and not is_public(str(parsed.sixtofour)):
            return False
        if parsed.teredo is not None or parsed.is_site_local:
            return False
    if any(parsed in network for network in _SPECIAL if network.version == parsed.version):
        return False
    return parsed.is_global and not (parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified or parsed.is_link_local)


def resolve(host: str, port: int) -> list[str]:
    """Addresses of a host name by the system's resolver, which has its own time limit."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


def connect(address: str, port: int, timeout: float | None) -> httpcore2.NetworkStream:
    """A TCP connection to an address."""
    return httpcore2.SyncBackend().connect_tcp(address, port, timeout)


class CheckedBackend(httpcore2.NetworkBackend):
    """Network backend of httpcore2 that connects to checked addresses, and keeps a deadline per thread over all reads and writes.

    httpcore2 limits each read only, so a server that sends a byte every few seconds would hold a request for ever.
    """

    def __init__(self, allow_private: bool, resolver: Resolver = resolve, connector: Connector = connect) -> None:
        self._allow_private, self._resolver, self._connector = allow_private, resolver, connector
        self._thread = threading.local()
        self._streams: weakref.WeakSet[_DeadlineStream] = weakref.WeakSet()

    def set_deadline(self, deadline: float) -> None:
        """Time of `time.monotonic` at which the requests of this thread end."""
        self._thread.deadline = deadline

    def time_left(self, timeout: float | None) -> float | None:
        """The shorter of `timeout` and the seconds until the deadline, at least a millisecond, because sockets take 0 as non-blocking."""
        deadline = getattr(self._thread, "deadline", None)
        if deadline is None:
            return timeout
        left = deadline - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout
        return max(left if timeout is None else min(left, timeout), 0.001)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """Resolve the host, check its addresses and connect to the first that answers.

        Raises:
            PictureError: `dns` or `private_address`. One address that is not public is enough for a refusal.
            httpcore2.ConnectError, httpcore2.TimeoutException: no address answers.
        """
        try:
            addresses = self._resolver(host, port)
        except (OSError, UnicodeError) as error:
            code = error.errno if isinstance(error, socket.gaierror) else None
            refused = refusal("dns", host, "no answer from the name server" if code == socket.EAI_AGAIN else "unknown host")
            raise refused from None
        if not self._allow_private:
            for address in addresses:
                if not is_public(address):
                    raise refusal("private_address", host, f"{host} has the address {address}")
        failure: Exception = httpcore2.ConnectError("the name has no address")
        for address in addresses:
            try:
                stream = _DeadlineStream(self._connector(address, port, self.time_left(timeout)), self)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                self._streams.add(stream)
                return stream
        raise failure

    def abort(self) -> None:
        """End all open connections, so that threads that wait for them go on."""
        for stream in list(self._streams):
            stream.abort()


class _DeadlineStream(httpcore2.NetworkStream):
    def __init__(self, stream: httpcore2.NetworkStream, backend: CheckedBackend) -> None:
        self._stream, self._backend = stream, backend

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._backend.time_left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._backend.time_left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        secured = _DeadlineStream(self._stream.start_tls(ssl_context, server_hostname, self._backend.time_left(timeout)), self._backend)
        self._backend._streams.add(secured)
        return secured

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def abort(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self._stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
