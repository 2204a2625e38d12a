"""How others speak to a database process: by its database address, one port higher."""

from __future__ import annotations

from datetime import timedelta

from flynn.aio.backoff import Backoff, attempts
from flynn.appliances.sirenia.database import STARTING, DatabaseInfo
from flynn.appliances.sirenia.management import ApplianceStatus as ApplianceStatus
from flynn.appliances.sirenia.neighbours import Heard
from flynn.appliances.sirenia.suspicion import Answer
from flynn.discoverd.instances import join_host_port
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.types.errors import ApiError
from flynn.types.instance import Instance

POLL = Backoff(first=timedelta(milliseconds=100), factor=1, jitter=0)
ASK_SECONDS = 1.0
STOP_SECONDS = 180.0  # a database may have much to write before it stops


class NotYet(Exception):
    """What was waited for did not happen in time; carries the last thing heard."""


class DatabaseClient:
    def __init__(self, instance: Instance, identity: Identity, timeout: float = STOP_SECONDS) -> None:
        address = join_host_port(instance.host, instance.port + 1)
        self._http = HttpClient(f"https://{address}", tls=identity, timeout=timeout)

    async def status(self) -> ApplianceStatus:
        return await self._http.get("/status", answer=ApplianceStatus)

    async def stop(self) -> None:
        """Stop the database and take it out of the directory; its container stays up."""
        await self._http.post("/stop")

    async def freeze(self, reason: str) -> None:
        await self._http.post("/freeze", {"reason": reason})

    async def unfreeze(self) -> None:
        await self._http.post("/unfreeze")

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


class HttpNeighbours:
    """Implements `neighbours.Neighbours` by `/status`."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    async def ask(self, instance: Instance) -> Heard:
        # A new connection each time: whether one can be made is half of the question.
        client = DatabaseClient(instance, self._identity, timeout=ASK_SECONDS)
        try:
            status = await client.status()
        except ApiError as error:
            return Heard(Answer.REFUSED if _is_refused(error) else Answer.SILENT)
        finally:
            await client.close()
        database, state = status.database, status.peer.state
        return Heard(
            _answer(database),
            id=status.peer.id,
            role=status.peer.role,
            generation=state.generation if state is not None else 0,
            lineage=database.lineage.generation if database.lineage is not None else 0,
            timeline=database.timeline,
        )


def _answer(database: DatabaseInfo) -> Answer:
    if database.running and database.xlog:
        return Answer.WELL
    if database.detail == STARTING:
        return Answer.STARTING
    return Answer.WELL if database.detail else Answer.DOWN


def _is_refused(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ConnectionRefusedError):
        error = error.__cause__ or error.__context__
    return error is not None
