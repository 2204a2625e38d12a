"""How others speak to a database process: by its database address, one port higher."""

from __future__ import annotations

from datetime import timedelta

from flynn.aio.backoff import Backoff, attempts
from flynn.appliances.sirenia.management import ApplianceStatus
from flynn.discoverd.instances import join_host_port
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.types.errors import ApiError
from flynn.types.instance import Instance

POLL = Backoff(first=timedelta(milliseconds=100), factor=1, jitter=0)
STOP_SECONDS = 180.0  # a database may have much to write before it stops


class NotYet(Exception):
    """What was waited for did not happen in time; carries the last thing heard."""


class DatabaseClient:
    def __init__(self, instance: Instance, identity: Identity) -> None:
        address = join_host_port(instance.host, instance.port + 1)
        self._http = HttpClient(f"https://{address}", tls=identity, timeout=STOP_SECONDS)

    async def status(self) -> ApplianceStatus:
        return await self._http.get("/status", answer=ApplianceStatus)

    async def stop(self) -> None:
        """Stop the database and take it out of the directory; its container stays up."""
        await self._http.post("/stop")

    async def wait_read_write(self, within: timedelta) -> None:
        """Return once the database accepts writes. Raises NotYet."""
        last = "it was never asked"
        async for _ in attempts(POLL, within):
            try:
                status = await self.status()
            except ApiError as error:
                last = str(error)
                continue
            if status.database.read_write:
                return
            last = status.peer.reason
        raise NotYet(f"the database is not writable after {within.total_seconds():.0f} s: {last}")

    async def close(self) -> None:
        await self._http.close()
