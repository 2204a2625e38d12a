"""The router's small API: its events, and what it serves (routes are made in the controller). See spec/router 2."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from flynn.http.server import Api, EventStream, Raw, Request
from flynn.identity.access import INSIDERS
from flynn.router.client import RouterEvent
from flynn.router.control import Control
from flynn.router.metrics import exposition
from flynn.types.route import Route
from flynn.types.status import Health, Status
from flynn.version import VERSION


def router_api(control: Control) -> Api:
    async def status() -> Status:
        worker = await control.haproxy.info()
        problems = [{"route": problem.route, "reason": problem.reason} for problem in control.problems]
        detail: dict[str, Any] = {"routes": len(control.routes)}
        if problems:
            detail["problems"] = problems
        if control.failure:
            detail["configuration"] = control.failure
        # A route that cannot be served is its owner's problem; the router is ill when it does not run what it should.
        healthy = bool(worker) and not control.failure
        return Status(
            status=Health.HEALTHY.value if healthy else Health.UNHEALTHY.value, detail=detail, version=VERSION
        )

    async def events(request: Request) -> EventStream:
        kinds = frozenset(request.query("types").split(","))
        replay_routes = "set" in request.query("replay").split(",")

        async def wanted() -> AsyncIterator[RouterEvent]:
            async for event in control.subscribe(replay_routes=replay_routes):
                if event.event in kinds:
                    yield event

        return EventStream(wanted())

    async def routes(request: Request) -> list[Route]:
        return control.routes

    async def problems(request: Request) -> list[dict[str, str]]:
        return [{"route": problem.route, "reason": problem.reason} for problem in control.problems]

    async def backends(request: Request) -> list[dict[str, Any]]:
        return [
            {"pool": pool, "server": server, "in_flight": stat.in_flight, "requests": stat.requests}
            for (pool, server), stat in sorted((await control.haproxy.stats()).items())
        ]

    async def metrics(request: Request) -> Raw:
        from prometheus_client import generate_latest  # Costs memory, and most routers are never scraped.

        counted = exposition(await control.haproxy.stats())
        return Raw(generate_latest() + counted.encode(), "text/plain; version=0.0.4")

    api = Api("router", status=status)
    api.endpoints = [endpoint for endpoint in api.endpoints if endpoint.path != "/metrics"]
    api.route("GET", "/metrics", metrics, allow=INSIDERS)
    api.route("GET", "/events", events, allow=INSIDERS)
    api.route("GET", "/routes", routes, allow=INSIDERS)
    api.route("GET", "/problems", problems, allow=INSIDERS)
    api.route("GET", "/backends", backends, allow=INSIDERS)
    return api
