"""Keeping one instance announced in discoverd without ever taking it back: silence makes it expire.

For what outlives the daemon: a restarted daemon goes on announcing before the time to live is over, and nobody notices.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import NoReturn

from flynn.host.discovery import Discovery
from flynn.types.codec import replace
from flynn.types.errors import ApiError, NotFound
from flynn.types.instance import Instance

log = logging.getLogger(__name__)

HEARTBEAT = (3.0, 5.0)  # seconds, at random between the two: the time to live is 10, so one may be lost
HEARTBEAT_RETRY = (0.2, 0.4)


class Announcement:
    """An instance of a service, told to discoverd again and again by `run`."""

    def __init__(self, discovery: Discovery, service: str, instance: Instance) -> None:
        self.service, self.instance = service, instance
        self._discovery = discovery
        self._changed = asyncio.Event()

    def set_meta(self, meta: dict[str, str]) -> None:
        """Announce other metadata from now on, at once."""
        self.instance = replace(self.instance, meta=meta)
        self._changed.set()

    async def run(self) -> NoReturn:
        """Announce for ever, as soon as discoverd is known."""
        await self._discovery.connected.wait()
        healthy = True
        while True:
            self._changed.clear()
            try:
                await self._once()
                healthy = True
            except ApiError as error:
                if healthy:
                    log.warning("not announced", extra={"service": self.service, "error": str(error)})
                healthy = False
            try:
                async with asyncio.timeout(random.uniform(*(HEARTBEAT if healthy else HEARTBEAT_RETRY))):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _once(self) -> None:
        registry = self._discovery.registry
        try:
            await registry.register(self.service, self.instance)
        except NotFound:
            await registry.create(self.service)
            await registry.register(self.service, self.instance)
