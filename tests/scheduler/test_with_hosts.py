"""The scheduler and three real hosts: containers that are spread, lost with their machine, and spread again."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import Random
from typing import Any, cast

import pytest

from flynn.aio.clock import SystemClock
from flynn.aio.supervisor import TaskSet, supervisor
from flynn.discoverd.memory import MemoryRegistry
from flynn.discoverd.registry import Registry
from flynn.host.client import HostClient
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.router.client import RouterEvent
from flynn.scheduler.engine import Engine
from flynn.scheduler.host_links import HOST_SERVICE
from flynn.scheduler.hosts import STEADY
from flynn.scheduler.loop import SERVICE, SchedulerLoop
from flynn.scheduler.mandate import Mandate
from flynn.scheduler.model import HostID
from flynn.types.app import App
from flynn.types.artifact import SQUASHFS_TYPE, Artifact, ImageManifest, Layer, Rootfs
from flynn.types.errors import NotFound
from flynn.types.formation import ExpandedFormation
from flynn.types.host import JobStatus, Mountspec
from flynn.types.instance import Instance
from flynn.types.release import ProcessType, Release
from tests.host.conftest import image
from tests.host.machine import TestMachine, sweep
from tests.scheduler.test_loop import MemoryController

__all__ = ["image"]

pytestmark = [pytest.mark.root, pytest.mark.slow]


class Line:
    """One scheduler's way to the directory. Cut, it says nothing new about who leads."""

    def __init__(self, registry: MemoryRegistry) -> None:
        self.cut = False
        self._registry = registry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)

    async def watch_leader(self, service: str) -> AsyncGenerator[Instance | None, None]:
        async with aclosing(self._registry.watch_leader(service)) as leaders:
            async for leader in leaders:
                if self.cut:
                    await asyncio.Event().wait()
                yield leader


@dataclass
class Cluster:
    """Real hosts; the directory and the controller are in memory."""

    machines: list[TestMachine]
    image: Mountspec
    registry: MemoryRegistry = field(default_factory=MemoryRegistry)
    controller: MemoryController = field(default_factory=MemoryController)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    clients: dict[str, HostClient] = field(default_factory=dict)

    def instance(self, machine: TestMachine) -> Instance:
        return Instance.at(f"{machine.ip}:1113", "https", {"id": machine.id})

    async def configure(self, machine: TestMachine) -> None:
        """Be flannel and discoverd for a host."""
        async with machine.client() as host:
            await machine.configure(host)
        await self.registry.register(HOST_SERVICE, self.instance(machine))

    def scale(self, workers: int) -> None:
        layer = Layer(id=self.image.id, type=SQUASHFS_TYPE, length=self.image.size, hashes=self.image.hashes)
        manifest = ImageManifest(rootfs=[Rootfs(layers=[layer])])
        artifact = Artifact(id="a", type="flynn", manifest=manifest.document(), layer_url_template=self.image.url)
        release = Release(id="rel", artifacts=["a"], processes={"worker": ProcessType(args=["sleep", "600"])})
        self.controller.formations.send(
            ExpandedFormation(
                app=App(id="shop", name="shop", deploy_timeout=60),
                release=release,
                artifacts=[artifact],
                processes={"worker": workers},
                updated_at=datetime.now(UTC),
            )
        )

    @asynccontextmanager
    async def scheduler(self, number: int, line: Line) -> AsyncIterator[SchedulerLoop]:
        """A scheduler of this process that speaks to the hosts as the daemon does."""
        mandate = Mandate()

        @asynccontextmanager
        async def dial_host(id: HostID, instance: Instance) -> AsyncIterator[HostClient]:
            machine = next(machine for machine in self.machines if machine.id == id)
            identity = Identity.load(machine.state / "identity")
            async with HttpClient(f"https://{instance.addr}", tls=identity, live_headers=mandate.headers) as http:
                yield HostClient(http)

        @asynccontextmanager
        async def dial_router(instance: Instance) -> AsyncIterator[AsyncIterator[RouterEvent]]:
            raise NotFound()
            yield

        own = Instance.at(f"10.0.0.{number}:5000", "https")
        async with TaskSet() as tasks, supervisor() as spawn:
            engine = Engine(Random(number), lambda: str(uuid.uuid4()))
            clock = SystemClock()
            loop = SchedulerLoop(
                engine, cast(Registry, line), self.controller, dial_host, dial_router, clock, tasks, mandate
            )
            loop.start(spawn)
            await loop.caught_up()
            await self.registry.create(SERVICE)
            await self.registry.register(SERVICE, own)
            spawn("watch leader", loop.watch_leader(own))
            yield loop

    async def running(self) -> dict[str, int]:
        """How many containers each host that answers runs."""
        found = {}
        for machine in self.machines:
            if machine.process is not None and machine.process.poll() is None:
                async with machine.client() as host:
                    jobs = await host.jobs(active=True)
                    found[machine.id] = sum(1 for job in jobs.values() if job.status is JobStatus.RUNNING)
        return found


async def eventually(holds: Callable[[], object], seconds: float = 30) -> None:
    """Wait for a condition, or for the value of a coroutine to be true."""
    async with asyncio.timeout(seconds):
        while True:
            found = holds()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.1)


@pytest.fixture
def machines(image: Mountspec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[TestMachine]]:
    sweep()
    nodes = [TestMachine(tmp_path_factory.mktemp(f"node{n}"), image, number=n, id=f"node{n}") for n in (1, 2, 3)]
    try:
        for node in nodes:
            node.plug_in()
            node.start()
        yield nodes
    finally:
        for node in nodes:
            node.remove()


async def test_containers_are_spread_again_after_their_machine_was_lost_and_an_old_leader_is_refused(
    machines: list[TestMachine], image: Mountspec
) -> None:
    cluster = Cluster(machines, image)
    await cluster.registry.create(HOST_SERVICE)
    for machine in machines:
        await cluster.configure(machine)

    async def spread(*wanted: int) -> bool:
        return sorted((await cluster.running()).values()) == list(wanted)

    line = Line(cluster.registry)
    async with cluster.scheduler(1, line) as first:
        cluster.scale(6)
        await eventually(lambda: spread(2, 2, 2))
        assert all(host.memory > 2**30 for host in first.engine.world.hosts.values())

        lost = machines[2]
        lost.end(9)
        lost.kill_containers()
        await cluster.registry.deregister(HOST_SERVICE, cluster.instance(lost).id)
        began = time.monotonic()
        await eventually(lambda: spread(3, 3))
        assert time.monotonic() - began < 10, "three probes, and a start"

        lost.start()
        await cluster.configure(lost)
        began = time.monotonic()
        while not await spread(2, 2, 2):
            running = await cluster.running()
            assert 6 <= sum(running.values()) <= 7, f"{running}: each new one is up before an old one ends"
            assert time.monotonic() - began < STEADY.total_seconds() + 60
        assert first.engine.counts["moves"] == 2

        # Another one leads, and the first has not heard of it: the directory's word does not reach it any more.
        line.cut = True
        (old,) = await cluster.registry.instances(SERVICE)
        async with cluster.scheduler(2, Line(cluster.registry)) as second:
            await cluster.registry.deregister(SERVICE, old.id)
            await eventually(lambda: second.engine.leader and second.engine.settled)
            cluster.scale(9)
            await eventually(lambda: spread(3, 3, 3))
            await eventually(lambda: not first.engine.leader)
            cluster.scale(3)
            await eventually(lambda: spread(1, 1, 1))
            assert second.engine.leader
