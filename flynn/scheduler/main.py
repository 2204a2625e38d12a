"""The `flynn-scheduler` daemon: configuration, connections, and the order in which things begin.

Hosts and formations are known before the scheduler registers itself, so that during a deployment of the controller
there is always one that has seen everything; only then may it become the leader.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from random import Random

from flynn import daemon
from flynn.aio.clock import SystemClock
from flynn.aio.supervisor import TaskSet, supervisor
from flynn.controller import client as controller_client
from flynn.discoverd.client import Discoverd
from flynn.discoverd.instances import instance_from_environment
from flynn.host.client import HostClient
from flynn.http.client import HttpClient
from flynn.http.server import Api, Raw, Request, listen
from flynn.identity import INSIDERS, Identity
from flynn.router.client import Router, RouterEvent, RouterEventKind
from flynn.scheduler import wire
from flynn.scheduler.engine import Engine
from flynn.scheduler.figures import exposition
from flynn.scheduler.loop import SERVICE, SchedulerLoop
from flynn.scheduler.mandate import Mandate
from flynn.scheduler.model import HostID
from flynn.types.instance import Instance
from flynn.types.status import Status

COMPONENT = "scheduler"
GRACE = timedelta(seconds=10)
LAST_WORDS = timedelta(seconds=3)  # for updates that the controller has not been told yet
ROUTER_EVENTS = (
    RouterEventKind.SET,
    RouterEventKind.REMOVE,
    RouterEventKind.BACKEND_UP,
    RouterEventKind.BACKEND_DRAINED,
)


@dataclass(frozen=True, slots=True)
class Config:
    key: str  # CONTROLLER_KEY or AUTH_KEY: the controller's key
    port: int = 5000  # PORT: status and debug state
    job_id: str = ""  # FLYNN_JOB_ID
    controller_url: str = controller_client.INSIDE_URL  # CONTROLLER_URL, for tests


def configure(environ: Mapping[str, str]) -> Config:
    key = environ.get("CONTROLLER_KEY") or environ.get("AUTH_KEY")
    if not key:
        raise daemon.ConfigError("CONTROLLER_KEY is not set")
    port = environ.get("PORT") or "5000"
    if not port.isdigit():
        raise daemon.ConfigError(f"PORT is not a number: {port!r}")
    if not environ.get("EXTERNAL_IP"):
        raise daemon.ConfigError("EXTERNAL_IP is not set")
    return Config(
        key=key,
        port=int(port),
        job_id=environ.get("FLYNN_JOB_ID", ""),
        controller_url=environ.get("CONTROLLER_URL") or controller_client.INSIDE_URL,
    )


@asynccontextmanager
async def running(environ: Mapping[str, str]) -> AsyncIterator[None]:
    config = configure(environ)
    identity = Identity.from_environment(environ)
    mandate = Mandate()

    @asynccontextmanager
    async def dial_host(host: HostID, instance: Instance) -> AsyncIterator[HostClient]:
        async with HttpClient(f"https://{instance.addr}", tls=identity, live_headers=mandate.headers) as http:
            yield HostClient(http)

    @asynccontextmanager
    async def dial_router(instance: Instance) -> AsyncIterator[AsyncIterator[RouterEvent]]:
        async with HttpClient(f"https://{instance.addr}", tls=identity) as http:
            yield Router(http).events(ROUTER_EVENTS, replay_routes=True)

    engine = Engine(Random(), lambda: str(uuid.uuid4()))
    own = instance_from_environment(environ, config.port, "https")
    async with (
        Discoverd.from_environment(environ) as registry,
        controller_client.inside(config.key, identity, url=config.controller_url) as controller,
        TaskSet() as tasks,
        supervisor() as spawn,
    ):
        loop = SchedulerLoop(engine, registry, controller, dial_host, dial_router, SystemClock(), tasks, mandate)
        loop.start(spawn)
        async with listen(status_api(loop, config.job_id), "0.0.0.0", config.port, tls=identity):
            await loop.caught_up()
            async with registry.registered(SERVICE, own):
                spawn("watch leader", loop.watch_leader(own))
                try:
                    yield
                finally:
                    await loop.rest(LAST_WORDS)


def status_api(loop: SchedulerLoop, job_id: str) -> Api:
    async def status() -> Status:
        engine = loop.engine
        return Status(detail={"leader": bool(engine.leader), "settled": engine.settled, "untold": len(loop.outbox)})

    async def debug_state(request: Request) -> dict[str, object]:
        return wire.debug_state(loop.engine, job_id)

    async def metrics(request: Request) -> Raw:
        from prometheus_client import generate_latest  # Costs memory, and most schedulers are never scraped.

        figures = exposition(loop.engine, queued=loop.queued, untold=len(loop.outbox))
        return Raw(generate_latest() + figures.encode(), "text/plain; version=0.0.4")

    api = Api(COMPONENT, status=status)
    api.route("GET", "/metrics", metrics, allow=INSIDERS)
    api.route("GET", "/debug/state", debug_state, allow=INSIDERS)
    return api


def main() -> None:
    daemon.run("flynn-scheduler", lambda: running(os.environ), grace=GRACE)
