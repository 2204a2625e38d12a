"""Names outside the zone: the query goes on, but for its id, to the resolvers of the host; answers are remembered."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import socket
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import cast

from dnslib import RCODE

from flynn.aio.clock import Clock
from flynn.discoverd.dns import Transport
from flynn.discoverd.dnscache import Cache, answers, key_of, rcode_of

log = logging.getLogger(__name__)

TIMEOUT = 2.0  # seconds for one resolver; a client's own patience is usually 5
NEXT_AFTER = 0.3  # seconds after which the next resolver is asked beside a silent one
GOOD = (RCODE.NOERROR, RCODE.NXDOMAIN)  # anything else says "I cannot" or "not for you"
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


class Resolvers:
    """The resolvers of the host, and what they have said.

    The first is asked first. If it is slow the next is asked as well, and the first good answer counts; one that says
    that it cannot or will not is passed over. Who asks what is being asked already waits for the same answer.
    """

    def __init__(self, upstreams: Sequence[Upstream], clock: Clock) -> None:
        self._upstreams = upstreams
        self._clock = clock
        self._cache = Cache()
        self._asking: dict[tuple[bytes, Transport], asyncio.Future[bytes | None]] = {}

    def __bool__(self) -> bool:
        return bool(self._upstreams)

    def known(self, query: bytes) -> bytes | None:
        """What may be answered without asking anybody."""
        return self._cache.get(query, self._clock.monotonic())

    async def ask(self, query: bytes, transport: Transport) -> bytes | None:
        """The answer, got with the transport of the asker; None if nobody had one in time.

        A cut answer is an answer: the asker comes back by TCP.
        """
        key = (key_of(query), transport)
        asking = self._asking.get(key)
        if asking is None:
            asking = asyncio.ensure_future(self._ask(query, transport))
            self._asking[key] = asking
            asking.add_done_callback(lambda done: self._asking.pop(key, None))
        answer = await asyncio.shield(asking)
        return None if answer is None else query[:2] + answer[2:]

    def close(self) -> None:
        """Ask nobody any more; who waits is not answered."""
        for asking in list(self._asking.values()):
            asking.cancel()

    async def _ask(self, query: bytes, transport: Transport) -> bytes | None:
        # An id of our own: half of what makes an answer hard to forge, and the asker's may be guessed.
        ours = secrets.token_bytes(2) + query[2:]
        answer = await first_good(self._upstreams, ours, transport)
        if answer is not None:
            self._cache.put(ours, answer, self._clock.monotonic())
        return answer


async def first_good(upstreams: Sequence[Upstream], query: bytes, transport: Transport) -> bytes | None:
    """Ask one after the other, the next as soon as one fails or keeps silent for a moment; None if all fail."""
    call = _ask_udp if transport is Transport.UDP else _ask_tcp
    waiting = list(upstreams)
    asked: set[asyncio.Task[bytes | None]] = set()
    worst: bytes | None = None
    try:
        while waiting or asked:
            if waiting:
                upstream = waiting.pop(0)
                asked.add(asyncio.ensure_future(_answer_of(upstream, call(upstream, query))))
            done, asked = await asyncio.wait(
                asked, timeout=NEXT_AFTER if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                answer = task.result()
                if answer is None:
                    continue
                if rcode_of(answer) in GOOD:
                    return answer
                worst = worst or answer  # better than nothing, should nobody know better
        return worst
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def _answer_of(upstream: Upstream, call: Awaitable[bytes]) -> bytes | None:
    try:
        async with asyncio.timeout(TIMEOUT):
            return await call
    except (OSError, TimeoutError, EOFError) as error:
        log.debug("resolver failed", extra={"resolver": upstream, "error": repr(error)})
        return None


class _OneAnswer(asyncio.DatagramProtocol):
    def __init__(self, query: bytes) -> None:
        self._query = query
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.DatagramTransport, transport).sendto(self._query)

    def datagram_received(self, data: bytes, addr: object) -> None:
        if answers(self._query, data) and not self.answer.done():
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
        answer = await reader.readexactly(length)
        if not answers(query, answer):
            raise EOFError("an answer to another question")
        return answer
    finally:
        writer.close()
