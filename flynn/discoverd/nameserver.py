"""The DNS sockets: UDP and TCP on one address. What is answered is decided in `dns`, or asked of `recursion`."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar, cast

from dnslib import RCODE, DNSRecord

from flynn.aio.clock import Clock
from flynn.aio.supervisor import TaskSet
from flynn.discoverd import dns
from flynn.discoverd.dns import Transport
from flynn.discoverd.recursion import Resolvers, Upstream
from flynn.discoverd.shortcut import Shortcut
from flynn.discoverd.store import Directory

log = logging.getLogger(__name__)

MAX_PENDING = 512  # recursive queries at a time; more are refused, as every one of them holds a socket
MAX_CONNECTIONS = 256  # by TCP; more are closed at once
TCP_FIRST_SECONDS = 2.0
TCP_IDLE_SECONDS = 8.0
TCP_QUERIES = 128  # on one connection

Address = tuple[str, int]
T = TypeVar("T")


def _shuffled(items: Sequence[T]) -> list[T]:
    return random.sample(items, len(items))


class NameServer:
    def __init__(self, state: Callable[[], Directory], upstreams: Sequence[Upstream], clock: Clock) -> None:
        self._state = state
        self._resolvers = Resolvers(upstreams, clock)
        self._clock = clock
        self._shortcut = Shortcut()
        self._connections = 0

    def answer_at_once(self, raw: bytes, transport: Transport, own: str = "") -> bytes | DNSRecord | None:
        """The reply, nothing (the datagram deserves none), or the query if somebody else has to be asked.

        `own`: the address that was asked.
        """
        recursive, now = bool(self._resolvers), int(self._clock.now().timestamp())
        if transport is Transport.UDP:
            reply = self._shortcut.answer(raw, self._state(), recursive=recursive, now=now, shuffle=_shuffled)
            if reply is not None:
                return reply
        try:
            query = DNSRecord.parse(raw)
        except (
            Exception
        ):  # The edge: anybody may send anything, and the parser has more ways to fail than it documents.
            return dns.malformed(raw)
        if query.header.qr or len(query.questions) != 1:
            return dns.malformed(raw)
        if (refusal := dns.refusal(query, recursive=recursive)) is not None:
            return bytes(refusal.pack())
        if not dns.in_zone(query):
            return self._resolvers.known(raw) or query
        try:
            full = dns.answer(query, self._state(), transport, recursive=recursive, now=now, shuffle=_shuffled, own=own)
            return dns.packed(full, query, transport)
        except Exception:  # The edge: one odd query must not end the server.
            log.exception("could not answer", extra={"query": str(query.q)})
            return self.refuse(query)

    async def pass_on(self, query: DNSRecord, raw: bytes, transport: Transport) -> bytes:
        answer = await self._resolvers.ask(raw, transport)
        return answer if answer is not None else self.refuse(query)

    def refuse(self, query: DNSRecord) -> bytes:
        return bytes(dns.failure(query, RCODE.SERVFAIL, recursive=bool(self._resolvers)).pack())

    def close(self) -> None:
        self._resolvers.close()

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One TCP connection, query after query."""
        self._connections += 1
        try:
            if self._connections <= MAX_CONNECTIONS:
                await self._converse(reader, writer)
        except (OSError, EOFError, TimeoutError):
            return
        finally:
            self._connections -= 1
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = str(writer.get_extra_info("sockname")[0])
        patience = TCP_FIRST_SECONDS
        for _ in range(TCP_QUERIES):
            async with asyncio.timeout(patience):
                raw = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
            patience = TCP_IDLE_SECONDS
            reply = self.answer_at_once(raw, Transport.TCP, own)
            if isinstance(reply, DNSRecord):
                reply = await self.pass_on(reply, raw, Transport.TCP)
            if reply is None:
                return
            writer.write(len(reply).to_bytes(2, "big") + reply)
            async with asyncio.timeout(TCP_IDLE_SECONDS):  # for one who asks and does not listen
                await writer.drain()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: NameServer, tasks: TaskSet) -> None:
        self._server = server
        self._tasks = tasks
        self._transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)
        self._own = str(transport.get_extra_info("sockname")[0])

    def datagram_received(self, data: bytes, addr: Address) -> None:
        reply = self._server.answer_at_once(data, Transport.UDP, self._own)
        if isinstance(reply, bytes):
            self._transport.sendto(reply, addr)
        elif reply is not None and len(self._tasks) >= MAX_PENDING:
            self._transport.sendto(self._server.refuse(reply), addr)
        elif reply is not None:
            self._tasks.start("recursive query", self._pass_on(reply, data, addr))

    async def _pass_on(self, query: DNSRecord, raw: bytes, addr: Address) -> None:
        answer = await self._server.pass_on(query, raw, Transport.UDP)
        if not self._transport.is_closing():
            self._transport.sendto(answer, addr)


@asynccontextmanager
async def serving(address: Address, server: NameServer) -> AsyncIterator[Address]:
    """Answer on `address` (port 0 picks one, the same for both) while the block is open.

    The address need not be there yet, nor stay: the bridge it belongs to is somebody else's. Raises OSError if taken.
    """
    loop = asyncio.get_running_loop()
    stream = _bound(address, socket.SOCK_STREAM)
    bound: Address = stream.getsockname()[:2]
    datagrams = _bound(bound, socket.SOCK_DGRAM)
    async with TaskSet() as tasks:
        transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(server, tasks), sock=datagrams)
        tcp = await asyncio.start_server(server.converse, sock=stream)
        try:
            yield bound
        finally:
            tcp.close()
            transport.close()
            server.close()


def _bound(address: Address, kind: socket.SocketKind) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    sock = socket.socket(family, kind)
    try:
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # A successor answers beside us until we stop: no name goes unanswered while a release replaces another.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        sock.setblocking(False)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


_IP_FREEBIND = 15  # linux/in.h; the socket module does not name it
