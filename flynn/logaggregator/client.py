"""How others speak to the aggregator.

Reading (controller): `inside(identity)` asks any instance.

Sending (flynn-host): watch the service `logaggregator` in discoverd. An instance is registered under its *syslog*
address (port 514), its metadata `API_PORT` names the HTTP port (80 when absent). For each instance:

    aggregator = at(instance, identity)
    cursors = await aggregator.cursors()                 # what it has of each host: replay what is newer
    async with sending(instance, identity) as stream:
        stream.write(rfc5424.frame(rfc5424.encode(message)))
        await stream.drain()

Both ends show certificates; the server's name is `logaggregator.discoverd` whatever address was dialled. The aggregator
sends nothing back on the syslog connection: reading from it returns b"" when it is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from flynn.http.client import HttpClient, Retry
from flynn.http.connection import RawConnection
from flynn.identity import Identity
from flynn.logaggregator.rfc5424 import FrameDecoder, Malformed, Message, decode
from flynn.types.errors import Unreachable
from flynn.types.instance import Instance
from flynn.types.sink import SinkCursor

SERVICE = "logaggregator"
SERVER_NAME = f"{SERVICE}.discoverd"
URL = f"https://{SERVER_NAME}:80"
API_PORT = "API_PORT"  # key of an instance's metadata
CONNECT_SECONDS = 5.0
FOLLOW_SILENCE_SECONDS = 10 * 365 * 86400.0  # a quiet app is no broken connection


def inside(identity: Identity, *, url: str = URL) -> LogAggregator:
    """Return a client of whichever instance answers."""
    return LogAggregator(HttpClient(url, tls=identity, retry=Retry()))


def at(instance: Instance, identity: Identity) -> LogAggregator:
    """Return a client of one instance, as found in discoverd."""
    port = instance.meta.get(API_PORT, "80")
    return LogAggregator(HttpClient(f"https://{instance.host}:{port}", tls=identity, server_name=SERVER_NAME))


@asynccontextmanager
async def sending(instance: Instance, identity: Identity) -> AsyncIterator[RawConnection]:
    """Open a syslog connection to one instance; write frames to it. Raises Unreachable."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(
                instance.host, instance.port, ssl=identity.client_context(), server_hostname=SERVER_NAME
            )
    except (OSError, TimeoutError) as error:
        raise Unreachable(f"logaggregator at {instance.addr}: {error or 'no answer in time'}") from error
    async with RawConnection(reader, writer) as connection:
        yield connection


class LogAggregator:
    """The HTTP API of the aggregator."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http

    async def __aenter__(self) -> LogAggregator:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    @asynccontextmanager
    async def log(self, app_id: str, params: Mapping[str, str]) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open an app's log: JSON lines, in chunks cut anywhere. `params` as in the API; raises ValidationError."""
        async with self._http.download(f"/log/{app_id}", params=params, silence=FOLLOW_SILENCE_SECONDS) as (_, chunks):
            yield chunks

    async def cursors(self) -> dict[str, SinkCursor]:
        """Return the newest message it has of each host."""
        return await self._http.get("/cursors", answer=dict[str, SinkCursor])

    async def snapshot(self) -> AsyncIterator[Message]:
        """Iterate over everything it has; messages that cannot be read are left out."""
        frames = FrameDecoder()
        async with self._http.download("/snapshot") as (_, chunks):
            async for chunk in chunks:
                for raw in frames.feed(chunk):
                    try:
                        yield decode(raw)
                    except Malformed:
                        continue
