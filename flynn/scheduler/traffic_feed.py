"""Which jobs are in service, and which routers carry them: told by the directory and by the routers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import aclosing
from datetime import timedelta
from typing import Any

from flynn.aio.backoff import Backoff
from flynn.aio.supervisor import TaskSet
from flynn.discoverd.registry import Registry
from flynn.jobspec import split_job_id
from flynn.router.client import RouterEvent, RouterEventKind
from flynn.scheduler.events import (
    BackendDrained,
    BackendUp,
    Event,
    RouteRemoved,
    RouterGone,
    RouteSet,
    ServiceListed,
)
from flynn.scheduler.model import JobID, RouterID
from flynn.scheduler.neighbours import RouterDialer, Tell
from flynn.types.errors import ApiError, NotFound
from flynn.types.instance import EventKind, Instance

log = logging.getLogger(__name__)

ROUTER_SERVICE = "router-api"
ROUTERS_WITHOUT_EVENTS = timedelta(seconds=60)  # a router that has no event stream is asked again after this
RECONNECT = Backoff(first=timedelta(milliseconds=100), limit=timedelta(seconds=3))


class TrafficFeed:
    def __init__(self, registry: Registry, dial_router: RouterDialer, tasks: TaskSet, tell: Tell) -> None:
        self._registry = registry
        self._dial_router = dial_router
        self._tasks = tasks
        self._tell = tell
        self._service_tasks: dict[str, asyncio.Task[Any]] = {}

    def watch_services(self, services: frozenset[str]) -> None:
        for service in set(self._service_tasks) - services:
            self._service_tasks.pop(service).cancel()
        for service in services - set(self._service_tasks):
            self._service_tasks[service] = self._tasks.start(f"watch {service}", self._watch_service(service))

    async def _watch_service(self, service: str) -> None:
        jobs: dict[str, JobID] = {}
        async with aclosing(self._registry.watch(service)) as events:
            async for event in events:
                if event.instance is not None:
                    uuid = _job_of(event.instance.meta)
                    if event.kind in (EventKind.UP, EventKind.UPDATE) and uuid is not None:
                        jobs[event.instance.id] = uuid
                    elif event.kind is EventKind.DOWN:
                        jobs.pop(event.instance.id, None)
                    else:
                        continue
                    await self._tell(ServiceListed(service, frozenset(jobs.values())))

    async def watch_routers(self) -> None:
        followers: dict[str, asyncio.Task[Any]] = {}
        async with aclosing(self._registry.watch(ROUTER_SERVICE)) as events:
            async for event in events:
                if event.instance is None:
                    continue
                id = event.instance.id
                if event.kind is EventKind.UP and id not in followers:
                    followers[id] = self._tasks.start(f"router {id}", self._follow_router(event.instance))
                elif event.kind is EventKind.DOWN and id in followers:
                    followers.pop(id).cancel()
                    await self._tell(RouterGone(RouterID(id)))

    async def _follow_router(self, instance: Instance) -> None:
        router = RouterID(instance.id)
        delays = RECONNECT.delays()
        while True:
            pause = next(delays)
            try:
                async with self._dial_router(instance) as events:
                    async for event in events:
                        delays = RECONNECT.delays()
                        if (news := _router_news(router, event)) is not None:
                            await self._tell(news)
            except NotFound:
                pause = ROUTERS_WITHOUT_EVENTS.total_seconds()
            except ApiError as error:
                log.info("router stream interrupted", extra={"router": instance.addr, "error": error})
            await self._tell(RouterGone(router))
            await asyncio.sleep(pause)


def _router_news(router: RouterID, event: RouterEvent) -> Event | None:
    parts = split_job_id(event.backend.job_id) if event.backend is not None else None
    match event.event:
        case RouterEventKind.SET if event.route is not None and event.route.drain_backends:
            # Of services that are not drained routers tell no backends: nothing could be waited for.
            return RouteSet(router, event.route.service)
        case RouterEventKind.REMOVE if event.route is not None:
            return RouteRemoved(router, event.route.service)
        case RouterEventKind.BACKEND_UP if event.backend is not None and parts is not None:
            return BackendUp(router, event.backend.service, JobID(parts[1]))
        case RouterEventKind.BACKEND_DRAINED if parts is not None:
            return BackendDrained(router, JobID(parts[1]))
    return None


def _job_of(meta: Mapping[str, str]) -> JobID | None:
    parts = split_job_id(meta.get("FLYNN_JOB_ID", ""))
    return JobID(parts[1]) if parts is not None else None
