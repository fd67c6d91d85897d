"""This file is where the ingress reaches out: to webhooks, and for photos. Users name the addresses; none is trusted.

Only https, and only to public addresses: a name is resolved once, every address that it has is checked, and the
connection goes to one of those, so that a name which resolves otherwise the next time gains nothing. Redirects are not
followed, bodies and times are bounded.
"""

import asyncio
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from cluster.errors import SystemFailure, UserError
from serving.settings import Outward

THREADS = 8  # calls at a time
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_SPECIAL = [
    ipaddress.ip_network(net) for net in ("192.0.0.0/24", "192.88.99.0/24")
]  # not known to Python 3.11
_PIECE = 64 * 1024

Resolve = Callable[[str, int], Sequence[Any]]
"""As `socket.getaddrinfo` of a host and a port."""


@dataclass(frozen=True)
class Target:
    """Where a URL leads, checked."""

    host: str
    port: int
    address: str
    """The one that is connected to."""
    path: str
    secure: bool


class Outbound:
    """Calls to addresses that users name.

    Args:
        settings: What may be reached.
        resolve: Resolves names.
    """

    def __init__(self, settings: Outward, resolve: Resolve = socket.getaddrinfo) -> None:
        self._settings, self._resolve = settings, resolve
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="outbound")

    def close(self) -> None:
        """Begin no more calls."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def check(self, url: str) -> None:
        """Refuse a URL that would not be reached; raises as `target`."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self.target, url)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """Send a body; the status of the answer.

        Raises:
            UserError: The URL may not be reached.
            SystemFailure: It cannot be.
        """
        limit = self._settings.timeout_s

        def call() -> int:
            return self._call("POST", url, headers, body, 0, limit)[0]

        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def get(self, url: str, most: int) -> bytes:
        """What is at a URL; raises as `post`, `UserError` too for any answer but 200 and for more than `most` bytes."""
        limit = self._settings.download_s

        def call() -> tuple[int, bytes]:
            return self._call("GET", url, {}, None, most + 1, limit)

        status, data = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        if status != 200:
            raise UserError(
                f"{url} was not answered with 200", f"but with {status}", "give a URL that is public"
            )
        if len(data) > most:
            raise UserError(f"{url} is too large", f"more than {most} bytes", "give something smaller")
        return data

    def target(self, url: str) -> Target:
        """Where a URL leads.

        Raises:
            UserError: It is no URL that may be reached, or its host has no address.
        """
        parts = self._parts(url)
        host, secure = str(parts.hostname), parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        try:
            found = self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise UserError(f"{host} has no address", str(error), "give a URL that is public") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            if not self._may(address):
                raise UserError(
                    f"{host} may not be reached from here",
                    f"its address {address} is not public",
                    "give a URL that is public",
                )
        if not addresses:
            raise UserError(f"{host} has no address", "", "give a URL that is public")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return Target(host, port, addresses[0], path, secure)

    def _parts(self, url: str) -> SplitResult:
        schemes = ("https", "http") if self._settings.allow_loopback else ("https",)
        try:
            parts = urlsplit(url)
            good = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        plain = url.isascii() and url.isprintable() and " " not in url
        if not good or not plain or parts.username is not None:
            raise UserError(
                f"{url[:200]!r} is no URL that is reached from here",
                "",
                f"give one that begins with {schemes[0]}:// and holds no user, password or space",
            )
        return parts

    def _may(self, text: str) -> bool:
        address = ipaddress.ip_address(text.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address):
            if address.ipv4_mapped:
                address = address.ipv4_mapped
            elif address.sixtofour or address.teredo or address in _NAT64:
                return False  # they lead to an IPv4 address that is not looked at here
        if address.is_loopback:
            return self._settings.allow_loopback
        if address.is_multicast or address.is_reserved or any(address in net for net in _SPECIAL):
            return False
        return address.is_global

    def _call(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, most: int, limit_s: float
    ) -> tuple[int, bytes]:
        target, until = self.target(url), time.monotonic() + limit_s
        connection = _connection(target, limit_s)
        try:
            connection.request(method, target.path, body, {"user-agent": "raybooth", **headers})
            answer = connection.getresponse()
            data = bytearray()
            while len(data) < most:
                if time.monotonic() > until:
                    raise TimeoutError(f"not all of it came within {limit_s:g} s")
                piece = answer.read1(min(_PIECE, most - len(data)))
                if not piece:
                    break
                data += piece
            return answer.status, bytes(data)
        except (OSError, http.client.HTTPException) as error:
            seen = str(error) or type(error).__name__
            raise SystemFailure(f"{target.host} cannot be reached", seen, "try again later") from error
        finally:
            connection.close()


def _connection(target: Target, limit_s: float) -> http.client.HTTPConnection:
    """A connection to the address that was checked, whatever the name resolves to by now."""
    if target.secure:
        return _PinnedTls(target, limit_s)
    return _Pinned(target, limit_s)


class _Pinned(http.client.HTTPConnection):
    def __init__(self, target: Target, limit_s: float) -> None:
        super().__init__(target.host, target.port, timeout=limit_s)
        self._address = target.address

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)


class _PinnedTls(http.client.HTTPSConnection):
    def __init__(self, target: Target, limit_s: float) -> None:
        self._trust = ssl.create_default_context()
        super().__init__(target.host, target.port, timeout=limit_s, context=self._trust)
        self._address = target.address

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self.timeout)
        self.sock = self._trust.wrap_socket(plain, server_hostname=self.host)
