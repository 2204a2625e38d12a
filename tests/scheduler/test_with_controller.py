"""The scheduler and the real controller API, with PostgreSQL behind it: do they mean the same by every word?"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from random import Random

import pytest

from flynn.aio.clock import SystemClock
from flynn.aio.supervisor import TaskSet, supervisor
from flynn.controller.client import Controller, ScaleFailed
from flynn.discoverd.memory import MemoryRegistry
from flynn.router.client import RouterEvent
from flynn.scheduler.engine import Engine
from flynn.scheduler.host_links import HOST_SERVICE
from flynn.scheduler.loop import SERVICE, SchedulerLoop
from flynn.scheduler.mandate import Mandate
from flynn.scheduler.model import HostID
from flynn.types.codec import replace
from flynn.types.errors import NotFound
from flynn.types.formation import Formation
from flynn.types.instance import Instance
from flynn.types.release import ProcessType, VolumeReq
from flynn.types.sink import Sink
from flynn.types.volume import VolumeInfo, VolumeRequest
from tests.controller.conftest import (
    Shop,
    conninfo,
    controller,
    identities,
    postgres_server,
    shop,
    stores,
    world,
)
from tests.scheduler.test_loop import MemoryHost

__all__ = ["conninfo", "controller", "identities", "postgres_server", "shop", "stores", "world"]

pytestmark = pytest.mark.slow


class Host(MemoryHost):
    """A host with volumes."""

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self.held: list[VolumeInfo] = []

    async def volumes(self) -> list[VolumeInfo]:
        return self.held

    async def create_volume(self, request: VolumeRequest) -> VolumeInfo:
        made = VolumeInfo(id=request.id, type="data", meta=request.meta)
        self.held.append(made)
        return made


@dataclass
class Cluster:
    controller: Controller
    host: Host
    loop: SchedulerLoop


@asynccontextmanager
async def scheduling(controller: Controller, host: Host) -> AsyncIterator[Cluster]:
    registry = MemoryRegistry()

    @asynccontextmanager
    async def dial_host(id: HostID, instance: Instance) -> AsyncIterator[Host]:
        yield host

    @asynccontextmanager
    async def dial_router(instance: Instance) -> AsyncIterator[AsyncIterator[RouterEvent]]:
        raise NotFound()
        yield

    await registry.create(HOST_SERVICE)
    await registry.register(HOST_SERVICE, Instance.at("10.0.0.1:1113", "http", {"id": host.id}))
    own = Instance.at("10.0.0.9:5000", "https")
    async with TaskSet() as tasks, supervisor() as spawn:
        engine = Engine(Random(1), lambda: str(uuid.uuid4()))
        loop = SchedulerLoop(engine, registry, controller, dial_host, dial_router, SystemClock(), tasks, Mandate())
        loop.start(spawn)
        await loop.caught_up()
        async with registry.registered(SERVICE, own):
            spawn("watch leader", loop.watch_leader(own))
            yield Cluster(controller, host, loop)


async def states(controller: Controller) -> list[tuple[str, str]]:
    return sorted((job.type, job.state) for job in await controller.jobs("shop"))


async def until(controller: Controller, wanted: list[tuple[str, str]]) -> None:
    async with asyncio.timeout(10):
        while await states(controller) != wanted:
            await asyncio.sleep(0.05)


async def test_scaling_with_the_real_api(controller: Controller, shop: Shop) -> None:
    async with scheduling(controller, Host("h1")) as cluster:
        seen: list[str] = []
        done = await controller.scale(
            "shop", shop.release.id, {"web": 2}, on_job=lambda job: seen.append(f"{job.type} {job.state}")
        )
        assert done.new_processes == {"web": 2}
        assert seen.count("web up") == 2
        assert await states(controller) == [("web", "up")] * 2
        assert len(cluster.host.running) == 2
        (job, _) = await controller.jobs("shop")
        assert (job.id, job.host_id, job.args) == (f"h1-{job.uuid}", "h1", ["web"])

        await controller.scale("shop", shop.release.id, {"web": 0})
        await until(controller, [("web", "down")] * 2)


async def test_volumes_are_recorded_before_the_jobs_that_use_them_and_taken_over_by_the_next(
    controller: Controller, shop: Shop
) -> None:
    processes = {"db": ProcessType(args=["db"], volumes=[VolumeReq(path="/data")])}
    release = await controller.create_release(replace(shop.release, id="", processes=processes))
    async with scheduling(controller, Host("h1")) as cluster:
        await controller.scale("shop", release.id, {"db": 1})
        (volume,) = cluster.host.held
        assert volume.meta["flynn-controller.path"] == "/data"
        (first,) = await controller.jobs("shop")
        assert first.volumes == [volume.id]
        (recorded,) = await controller.app_volumes("shop")
        assert (recorded.id, recorded.host_id, recorded.state, recorded.job) == (volume.id, "h1", "created", first.uuid)

        await cluster.host.stop_job(first.id)
        await until(controller, [("db", "down"), ("db", "up")])
        second = next(job for job in await controller.jobs("shop") if job.state == "up")
        assert second.volumes == [volume.id]
        assert second.restarts == 1
        assert len(cluster.host.held) == 1


async def test_a_scheduler_that_comes_back_adopts_what_runs_and_replaces_what_is_gone(
    controller: Controller, shop: Shop
) -> None:
    host = Host("h1")
    async with scheduling(controller, host):
        await controller.scale("shop", shop.release.id, {"web": 2, "clock": 1})
        await until(controller, [("clock", "up"), ("web", "up"), ("web", "up")])
    gone = next(job.job.id for job in host.running.values() if job.job.config.args == ["clock"])
    del host.running[gone]  # with the machine, say
    before = set(host.running)
    async with scheduling(controller, host):
        await until(controller, [("clock", "down"), ("clock", "up"), ("web", "up"), ("web", "up")])
        assert len(set(host.running) - before) == 1


async def test_after_a_power_cut_the_books_name_the_jobs_that_the_hosts_brought_back(
    controller: Controller, shop: Shop
) -> None:
    host = Host("h1")
    async with scheduling(controller, host):
        await controller.scale("shop", shop.release.id, {"web": 2})
    lost = list(host.running.values())
    host.running.clear()
    for was in lost:
        id = f"h1-{uuid.uuid4()}"
        host.running[id] = replace(was, job=replace(was.job, id=id))
    brought_back = set(host.running)
    async with scheduling(controller, host):
        await until(controller, [("web", "down")] * 2 + [("web", "up")] * 2)
        assert {job.id for job in await controller.active_jobs()} == brought_back == set(host.running)


async def test_a_job_that_no_host_fits_is_blocked_and_the_api_says_why(controller: Controller, shop: Shop) -> None:
    async with scheduling(controller, Host("h1")):
        formation = Formation(processes={"web": 1}, tags={"web": {"disk": "ssd"}})
        await controller.put_formation(replace(formation, app=shop.app.id, release=shop.release.id))
        await until(controller, [("web", "blocked")])
        (job,) = await controller.jobs("shop")
        assert (job.id, job.host_id, job.reason) == ("", "", "no hosts found matching job tags")
        assert [listed.state for listed in await controller.active_jobs()] == ["blocked"]
        with pytest.raises(ScaleFailed, match=r"; web is blocked: no hosts found matching job tags$"):
            await controller.scale("shop", shop.release.id, {"web": 2}, timeout=timedelta(seconds=2))


async def test_deleting_a_formation_stops_its_jobs(controller: Controller, shop: Shop) -> None:
    async with scheduling(controller, Host("h1")):
        await controller.scale("shop", shop.release.id, {"web": 1})
        await controller.delete_formation("shop", shop.release.id)
        await until(controller, [("web", "down")])


async def test_a_log_sink_that_an_operator_adds_comes_to_the_hosts(controller: Controller) -> None:
    host = Host("h1")
    async with scheduling(controller, host), asyncio.timeout(10):
        sink = await controller.create_sink(Sink(kind="syslog", config={"url": "syslog://logs.test:514"}))
        while sink.id not in host.held_sinks:
            await asyncio.sleep(0.05)
        assert host.held_sinks[sink.id].config == sink.config
        await controller.delete_sink(sink.id)
        while sink.id in host.held_sinks:
            await asyncio.sleep(0.05)
