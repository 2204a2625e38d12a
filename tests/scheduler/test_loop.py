"""The shell: streams in, requests out, with a real directory and neighbours that answer from memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from random import Random

import pytest
from pytest import param

from flynn.aio.broadcast import Broadcast
from flynn.aio.clock import SystemClock
from flynn.aio.supervisor import TaskSet, supervisor
from flynn.discoverd.memory import MemoryRegistry
from flynn.router.client import RouterEvent
from flynn.scheduler.engine import Engine
from flynn.scheduler.host_links import HOST_SERVICE, QUICK
from flynn.scheduler.loop import SERVICE, SchedulerLoop
from flynn.scheduler.mandate import Mandate
from flynn.scheduler.model import HostID
from flynn.types.app import App
from flynn.types.codec import ZERO_TIME, replace
from flynn.types.errors import NotFound, Unreachable
from flynn.types.formation import ExpandedFormation, ScaleRequest
from flynn.types.host import ActiveJob, HostJob, HostStatus, JobEvent, JobEventKind, JobStatus
from flynn.types.instance import Instance
from flynn.types.job import Job
from flynn.types.release import ProcessType, Release
from flynn.types.sink import Sink, SinkInfo
from flynn.types.volume import Volume, VolumeInfo, VolumeRequest

WEB = Release(id="rel", processes={"web": ProcessType(service="shop-web")})


class MemoryHost:
    def __init__(self, id: str) -> None:
        self.id = id
        self.running: dict[str, ActiveJob] = {}
        self.calls: list[str] = []
        self.events: Broadcast[JobEvent] = Broadcast()
        own = Sink(id="own", kind="logaggregator", host_managed=True, config={})
        self.held_sinks = {"own": own, "left": Sink(id="left", kind="syslog", config={"url": "syslog://gone"})}

    async def status(self) -> HostStatus:
        return HostStatus(id=self.id)

    async def jobs(self) -> dict[str, ActiveJob]:
        return dict(self.running)

    async def job(self, job_id: str) -> ActiveJob:
        if job_id not in self.running:
            raise NotFound()
        return self.running[job_id]

    @asynccontextmanager
    async def subscribed(self) -> AsyncIterator[AsyncIterator[JobEvent]]:
        async with self.events.subscribe() as events:
            yield events

    async def add_job(self, job: HostJob) -> None:
        self.calls.append("add")
        self._set(JobEventKind.START, ActiveJob(job=job, status=JobStatus.RUNNING, started_at=datetime.now(UTC)))

    async def deregister_job(self, job_id: str) -> None:
        self.calls.append("deregister")

    async def stop_job(self, job_id: str) -> None:
        self.calls.append("stop")
        self._set(JobEventKind.STOP, replace(self.running[job_id], status=JobStatus.DONE, ended_at=datetime.now(UTC)))

    def _set(self, kind: JobEventKind, job: ActiveJob) -> None:
        self.running[job.job.id] = job
        self.events.send(JobEvent(event=kind, job_id=job.job.id, job=job))

    async def volumes(self) -> list[VolumeInfo]:
        return []

    async def sinks(self) -> list[Sink]:
        return list(self.held_sinks.values())

    async def put_sink(self, sink: SinkInfo) -> None:
        self.held_sinks[sink.id] = Sink(id=sink.id, kind=sink.kind, config=sink.config)

    async def delete_sink(self, sink_id: str) -> None:
        if self.held_sinks.pop(sink_id, None) is None:
            raise NotFound()

    async def create_volume(self, request: VolumeRequest) -> VolumeInfo:
        raise NotImplementedError


class MemoryController:
    def __init__(self) -> None:
        self.formations: Broadcast[ExpandedFormation] = Broadcast()
        self.sinks: Broadcast[Sink] = Broadcast()
        self.told: list[str] = []
        self.away = False
        self.listable = True
        self.active: list[ExpandedFormation] = []

    async def follow_formations(self, since: datetime = ZERO_TIME) -> AsyncIterator[ExpandedFormation]:
        async with self.formations.subscribe() as changes:
            yield ExpandedFormation()
            async for change in changes:
                yield change

    async def follow_volumes(self, since: datetime = ZERO_TIME) -> AsyncIterator[Volume]:
        yield Volume()
        await asyncio.Event().wait()

    async def follow_sinks(self, since: datetime = ZERO_TIME) -> AsyncIterator[Sink]:
        async with self.sinks.subscribe() as changes:
            yield Sink(id="s0", kind="syslog", config={"url": "syslog://old"})
            yield Sink()
            async for change in changes:
                yield change

    async def active_formations(self) -> list[ExpandedFormation]:
        return self.active

    async def active_jobs(self) -> list[Job]:
        if not self.listable:
            raise Unreachable("away")
        return []

    async def put_job(self, job: Job) -> Job:
        if self.away:
            raise Unreachable("away")
        self.told.append(job.state)
        return job

    async def put_volume(self, volume: Volume) -> Volume:
        return volume

    async def put_scale_request(self, request: ScaleRequest) -> ScaleRequest:
        self.told.append(f"scale {request.state}")
        return request


class World:
    loop: SchedulerLoop

    def __init__(self) -> None:
        self.registry = MemoryRegistry()
        self.controller = MemoryController()
        self.host = MemoryHost("h1")
        self.hosts = {"h1": self.host}

    def scale(self, web: int) -> None:
        request = ScaleRequest(id="s1", app="shop", release="rel", state="pending")
        wanted = ExpandedFormation(
            app=App(id="shop", name="shop"), release=WEB, processes={"web": web}, updated_at=datetime.now(UTC)
        )
        self.controller.active = [wanted] if web else []
        self.controller.formations.send(replace(wanted, pending_scale_request=request))

    async def eventually(self, holds: Callable[[], bool], seconds: float = 5) -> None:
        async with asyncio.timeout(seconds):
            while not holds():
                await asyncio.sleep(0.01)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    ids = count(1)

    @asynccontextmanager
    async def dial_host(host: HostID, instance: Instance) -> AsyncIterator[MemoryHost]:
        yield world.hosts[host]

    @asynccontextmanager
    async def dial_router(instance: Instance) -> AsyncIterator[AsyncIterator[RouterEvent]]:
        raise NotFound()
        yield

    await world.registry.create(HOST_SERVICE)
    await world.registry.register(HOST_SERVICE, Instance.at("10.0.0.1:1113", "http", {"id": "h1", "tag:disk": "ssd"}))
    await world.registry.create("shop-web")
    own = Instance.at("10.0.0.9:5000", "https")
    async with TaskSet() as tasks, supervisor() as spawn:
        engine = Engine(Random(1), lambda: f"u{next(ids)}")
        loop = SchedulerLoop(
            engine, world.registry, world.controller, dial_host, dial_router, SystemClock(), tasks, Mandate()
        )
        world.loop = loop
        loop.start(spawn)
        await loop.caught_up()
        async with world.registry.registered(SERVICE, own):
            spawn("watch leader", loop.watch_leader(own))
            yield world


async def test_a_job_starts_is_up_with_its_service_and_leaves_service_before_it_is_stopped(world: World) -> None:
    world.scale(1)
    await world.eventually(lambda: "starting" in world.controller.told)
    (job_id,) = world.host.running
    assert job_id == "h1-u1"
    assert world.controller.told == ["pending", "starting"]

    web = Instance.at("10.1.0.2:8080", "tcp", {"FLYNN_JOB_ID": job_id})
    await world.registry.register("shop-web", web)
    await world.eventually(lambda: "scale complete" in world.controller.told)
    assert world.controller.told == ["pending", "starting", "up", "scale complete"]

    world.scale(0)
    await world.eventually(lambda: "down" in world.controller.told)
    assert world.host.calls == ["add", "deregister", "stop"]
    # The request is complete when nothing of it runs in service any more; the end itself is told when it comes.
    await world.eventually(lambda: len(world.controller.told) == 7)
    assert sorted(world.controller.told[4:]) == ["down", "scale complete", "stopping"]


async def test_a_controller_that_is_away_does_not_keep_jobs_from_starting(world: World) -> None:
    world.controller.away = True
    world.scale(1)
    await world.eventually(lambda: len(world.host.running) == 1)
    assert world.controller.told == []
    world.controller.away = False
    await world.eventually(lambda: world.controller.told == ["pending", "starting"])


async def test_hosts_get_the_sinks_of_the_cluster_and_lose_those_that_were_removed(world: World) -> None:
    held = world.host.held_sinks
    await world.eventually(lambda: set(held) == {"own", "s0"})
    changed = Sink(id="s0", kind="syslog", config={"url": "syslog://new"})
    world.controller.sinks.send(changed)
    await world.eventually(lambda: held["s0"].config == changed.config)
    world.controller.sinks.send(replace(changed, config=None))
    await world.eventually(lambda: set(held) == {"own"})


async def test_who_leaves_decides_nothing_more_and_leaves_true_books(world: World) -> None:
    world.controller.away = True
    world.scale(1)
    await world.eventually(lambda: len(world.host.running) == 1)
    leaving = asyncio.ensure_future(world.loop.rest(timedelta(seconds=5)))
    world.scale(3)
    await asyncio.sleep(0)
    world.controller.away = False
    await leaving
    assert world.controller.told == ["pending", "starting"]
    assert len(world.host.running) == 1


async def let_another_one_lead(world: World) -> tuple[Instance, Instance]:
    """Returns our own registration, and that of the other one."""
    (own,) = await world.registry.instances(SERVICE)
    other = Instance.at("10.0.0.8:5000", "https")
    await world.registry.register(SERVICE, other)
    await world.registry.deregister(SERVICE, own.id)
    await world.eventually(lambda: world.loop.engine.leader is False)
    return own, other


@pytest.mark.parametrize("listable", [param(True, id="at once"), param(False, id="as soon as the controller answers")])
async def test_a_new_leader_tells_of_jobs_that_came_up_while_nobody_told(world: World, listable: bool) -> None:
    """After a power cut of all nodes the schedulers' own jobs are such: hosts bring them back, before any leads."""
    world.scale(1)
    await world.registry.register("shop-web", Instance.at("10.1.0.2:8080", "tcp", {"FLYNN_JOB_ID": "h1-u1"}))
    await world.eventually(lambda: "scale complete" in world.controller.told)
    own, other = await let_another_one_lead(world)
    world.controller.told.clear()
    was = world.host.running["h1-u1"]
    brought_back = replace(was, job=replace(was.job, id="h1-b1"))
    await world.host.stop_job("h1-u1")
    world.host.running["h1-b1"] = brought_back
    world.host.events.send(JobEvent(event=JobEventKind.START, job_id="h1-b1", job=brought_back))
    await world.registry.register("shop-web", Instance.at("10.1.0.3:8080", "tcp", {"FLYNN_JOB_ID": "h1-b1"}))
    await world.eventually(lambda: "b1" in world.loop.engine.world.jobs)
    assert world.controller.told == []
    world.controller.listable = listable

    await world.registry.register(SERVICE, own)
    await world.registry.deregister(SERVICE, other.id)
    await world.eventually(lambda: bool(world.loop.engine.leader))
    if not listable:
        await world.eventually(lambda: world.loop.engine.settled)
        assert world.controller.told == []
        world.controller.listable = True
    await world.eventually(lambda: world.controller.told == ["up"])


class SilentHost(MemoryHost):
    """Its machine has lost its power: connections stand, nothing is answered."""

    async def status(self) -> HostStatus:
        await asyncio.Event().wait()
        raise AssertionError

    async def volumes(self) -> list[VolumeInfo]:
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_new_leader_does_not_wait_for_a_host_that_died_with_the_one_before(world: World) -> None:
    """All it lists together takes no longer than giving that host up: three probes of a second each."""
    world.hosts["h2"] = SilentHost("h2")
    dead = Instance.at("10.0.0.2:1113", "http", {"id": "h2"})
    await world.registry.register(HOST_SERVICE, dead)
    await world.eventually(lambda: "h2" in world.loop.engine.world.hosts)
    own, other = await let_another_one_lead(world)
    await world.registry.register(SERVICE, own)
    await world.registry.deregister(SERVICE, other.id)
    await world.registry.deregister(HOST_SERVICE, dead.id)
    await world.eventually(lambda: bool(world.loop.engine.leader))
    began = time.monotonic()
    world.scale(1)
    await world.eventually(lambda: len(world.host.running) == 1, seconds=20)
    assert time.monotonic() - began < QUICK.total_seconds()
