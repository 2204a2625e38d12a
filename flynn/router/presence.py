"""Which backends this router announces: up when HAProxy has them, down when it no longer does, drained when idle. Pure.

Only services with a route that asks for `drain_backends` are tracked: the scheduler waits for these events before it
calls a job up, and before it stops one. Counted per address over all routes of the service. See spec/router 8.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flynn.router.client import BackendInfo, RouterEvent, RouterEventKind
from flynn.router.stats import Place
from flynn.types.instance import Instance
from flynn.types.route import Route


@dataclass(slots=True)
class Presence:
    _up: dict[Place, BackendInfo] = field(default_factory=dict)
    _draining: dict[Place, BackendInfo] = field(default_factory=dict)
    _routes: dict[str, Route] = field(default_factory=dict)

    def applied(self, routes: Iterable[Route], instances: Mapping[str, Iterable[Instance]]) -> list[RouterEvent]:
        """Take note of what HAProxy now serves; the events this means. Routes come without private keys."""
        served = {f"{route.type}/{route.id}": route for route in routes}
        tracked = {route.service for route in served.values() if route.drain_backends}
        up = {
            (service, instance.addr): _info(service, instance)
            for service in sorted(tracked)
            for instance in instances.get(service, ())
        }
        events = [_route(RouterEventKind.SET, r) for key, r in served.items() if self._routes.get(key) != r]
        for place, info in up.items():
            self._draining.pop(place, None)
            if self._up.get(place) != info:
                events.append(_backend(RouterEventKind.BACKEND_UP, info))
        gone = {place: info for place, info in self._up.items() if place not in up}
        # Of a service that lost its last route nobody waits for a drained backend, as in the original.
        self._draining |= {place: info for place, info in gone.items() if place[0] in tracked}
        events += [_backend(RouterEventKind.BACKEND_DOWN, info) for info in gone.values()]
        events += [_route(RouterEventKind.REMOVE, r) for key, r in self._routes.items() if key not in served]
        self._up, self._routes = up, served
        return events

    @property
    def draining(self) -> bool:
        return bool(self._draining)

    def idle(self, in_flight: Mapping[Place, int]) -> list[RouterEvent]:
        """The backends that have left and have nothing in flight any more."""
        idle = {place: info for place, info in self._draining.items() if not in_flight.get(place)}
        for place in idle:
            del self._draining[place]
        return [_backend(RouterEventKind.BACKEND_DRAINED, info) for info in idle.values()]

    def replay(self, *, routes: bool) -> list[RouterEvent]:
        """What a new listener is told first."""
        known = [_route(RouterEventKind.SET, route) for route in self._routes.values()] if routes else []
        return known + [_backend(RouterEventKind.BACKEND_UP, info) for info in self._up.values()]


def _info(service: str, instance: Instance) -> BackendInfo:
    meta = instance.meta
    return BackendInfo(
        service=service,
        addr=instance.addr,
        app=meta.get("FLYNN_APP_NAME", ""),
        job_id=meta.get("FLYNN_JOB_ID", ""),
    )


def _route(kind: RouterEventKind, route: Route) -> RouterEvent:
    return RouterEvent(event=kind.value, route=route)


def _backend(kind: RouterEventKind, info: BackendInfo) -> RouterEvent:
    return RouterEvent(event=kind.value, backend=info)
