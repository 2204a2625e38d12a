"""How every component speaks to discoverd.

    async with Discoverd.from_environment(os.environ) as registry, supervisor() as spawn:
        async for event in registry.watch("web"): ...
        async with registry.registered("web", instance_from_environment(os.environ, port)): ...

Calls are retried for a bounded time on every endpoint there is; watches and registrations are retried for ever. What
is told about a service is described at `registry.Registry`, of which this is the real implementation.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from datetime import timedelta
from typing import Self, TypeVar

from flynn.aio.backoff import Backoff, attempts, retrying
from flynn.aio.supervisor import supervisor
from flynn.discoverd.view import Replay, leaders
from flynn.http.client import HttpClient, KeyAuth
from flynn.identity import Identity
from flynn.types.codec import replace
from flynn.types.errors import ApiError, Forbidden, NotFound, ObjectExists, Unauthorized, ValidationError
from flynn.types.instance import DiscoverdEvent, Instance, LeaderType, ServiceConfig, ServiceMeta

log = logging.getLogger(__name__)

T = TypeVar("T")

CALL_TIMEOUT = timedelta(seconds=3)  # one try on one endpoint; three fit into the time to live of an instance
CALL_LIMIT = timedelta(seconds=10)  # one call with all its tries
BETWEEN_ROUNDS = Backoff(first=timedelta(milliseconds=100), factor=1.5, limit=timedelta(seconds=1))
RECONNECT = Backoff(first=timedelta(milliseconds=100), factor=2, limit=timedelta(seconds=3))

HEARTBEAT = (3.0, 5.0)  # seconds, at random between the two: the time to live is 10, so one may be lost
HEARTBEAT_RETRY = (0.2, 0.4)
FIRST_REGISTRATION = timedelta(seconds=60)

HOPELESS = (Forbidden, Unauthorized, ValidationError)
"""Answers that will be the same next time; everything else may be a daemon that is just starting or going."""


class Discoverd:
    """A client of one cluster's directory. Open it with `async with`."""

    def __init__(self, endpoints: Sequence[HttpClient]) -> None:
        """`endpoints`: the nearest first."""
        if not endpoints:
            raise ValueError("a client of discoverd needs at least one endpoint")
        self._endpoints = list(endpoints)
        self._preferred = 0  # the nearest; then the endpoint that answered last

    @classmethod
    def connect(
        cls, urls: Sequence[str] | str, *, identity: Identity | None = None, key: str | None = None
    ) -> Discoverd:
        """`urls`: a list, or a comma separated string as in the variable DISCOVERD; `ip:port` gets its scheme here.

        With an `identity` the connections are TLS. A `key` (the host's admin key) is for plain loopback addresses.
        """
        addresses = urls.split(",") if isinstance(urls, str) else urls
        scheme = "https" if identity is not None else "http"
        return cls(
            [
                HttpClient(
                    address if "://" in address else f"{scheme}://{address}",
                    tls=identity,
                    auth=KeyAuth(key) if key is not None else None,
                    timeout=CALL_TIMEOUT.total_seconds(),
                )
                for address in (item.strip() for item in addresses)
                if address
            ]
        )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Discoverd:
        """`DISCOVERD` (empty or `none`: the node's own, at EXTERNAL_IP) with the identity in `FLYNN_IDENTITY`."""
        urls = environ.get("DISCOVERD", "")
        if urls in ("", "none"):
            urls = f"{environ.get('EXTERNAL_IP', '127.0.0.1')}:1111"
        return cls.connect(urls, identity=Identity.from_environment(environ))

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for endpoint in self._endpoints:
                await stack.enter_async_context(endpoint)
            self._closing = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._closing.aclose()

    async def create(self, service: str, leader_type: LeaderType = LeaderType.OLDEST) -> bool:
        try:
            await self._call(lambda http: http.put(f"/services/{service}", ServiceConfig(leader_type=leader_type)))
        except ObjectExists:
            return False
        return True

    async def remove(self, service: str) -> None:
        await self._call(lambda http: http.delete(f"/services/{service}"))

    async def instances(self, service: str) -> list[Instance]:
        try:
            return await self._call(lambda http: http.get(f"/services/{service}/instances", answer=list[Instance]))
        except NotFound:
            return []

    async def leader(self, service: str) -> Instance | None:
        try:
            return await self._call(lambda http: http.get(f"/services/{service}/leader", answer=Instance))
        except NotFound:
            return None

    async def set_leader(self, service: str, instance_id: str) -> None:
        await self._call(lambda http: http.put(f"/services/{service}/leader", {"id": instance_id}))

    async def get_meta(self, service: str) -> ServiceMeta | None:
        try:
            return await self._call(lambda http: http.get(f"/services/{service}/meta", answer=ServiceMeta))
        except NotFound:
            return None

    async def put_meta(self, service: str, meta: ServiceMeta) -> ServiceMeta:
        """As in the interface; a try that succeeded but whose answer was lost looks like a lost race."""
        return await self._call(lambda http: http.put(f"/services/{service}/meta", meta, answer=ServiceMeta))

    async def register(self, service: str, instance: Instance) -> None:
        await self._call(lambda http: http.put(f"/services/{service}/instances/{instance.id}", instance))

    async def deregister(self, service: str, instance_id: str) -> None:
        try:
            await self._call(lambda http: http.delete(f"/services/{service}/instances/{instance_id}"))
        except NotFound:
            return

    async def forget_job(self, job_id: str) -> None:
        try:
            await self._call(lambda http: http.delete(f"/jobs/{job_id}/instances"))
        except NotFound:
            return  # a discoverd from before there was such a thing

    @asynccontextmanager
    async def registered(
        self, service: str, instance: Instance, *, leader_type: LeaderType = LeaderType.OLDEST
    ) -> AsyncIterator[KeptRegistration]:
        """As in the interface. The first registration may take a minute; later failures are only logged and retried.

        Leaving the block removes the instance within `CALL_LIMIT`, or leaves that to the time to live.
        """
        registration = KeptRegistration(self, service, instance, leader_type)
        await retrying(registration.announce, on=ApiError, policy=BETWEEN_ROUNDS, within=FIRST_REGISTRATION)
        failure: Exception | None = None
        try:
            async with supervisor() as spawn:
                spawn(f"heartbeat of {service}", registration.heartbeat())
                try:
                    yield registration
                except Exception as error:
                    failure = error  # The task group would wrap it, and the caller has no idea that there is one.
            if failure is not None:
                raise failure
        finally:
            try:
                await self.deregister(service, instance.id)
            except ApiError as error:
                log.warning("could not deregister", extra={"service": service, "error": error})

    async def watch(self, service: str) -> AsyncGenerator[DiscoverdEvent, None]:
        replay = Replay(service)
        delays = RECONNECT.delays()
        tried = 0
        while True:
            # The nearest first, always: it goes silent only together with whoever is watching.
            http = self._endpoints[tried % len(self._endpoints)]
            tried += 1
            try:
                async with http.subscribed(f"/services/{service}", DiscoverdEvent) as events:
                    async for event in events:
                        delays, tried = RECONNECT.delays(), 0
                        for news in replay.feed(event):
                            yield news
            except HOPELESS:
                raise
            except ApiError as error:
                log.debug("watch interrupted", extra={"service": service, "error": error})
            replay.disconnected()
            await asyncio.sleep(next(delays))

    async def watch_leader(self, service: str) -> AsyncGenerator[Instance | None, None]:
        async with aclosing(self.watch(service)) as events:
            async for leader in leaders(events):
                yield leader

    async def _call(self, call: Callable[[HttpClient], Awaitable[T]]) -> T:
        """Try all endpoints, in rounds, until one gives an answer that is not "try again"."""
        last: ApiError | None = None
        async for _ in attempts(BETWEEN_ROUNDS, CALL_LIMIT):
            for _ in self._endpoints:
                http = self._endpoints[self._preferred]
                try:
                    return await call(http)
                except ApiError as error:
                    if not error.retry:
                        raise
                    last = error
                self._next_endpoint(http)
        assert last is not None  # there is at least one endpoint
        raise last

    def _next_endpoint(self, failed: HttpClient) -> None:
        """Prefer another endpoint than `failed`, unless someone else has moved on already."""
        if self._endpoints[self._preferred] is failed:
            self._preferred = (self._preferred + 1) % len(self._endpoints)


class KeptRegistration:
    """One instance, announced again and again until its block ends."""

    def __init__(self, registry: Discoverd, service: str, instance: Instance, leader_type: LeaderType) -> None:
        self.instance = instance
        self._registry = registry
        self._service = service
        self._leader_type = leader_type

    async def set_meta(self, meta: Mapping[str, str]) -> None:
        self.instance = replace(self.instance, meta=dict(meta))
        await self.announce()

    async def announce(self) -> None:
        """Register once; a service that does not exist (any more) is created."""
        try:
            await self._registry.register(self._service, self.instance)
        except NotFound:
            await self._registry.create(self._service, self._leader_type)
            await self._registry.register(self._service, self.instance)

    async def heartbeat(self) -> None:
        healthy = True
        while True:
            # Spread at random, so that the instances of a cluster do not march in step.
            await asyncio.sleep(random.uniform(*(HEARTBEAT if healthy else HEARTBEAT_RETRY)))
            try:
                await self.announce()
            except ApiError as error:
                if healthy:
                    log.warning("heartbeat failed", extra={"service": self._service, "error": error})
                healthy = False
            else:
                if not healthy:
                    log.info("heartbeat restored", extra={"service": self._service})
                healthy = True
