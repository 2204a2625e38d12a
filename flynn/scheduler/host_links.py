"""The connections to all hosts: found in the directory, followed, listed, probed."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, aclosing
from datetime import timedelta
from typing import Any

from flynn.aio.backoff import Backoff
from flynn.aio.clock import Clock
from flynn.aio.supervisor import TaskSet
from flynn.discoverd.registry import Registry
from flynn.scheduler import wire
from flynn.scheduler.events import (
    HostChecked,
    HostDescribed,
    HostGone,
    HostSeen,
    JobReported,
    JobsListed,
    ListingFailed,
    Overruled,
    VolumesListed,
)
from flynn.scheduler.model import HostID
from flynn.scheduler.neighbours import HostApi, HostDialer, Tell
from flynn.scheduler.world import World
from flynn.types.errors import ApiError, NotFound, PreconditionFailed
from flynn.types.instance import EventKind, Instance

log = logging.getLogger(__name__)

HOST_SERVICE = "flynn-host"
COMPARE_EVERY = timedelta(seconds=10)
PROBE_LIMIT = timedelta(seconds=1)
RECONNECT = Backoff(first=timedelta(milliseconds=100), limit=timedelta(seconds=3))
LISTING_SLOTS = 16
QUICK = timedelta(seconds=10)  # for requests to hosts that only take something in


class HostLinks:
    def __init__(
        self, registry: Registry, dial: HostDialer, clock: Clock, tasks: TaskSet, world: World, tell: Tell
    ) -> None:
        self.found = asyncio.Event()  # set when a host has been connected to; cleared by whom it concerns
        self.current = asyncio.Event()  # all hosts that the directory lists are known
        self._registry = registry
        self._dial = dial
        self._clock = clock
        self._tasks = tasks
        self._world = world
        self._tell = tell
        self._addresses: dict[HostID, Instance] = {}  # of the hosts that the directory lists
        self._apis: dict[HostID, HostApi] = {}  # of the hosts that are followed
        self._followers: dict[HostID, asyncio.Task[Any]] = {}
        self._listing = asyncio.Semaphore(LISTING_SLOTS)

    def api(self, host: HostID) -> HostApi:
        """Raises `NotFound` while there is no connection to the host."""
        api = self._apis.get(host)
        if api is None:
            raise NotFound(f"host {host} is not connected")
        return api

    def connected(self) -> list[tuple[HostID, HostApi]]:
        return list(self._apis.items())

    def follow(self, host: HostID) -> None:
        self._followers[host] = self._tasks.start(f"follow {host}", self._follow(host))

    def unfollow(self, host: HostID) -> None:
        self._followers.pop(host).cancel()

    def check(self, host: HostID) -> None:
        """Probe a host; answered by `HostChecked`."""
        self._tasks.start(f"check {host}", self._check(host))

    async def list_all(self) -> None:
        """List the jobs and volumes of every host that is followed."""
        async with asyncio.TaskGroup() as group:
            for host, api in self.connected():
                group.create_task(self._try_to_list(host, api), name=f"list {host}")

    async def _try_to_list(self, host: HostID, api: HostApi) -> None:
        try:
            async with self._listing:
                await self._list(host, api)
        except PreconditionFailed:
            await self._tell(Overruled())
        except (ApiError, TimeoutError) as error:
            log.info("host cannot be listed", extra={"host": host, "error": error})
            await self._tell(ListingFailed(host))

    async def watch(self) -> None:
        async with aclosing(self._registry.watch(HOST_SERVICE)) as events:
            async for event in events:
                if event.kind is EventKind.CURRENT:
                    self.current.set()
                    continue
                instance = event.instance
                if instance is None or not instance.meta.get("id"):
                    continue
                host = HostID(instance.meta["id"])
                if event.kind in (EventKind.UP, EventKind.UPDATE):
                    self._addresses[host] = instance
                    await self._tell(_seen(host, instance))
                elif event.kind is EventKind.DOWN:
                    self._addresses.pop(host, None)
                    await self._tell(HostGone(host))

    async def compare(self) -> None:
        """Level, not edge: what the directory lists is followed, what it does not list is probed again and again."""
        while True:
            await self._clock.sleep(COMPARE_EVERY)
            if not self.current.is_set():
                continue
            for host in set(self._world.hosts) - set(self._addresses):
                await self._tell(HostGone(host))
            for host, instance in list(self._addresses.items()):
                if host not in self._world.hosts:
                    await self._tell(_seen(host, instance))

    async def _follow(self, host: HostID) -> None:
        """Keep a host's event stream open; list its jobs each time it begins, so that nothing falls between."""
        delays = RECONNECT.delays()
        async with AsyncExitStack() as stack:
            address: Instance | None = None
            while True:
                try:
                    current = self._addresses.get(host) or address
                    if current is None:
                        raise NotFound(f"{host} is not in the directory")
                    if address is None or current.addr != address.addr:
                        await stack.aclose()
                        self._apis[host] = await stack.enter_async_context(self._dial(host, current))
                        stack.callback(self._apis.pop, host, None)
                        address = current
                        self.found.set()
                    api = self._apis[host]
                    async with api.subscribed() as events:
                        await self._describe(host, api)
                        await self._list(host, api)
                        delays = RECONNECT.delays()
                        async for event in events:
                            if event.job is not None and (report := wire.report(host, event.job)) is not None:
                                await self._tell(JobReported(report))
                except PreconditionFailed:
                    await self._tell(Overruled())
                except (ApiError, TimeoutError) as error:
                    log.info("host stream interrupted", extra={"host": host, "error": error})
                    await self._tell(ListingFailed(host))
                await asyncio.sleep(next(delays))

    async def _describe(self, host: HostID, api: HostApi) -> None:
        async with asyncio.timeout(QUICK.total_seconds()):
            await self._tell(HostDescribed(host, (await api.status()).memory))

    async def _list(self, host: HostID, api: HostApi) -> None:
        asked_at = self._clock.now()
        async with asyncio.timeout(QUICK.total_seconds()):
            volumes = await api.volumes()
            jobs = await api.jobs()
        owned = (wire.volume_of_host(host, info) for info in volumes)
        reports = (wire.report(host, active) for active in jobs.values())
        await self._tell(VolumesListed(host, tuple(volume for volume in owned if volume is not None), asked_at))
        await self._tell(JobsListed(host, tuple(report for report in reports if report is not None), asked_at))

    async def _check(self, host: HostID) -> None:
        alive = False
        try:
            async with asyncio.timeout(PROBE_LIMIT.total_seconds()):
                alive = (await self.api(host).status()).id == host
        except (ApiError, TimeoutError) as error:
            log.debug("host does not answer", extra={"host": host, "error": error})
        await self._tell(HostChecked(host, alive))


def _seen(host: HostID, instance: Instance) -> HostSeen:
    tags = {
        key.removeprefix(wire.TAG_PREFIX): value
        for key, value in instance.meta.items()
        if key.startswith(wire.TAG_PREFIX)
    }
    return HostSeen(host, tags, shutting_down=wire.SHUTDOWN in instance.meta)
