"""The live end of the event log: one LISTEN per process, fanned out to everyone who follows.

PostgreSQL only says that there is something new; the hub then reads the log from where it stopped. Event ids become
visible in order (see `database`), so nothing is lost or repeated, also across a failover of the database: the streams
stay open and go on when the hub has a connection again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from datetime import timedelta

import psycopg

from flynn.aio.backoff import Backoff
from flynn.aio.broadcast import Broadcast, Overflowed, Subscription
from flynn.controller.database import Database, translated_errors
from flynn.controller.store.events import EventFilter, EventStore
from flynn.types.errors import ApiError, ServiceUnavailable
from flynn.types.event import Event

log = logging.getLogger(__name__)

QUEUE_LIMIT = 1000  # events a follower may be behind
LISTEN_TIMEOUT = timedelta(seconds=15)  # then the log is looked at anyway, which also proves the connection alive
RECONNECT = Backoff(first=timedelta(milliseconds=200), limit=timedelta(seconds=2))
STABLE = timedelta(seconds=10)  # a connection that lasted as long resets the back-off

EVERYTHING = EventFilter()


class EventHub:
    """Follow the event log. `run` is the endless task that feeds everybody."""

    def __init__(self, database: Database, events: EventStore) -> None:
        self._database = database
        self._events = events
        self._live: Broadcast[Event] = Broadcast()
        self._newest: int | None = None
        self._started = asyncio.Event()
        self.queue_changed = asyncio.Event()  # set whenever work may have been queued; who waits for it clears it

    async def run(self) -> None:
        """Read and spread events for ever, reconnecting as needed."""
        loop = asyncio.get_running_loop()
        delays = RECONNECT.delays()
        while True:
            began = loop.time()
            try:
                await self._listen()
            except ApiError as error:
                log.warning("event connection lost", extra={"error": error.message})
            if loop.time() - began > STABLE.total_seconds():
                delays = RECONNECT.delays()
            await asyncio.sleep(next(delays))

    async def _listen(self) -> None:
        connection = await self._database.dedicated()
        try:
            with translated_errors():
                await connection.execute("LISTEN events")
                await connection.execute("LISTEN que_jobs")
                if self._newest is None:
                    self._newest = await self._events.newest_id()
                self._started.set()
                self.queue_changed.set()
                while True:
                    await self._spread()
                    async for notification in connection.notifies(timeout=LISTEN_TIMEOUT.total_seconds(), stop_after=1):
                        if notification.channel == "que_jobs":
                            self.queue_changed.set()
                    await connection.execute("SELECT 1")
        finally:
            await _close(connection)

    async def _spread(self) -> None:
        assert self._newest is not None
        async with aclosing(self._events.after(EVERYTHING, self._newest)) as news:  # type: ignore[type-var]
            async for event in news:
                self._newest = event.id
                self._live.send(event)

    async def started(self) -> None:
        """Return once the hub follows the log. Raises `ServiceUnavailable` while there is no database."""
        try:
            async with asyncio.timeout(5):
                await self._started.wait()
        except TimeoutError:
            raise ServiceUnavailable("the database cannot be reached right now") from None

    def subscribe(self) -> AbstractAsyncContextManager[Subscription[Event]]:
        """Open the live events from now on; call `started` first."""
        return self._live.subscribe(QUEUE_LIMIT)

    def stop(self, reason: ApiError) -> None:
        """End every stream with an error event."""
        self._live.close(reason)

    async def follow(
        self, wanted: EventFilter, *, last_id: int = 0, past: bool = False, count: int | None = None
    ) -> AsyncIterator[Event]:
        """Yield stored events after `last_id` (or all, or the latest `count`, with `past`), then live ones.

        A resumed stream is never cut down to `count`: it would lose what lies between.
        """
        await self.started()
        async with self.subscribe() as live:
            reached = self._newest or 0
            if past or last_id > 0:
                if count and not last_id:
                    history = await self._events.all(wanted, count=count)
                    for event in reversed(history):
                        reached = max(reached, event.id)
                        yield event
                else:
                    async for event in self._events.after(wanted, last_id):
                        reached = max(reached, event.id)
                        yield event
            async for event in told(live):
                if event.id > reached and wanted.admits(event):
                    yield event


async def told(live: Subscription[Event]) -> AsyncIterator[Event]:
    """Yield what a subscription delivers; falling too far behind ends it with the original's words."""
    try:
        async for event in live:
            yield event
    except Overflowed as error:
        raise ServiceUnavailable("event stream buffer overflow") from error


async def _close(connection: psycopg.AsyncConnection[tuple[object, ...]]) -> None:
    try:
        await connection.close()
    except psycopg.Error:
        pass
