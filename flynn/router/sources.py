"""Where routes come from: the controller, listened to for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Protocol

from flynn.aio.backoff import Backoff
from flynn.controller.client import Controller
from flynn.types.errors import ApiError
from flynn.types.event import EventType
from flynn.types.route import Route

log = logging.getLogger(__name__)

ROUTE_EVENTS = (EventType.ROUTE, EventType.ROUTE_DELETION)
RESYNC_SECONDS = 60.0  # a full list now and then: whatever was missed does not last
SETTLE_SECONDS = 0.02  # several routes are often created at once


class RouteSource(Protocol):
    def follow(self) -> AsyncIterator[list[Route]]:
        """All routes, again after every change, without end and without an error."""


class ControllerRoutes:
    """Lists again at every event: the list has the private keys, which events do not need to carry."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self.connected = False

    async def follow(self) -> AsyncIterator[list[Route]]:
        pauses = Backoff().delays()
        while True:
            try:
                async with aclosing(self._connection()) as lists:
                    async for routes in lists:
                        self.connected = True
                        pauses = Backoff().delays()
                        yield routes
            except (ApiError, OSError, TimeoutError) as error:
                if self.connected:
                    log.warning("lost the controller, serving what is known", extra={"error": str(error)})
                self.connected = False
            await asyncio.sleep(next(pauses))

    async def _connection(self) -> AsyncGenerator[list[Route], None]:
        # The place in the history is fixed before the list is read, so nothing falls between the two.
        newest = await self._controller.events(object_types=ROUTE_EVENTS, count=1)
        events = self._controller.follow_events(
            object_types=ROUTE_EVENTS, last_id=newest[0].id if newest else 0, past=not newest
        )
        yield await self._controller.routes()
        async with aclosing(events):
            upcoming = asyncio.ensure_future(anext(events))
            try:
                while True:
                    done, _ = await asyncio.wait((upcoming,), timeout=RESYNC_SECONDS)
                    if done:
                        upcoming.result()
                        upcoming = asyncio.ensure_future(anext(events))
                        await asyncio.sleep(SETTLE_SECONDS)
                    yield await self._controller.routes()
            except StopAsyncIteration:
                return
            finally:
                upcoming.cancel()
                await asyncio.wait((upcoming,))
