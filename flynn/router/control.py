"""The control plane's loop: what the controller and discoverd say goes in, a configured HAProxy comes out.

Level-triggered: every change marks the whole as stale, and the whole is computed anew, compared and applied by one
task. What is known is kept on disk, so that a restart serves at once, also without controller and discoverd.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from flynn.aio.broadcast import Broadcast
from flynn.aio.supervisor import Spawn, TaskSet
from flynn.discoverd.registry import Registry
from flynn.discoverd.view import View
from flynn.router.client import RouterEvent
from flynn.router.haproxy import Haproxy, Invalid, ReloadFailed
from flynn.router.pairs import check_pair
from flynn.router.presence import Presence
from flynn.router.render import Rendered, Settings, render
from flynn.router.sources import RouteSource
from flynn.router.stats import in_flight
from flynn.router.table import (
    Problem,
    RoutingState,
    ServiceState,
    build,
    formatted_id,
    services_of,
)
from flynn.types.codec import Wire, decode, encode, replace
from flynn.types.errors import ApiError
from flynn.types.instance import EventKind, Instance
from flynn.types.route import Route

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.02  # what arrives together is applied together
FIRST_WATCHES_SECONDS = 5.0  # a first configuration waits this long for the backends of its services
RETRY_SECONDS = 2.0
DRAIN_POLL_SECONDS = 0.1
REAP_SECONDS = 2.0
IDENTITY_POLL_SECONDS = 30.0


class KnownService(Wire):
    instances: list[Instance] = []
    leader: Instance | None = None


class Known(Wire):
    """What a restart begins with."""

    routes: list[Route] = []
    services: dict[str, KnownService] = {}
    platform: list[str] = []  # services that were seen to consist of daemons of ours


class Control:
    """`settings` is asked anew at every change: the identity in it is renewed while the router runs."""

    def __init__(
        self,
        haproxy: Haproxy,
        settings: Callable[[], Settings],
        source: RouteSource,
        registry: Registry,
        state_file: Path,
    ) -> None:
        self.haproxy = haproxy
        self.events: Broadcast[RouterEvent] = Broadcast()
        self.presence = Presence()
        self.state = RoutingState()
        self.failure = ""  # why the latest configuration is not the running one
        self._settings = settings
        self._source = source
        self._registry = registry
        self._state_file = state_file
        self._known = _load(state_file)
        self._routes: list[Route] = list(self._known.routes)
        self._services = {
            name: ServiceState(tuple(service.instances), service.leader)
            for name, service in self._known.services.items()
        }
        self._platform = set(self._known.platform)
        self._synced = bool(self._known.routes)
        self._pending = asyncio.Event()  # something is to be applied
        self._applied = asyncio.Event()
        self._quarantine: dict[str, tuple[Route, str]] = {}  # routes HAProxy itself refused
        self._good: dict[str, Route] = {}  # routes in what runs
        self._watched: dict[str, asyncio.Task[None]] = {}
        self._current: set[str] = set()

    def start(self, spawn: Spawn, watches: TaskSet) -> None:
        spawn("follow routes", self._follow_routes(watches))
        spawn("apply", self._apply_changes())
        spawn("drain", self._announce_drained())
        spawn("reap", self._reap())
        spawn("follow identity", self._follow_identity())
        if self._synced:
            self._watch_services(watches)
            self._pending.set()

    async def caught_up(self) -> None:
        """Wait until HAProxy runs a configuration of ours."""
        await self._applied.wait()

    @property
    def routes(self) -> list[Route]:
        """What is served, without private keys."""
        return [without_keys(route) for route in self._good.values()]

    @property
    def problems(self) -> list[Problem]:
        refused = [Problem(formatted_id(route), reason) for route, reason in self._quarantine.values()]
        return [*self.state.problems, *refused]

    async def subscribe(self, *, replay_routes: bool) -> AsyncIterator[RouterEvent]:
        async with self.events.subscribe() as events:
            for event in self.presence.replay(routes=replay_routes):
                yield event
            async for event in events:
                yield event

    # What comes in

    async def _follow_routes(self, watches: TaskSet) -> None:
        async for routes in self._source.follow():
            if self._synced and routes == self._routes:
                continue
            self._routes = routes
            self._synced = True
            self._watch_services(watches)
            self._pending.set()

    def _watch_services(self, watches: TaskSet) -> None:
        wanted = services_of(self._routes)
        for service in wanted - self._watched.keys():
            self._watched[service] = watches.start(f"watch {service}", self._watch(service))
        for service in self._watched.keys() - wanted:
            self._watched.pop(service).cancel()
            self._current.discard(service)
            self._services.pop(service, None)

    async def _watch(self, service: str) -> None:
        view = View()
        while True:
            try:
                async for event in self._registry.watch(service):
                    if event.kind is EventKind.CURRENT:
                        self._current.add(service)
                    elif not view.apply(event):
                        continue
                    if service in self._current:
                        instances = sorted(view.instances.values(), key=lambda instance: instance.addr)
                        self._services[service] = ServiceState(tuple(instances), view.leader)
                        self._pending.set()
            except ApiError as error:
                log.warning("cannot watch a service", extra={"service": service, "error": str(error)})
            view = View()
            await asyncio.sleep(RETRY_SECONDS)

    async def _follow_identity(self) -> None:
        """A renewed certificate is a change like any other."""
        before = self._settings().identity
        while True:
            await asyncio.sleep(IDENTITY_POLL_SECONDS)
            if (now := self._settings().identity) != before:
                before = now
                self._pending.set()

    # What goes out

    async def _apply_changes(self) -> None:
        if not self._synced:
            await self._pending.wait()
            await self._watches_are_current()
        while True:
            await self._pending.wait()
            await asyncio.sleep(SETTLE_SECONDS)
            self._pending.clear()
            try:
                await self._apply()
                self.failure = ""
            except (Invalid, ReloadFailed, OSError, TimeoutError) as error:
                self.failure = f"{type(error).__name__}: {error}"
                log.error("HAProxy keeps its last configuration", extra={"error": self.failure})
                await asyncio.sleep(RETRY_SECONDS)
                self._pending.set()

    async def _watches_are_current(self) -> None:
        deadline = asyncio.get_running_loop().time() + FIRST_WATCHES_SECONDS
        while services_of(self._routes) - self._current and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(SETTLE_SECONDS)

    async def _apply(self) -> None:
        routes = [route for route in self._routes if not self._quarantined(route)]
        services = dict(self._services)
        try:
            state, rendered = self._build(routes, services)
            await self.haproxy.apply(rendered)
        except Invalid as error:
            routes = await self._without_offenders(routes, services, error)
            state, rendered = self._build(routes, services)
            await self.haproxy.apply(rendered)
        if state.problems != self.state.problems:
            for problem in set(state.problems) - set(self.state.problems):
                log.warning("a route is not served as asked", extra={"route": problem.route, "reason": problem.reason})
        self.state = state
        refused = {problem.route for problem in state.problems} - {
            f"http/{route.id}" for route in state.http
        }  # a route whose certificate alone is bad is served
        self._good = {formatted_id(route): route for route in routes if formatted_id(route) not in refused}
        self._remember(services)
        self._applied.set()
        instances = {name: service.instances for name, service in services.items()}
        for event in self.presence.applied(self.routes, instances):
            self.events.send(event)

    def _build(self, routes: list[Route], services: Mapping[str, ServiceState]) -> tuple[RoutingState, Rendered]:
        settings = self._settings()
        self._platform |= {
            name for name, service in services.items() if any(i.proto == "https" for i in service.instances)
        }
        additional = frozenset((*settings.additional_http_ports, *settings.additional_https_ports))
        state = build(
            routes,
            services,
            check_pair=check_pair,
            additional_ports=additional,
            platform_services=frozenset(self._platform),
            refused_ports=self._taken_ports(routes, settings.listen_ip),
        )
        return state, render(state, settings)

    def _quarantined(self, route: Route) -> bool:
        """Whether HAProxy refused this very route; a changed one gets another chance."""
        held = self._quarantine.get(route.id)
        if held is not None and held[0] != route:
            del self._quarantine[route.id]
            return False
        return held is not None

    async def _without_offenders(
        self, routes: list[Route], services: Mapping[str, ServiceState], error: Invalid
    ) -> list[Route]:
        """Find the new routes that make the configuration invalid, by trying each on top of what is good."""
        kept = [route for route in routes if self._good.get(formatted_id(route)) == route]
        await self.haproxy.validate(self._build(kept, services)[1])  # if even this fails, it is not a route's fault
        for route in routes:
            if route in kept:
                continue
            try:
                await self.haproxy.validate(self._build([*kept, route], services)[1])
                kept.append(route)
            except Invalid as reason:
                log.error("HAProxy refuses a route", extra={"route": formatted_id(route), "reason": str(reason)})
                self._quarantine[route.id] = (route, str(reason))
        return kept

    def _taken_ports(self, routes: list[Route], listen_ip: str) -> dict[int, str]:
        """Ports of new TCP routes that somebody else listens on. HAProxy would refuse everything because of one."""
        ours = {route.port for route in self.state.tcp}
        taken: dict[int, str] = {}
        for port in {route.port for route in routes if route.type == "tcp"} - ours:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as HAProxy does, here or next door
                try:
                    probe.bind((listen_ip or "0.0.0.0", port))
                except OverflowError:
                    continue  # refused as not a port
                except OSError as error:
                    if error.errno in (errno.EADDRINUSE, errno.EACCES):
                        taken[port] = os.strerror(error.errno)
        return taken

    async def _announce_drained(self) -> None:
        while True:
            await asyncio.sleep(DRAIN_POLL_SECONDS)
            if not self.presence.draining:
                continue
            try:
                stats = await self.haproxy.stats()
            except (OSError, TimeoutError):
                continue
            for event in self.presence.idle(in_flight(stats)):
                self.events.send(event)

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(REAP_SECONDS)
            try:
                await self.haproxy.reap()
            except (OSError, TimeoutError):
                continue  # being restarted

    def _remember(self, services: Mapping[str, ServiceState]) -> None:
        known = Known(
            routes=self._routes,
            services={
                name: KnownService(instances=list(service.instances), leader=service.leader)
                for name, service in sorted(services.items())
            },
            platform=sorted(self._platform),
        )
        if known != self._known:
            self._known = known
            beside = self._state_file.with_name(f".{self._state_file.name}.new")
            beside.touch(mode=0o600)
            beside.write_bytes(encode(known))
            os.replace(beside, self._state_file)


def _load(path: Path) -> Known:
    try:
        return decode(path.read_bytes(), Known)
    except FileNotFoundError:
        return Known()
    except (ApiError, OSError) as error:
        log.warning("cannot read what was known", extra={"path": str(path), "error": str(error)})
        return Known()


def without_keys(route: Route) -> Route:
    certificate = route.certificate and replace(route.certificate, key="")
    return replace(route, tls_key="", certificate=certificate)
