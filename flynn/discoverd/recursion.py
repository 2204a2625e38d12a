"""Names outside the zone: the query goes on, as it came, to the resolvers of the host."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from flynn.discoverd.dns import Transport

log = logging.getLogger(__name__)

TIMEOUT = 2.0  # seconds for one resolver; a client's own patience is usually 5
DNS_PORT = 53
MAX_TCP_BYTES = 65535


@dataclass(frozen=True, slots=True)
class Upstream:
    host: str
    port: int = DNS_PORT

    @classmethod
    def parse(cls, text: str) -> Upstream:
        """`ip`, `ip:port`, bare IPv6, `[v6]:port`, or a host name with or without port (resolved now).

        Raises ValueError if it is none of these, or a name that does not resolve.
        """
        if text.startswith("["):
            host, _, rest = text[1:].partition("]")
            port = rest.removeprefix(":")
        elif text.count(":") == 1:
            host, _, port = text.partition(":")
        else:
            host, port = text, ""
        if port and not port.isdecimal():
            raise ValueError(f"not a resolver: {text!r}")
        try:
            ipaddress.ip_address(host)
        except ValueError:
            try:
                host = str(socket.getaddrinfo(host, None, proto=socket.IPPROTO_UDP)[0][4][0])
            except OSError as error:
                raise ValueError(f"resolver {text!r} does not resolve") from error
        return cls(host, int(port or DNS_PORT))


async def ask(upstreams: Sequence[Upstream], query: bytes, transport: Transport) -> bytes | None:
    """The first answer of the resolvers, tried in order with the transport of the asker; None if all failed.

    A truncated answer is an answer: the asker comes back by TCP.
    """
    for upstream in upstreams:
        try:
            async with asyncio.timeout(TIMEOUT):
                answer = await (_ask_udp if transport is Transport.UDP else _ask_tcp)(upstream, query)
        except (OSError, TimeoutError, EOFError) as error:
            log.debug("resolver failed", extra={"resolver": upstream, "error": repr(error)})
        else:
            return answer
    return None


class _OneAnswer(asyncio.DatagramProtocol):
    def __init__(self, query: bytes) -> None:
        self._query = query
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.DatagramTransport, transport).sendto(self._query)

    def datagram_received(self, data: bytes, addr: object) -> None:
        if data[:2] == self._query[:2] and not self.answer.done():
            self.answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


async def _ask_udp(upstream: Upstream, query: bytes) -> bytes:
    # A socket for each query: its random port is half of what makes an answer hard to forge.
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(
        lambda: _OneAnswer(query), remote_addr=(upstream.host, upstream.port)
    )
    try:
        return await protocol.answer
    finally:
        transport.close()


async def _ask_tcp(upstream: Upstream, query: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(upstream.host, upstream.port)
    try:
        writer.write(len(query).to_bytes(2, "big") + query)
        length = int.from_bytes(await reader.readexactly(2), "big")
        return await reader.readexactly(length)
    finally:
        writer.close()
