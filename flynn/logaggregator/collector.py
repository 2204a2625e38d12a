"""The syslog side: hosts connect with their certificate and send frames.

A message that is not one of ours is skipped and counted in the log; a broken frame ends the connection. Reading and
keeping happen in one go, so a host that sends faster than we read is held back by TCP.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flynn.identity.peer import Peer, PeerKind, peer_of
from flynn.logaggregator.buffer import Logs
from flynn.logaggregator.rfc5424 import FrameDecoder, FramingViolation, Malformed, MessageDecoder

log = logging.getLogger(__name__)

READ_BYTES = 256 << 10
MAX_CONNECTIONS = 1000


class Collector:
    """Accepts connections of hosts and fills the logs."""

    def __init__(self, logs: Logs) -> None:
        self._logs = logs
        self._connections: set[asyncio.StreamWriter] = set()

    @asynccontextmanager
    async def listening(self, host: str, port: int, tls: ssl.SSLContext) -> AsyncIterator[int]:
        """Serve while the block is open; gives the port."""
        server = await asyncio.start_server(self._serve, host, port, ssl=tls, limit=READ_BYTES, backlog=256)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for writer in list(self._connections):
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = peer_of(writer.get_extra_info("peercert"))
        if not _may_send(peer) or len(self._connections) >= MAX_CONNECTIONS:
            log.warning("refused a log connection", extra={"peer": peer, "connections": len(self._connections)})
            writer.transport.abort()
            return
        self._connections.add(writer)
        try:
            await self._read(reader, peer)
        except FramingViolation as error:
            log.warning("closed a log connection", extra={"peer": peer, "error": error})
        except OSError as error:
            log.info("a log connection broke", extra={"peer": peer, "error": error})
        finally:
            self._connections.discard(writer)
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader, peer: Peer | None) -> None:
        frames, messages = FrameDecoder(), MessageDecoder()
        refused = 0
        while chunk := await reader.read(READ_BYTES):
            for raw in frames.feed(chunk):
                try:
                    self._logs.add(messages.decode(raw))
                except Malformed as error:
                    refused += 1
                    if refused.bit_count() == 1:  # the 1st, 2nd, 4th, 8th ...: a broken sender must not fill our log
                        log.warning("skipped a message", extra={"peer": peer, "error": error, "skipped": refused})
            await asyncio.sleep(0)  # a replaying host always has the next chunk ready; readers want their turn, too


def _may_send(peer: Peer | None) -> bool:
    return peer is not None and peer.kind is PeerKind.HOST
