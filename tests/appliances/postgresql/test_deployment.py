"""Deploying the database itself: real peers, a real directory, and the controller's records kept in that very database.

What is played is the scheduler with its hosts: it makes formations true by starting and ending peers' processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from uuid import uuid4

import pytest

from flynn.aio.supervisor import TaskSet, supervisor
from flynn.controller.database import Database
from flynn.controller.hosts import Hosts
from flynn.controller.migrate import migrate
from flynn.controller.neighbours import Neighbours
from flynn.controller.store.events import EventFilter
from flynn.controller.stores import Stores
from flynn.controller.worker.databases import DatabaseClusters
from flynn.controller.worker.loop import Worker
from flynn.controller.worker.procedures import procedures
from flynn.discoverd.memory import MemoryRegistry
from flynn.host.client import HostClient
from flynn.types.app import App
from flynn.types.artifact import Artifact
from flynn.types.codec import convert, replace
from flynn.types.deployment import Deployment, DeploymentEvent
from flynn.types.errors import ApiError
from flynn.types.formation import ScaleState
from flynn.types.instance import Instance
from flynn.types.job import Job
from flynn.types.release import ProcessType, Release
from tests.controller.conftest import MANIFEST

from .cluster import Cluster, Node, Writer, cluster, until
from .conftest import BIN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BIN / "postgres").exists(), reason="PostgreSQL 15 is not installed"),
]

HOST = "host1"  # of all jobs but the first three
OLD = str(uuid4())
MOST_PEERS = 9


class OneHost(Hosts):
    """The only host; stopping a job there ends a peer's process."""

    def __init__(self) -> None:
        super().__init__(MemoryRegistry(), None)
        self.scheduler: Scheduler | None = None

    @asynccontextmanager
    async def open(self, host_id: str) -> AsyncIterator[HostClient]:
        assert self.scheduler is not None
        yield self.scheduler  # type: ignore[misc]  # of a host's client, only this is asked for


@dataclass
class Peers:
    """One job: its record and its process."""

    job: Job
    node: Node


@dataclass
class Scheduler:
    """Makes what formations say of the type `postgres` true, volumes included."""

    one: Cluster
    stores: Stores
    broken: dict[str, dict[str, str]] = field(default_factory=dict)  # release -> environment that spoils its peers
    jobs: list[Peers] = field(default_factory=list)
    free: list[Node] = field(default_factory=list)  # places whose job was ended: the next one gets their data

    async def adopt(self, app: str, release: str) -> None:
        for node in self.one.nodes[:3]:
            host, _, uuid = node.job_id.partition("-")
            job = Job(
                uuid=uuid, id=node.job_id, host_id=host, app=app, release=release, type="postgres", state="up"
            )  # fmt: skip
            await self.stores.jobs.put(job)
            self.jobs.append(Peers(job, node))

    async def run(self) -> None:
        while True:
            with suppress(ApiError, TimeoutError):
                await self._reconcile()
            await asyncio.sleep(0.2)

    async def _reconcile(self) -> None:
        apps = await self.stores.apps.all()
        if not apps:
            return
        listed = {instance.meta["FLYNN_JOB_ID"] for instance in await self.one.registry.instances("postgres")}
        formations = {formation.release: formation for formation in await self.stores.formations.all(apps[0].id)}
        for release in {*formations, *(peer.job.release for peer in self.jobs)}:
            wanted = (formations[release].processes or {}).get("postgres", 0) if release in formations else 0
            mine = [peer for peer in self.jobs if peer.job.release == release]
            for peer in mine[wanted:]:
                await self._end(peer)
            for _ in range(wanted - len(mine)):
                await self._begin(apps[0].id, release)
            for peer in [peer for peer in self.jobs if peer.job.release == release]:
                state = "up" if peer.job.id in listed or peer.job.state == "up" else "starting"
                process = peer.node.process
                if process is not None and process.returncode is not None:
                    await self._end(peer)
                elif peer.job.state != state:
                    peer.job = replace(peer.job, state=state)
                    await self.stores.jobs.put(peer.job)
            now = [peer.job.state for peer in self.jobs if peer.job.release == release]
            expanded = await self.stores.formations.expanded(apps[0].id, release)
            request = expanded.pending_scale_request if expanded is not None else None
            if request is not None and now == ["up"] * wanted:
                await self.stores.formations.set_scale_state(replace(request, state=ScaleState.COMPLETE))

    async def _begin(self, app: str, release: str) -> None:
        node = self.free.pop()
        uuid = str(uuid4())
        job = Job(
            uuid=uuid, id=f"{HOST}-{uuid}", host_id=HOST, app=app, release=release, type="postgres", state="starting"
        )
        self.jobs.append(Peers(job, node))
        await self.stores.jobs.put(job)
        await node.start(FLYNN_JOB_ID=job.id, FLYNN_RELEASE_ID=release, **self.broken.get(release, {}))

    async def _end(self, peer: Peers) -> None:
        self.jobs.remove(peer)
        self.free.append(peer.node)
        await peer.node.end()
        await self.stores.jobs.put(replace(peer.job, state="down"))

    async def stop_job(self, job_id: str) -> None:
        await self._end(next(peer for peer in self.jobs if peer.job.id == job_id))


@dataclass
class Site:
    """A cluster of three that is about to be replaced, and a client that writes meanwhile."""

    one: Cluster
    stores: Stores
    scheduler: Scheduler
    hosts: OneHost
    writer: Writer
    app: App
    old: Release
    shapes: list[str] = field(default_factory=list)

    async def release(self, id: str = "") -> Release:
        return await self.stores.releases.create(
            Release(
                id=id,
                app_id=self.app.id,
                artifacts=self.old.artifacts,
                env={"SIRENIA_PROCESS": "postgres"},
                processes={"postgres": ProcessType(args=["flynn-postgres"], service="postgres")},
            )
        )

    async def writing(self) -> bool:
        return len(self.writer.acknowledged) > 20

    async def deploy(self, release: Release) -> Deployment:
        return await self.stores.deployments.create(self.app.id, release.id)

    async def settled(self) -> None:
        """All is well: three peers, writes flow, none that was ever acknowledged is missing."""
        await until(self.one.whole, 60)
        before = len(self.writer.acknowledged)
        await until(lambda: self._written(before + 20), 30)
        assert await self.writer.lost() == set()

    async def _written(self, count: int) -> bool:
        return len(self.writer.acknowledged) >= count

    async def counts(self) -> dict[str, int]:
        formations = await self.stores.formations.all(self.app.id)
        return {
            "old" if formation.release == self.old.id else "new": (formation.processes or {}).get("postgres", 0)
            for formation in formations
        }

    async def steps(self, deployment: Deployment) -> list[str]:
        """What was told of the deployment, in the words of its events."""
        told = []
        wanted = EventFilter(object_types=frozenset({"deployment"}))
        async for event in self.stores.events.after(wanted, 0):
            step = convert(event.data, DeploymentEvent)
            if step.deployment == deployment.id:
                release = "old" if step.release == self.old.id else "new"
                told.append(f"{release} {step.job_state}" if step.job_state else step.status)
        return told

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """One worker, which may be ended at any time."""
        async with Database(conninfo(self.one)).connected() as database:
            stores = Stores.over(database)
            databases = DatabaseClusters(self.one.registry, self.one.identity)
            known = procedures(stores, self.hosts, Neighbours(None), databases, self.one.registry)
            async with TaskSet() as tasks, supervisor() as spawn:
                spawn("follow events", stores.hub.run())
                spawn("work", Worker(stores.queue, stores.hub, known, tasks).run())
                yield

    async def record_shapes(self) -> None:
        """The forms the cluster passes through: primary/sync/[asyncs] by release."""
        async for event in self.one.registry.watch("postgres"):
            state = await self.one.state() if event.service_meta is not None else None
            if state is None or state.primary is None or state.sync is None:
                continue

            def release(instance: Instance) -> str:
                return "O" if instance.meta["FLYNN_RELEASE_ID"] == self.old.id else "N"

            asyncs = ",".join(release(peer) for peer in state.asyncs or [])
            shape = f"{release(state.primary)}/{release(state.sync)}/[{asyncs}]"
            if shape not in self.shapes[-1:]:
                self.shapes.append(shape)

    async def finished(self, deployment: Deployment, within: float = 150) -> Deployment:
        async def over() -> bool:
            with suppress(ApiError):
                return (await self.stores.deployments.get(deployment.id)).finished_at is not None
            return False

        await until(over, within)
        return await self.stores.deployments.get(deployment.id)

    async def releases(self) -> set[str]:
        """Of which releases the members are."""
        state = await self.one.state()
        assert state is not None
        members = (state.primary, state.sync, *(state.asyncs or []))
        return {peer.meta["FLYNN_RELEASE_ID"] for peer in members if peer is not None}


def conninfo(one: Cluster) -> str:
    """Wherever the primary is: what `leader.postgres.discoverd` is in a cluster."""
    ports = ",".join(str(node.port) for node in one.nodes)
    hosts = ",".join("127.0.0.1" for _ in one.nodes)
    return (
        f"host={hosts} port={ports} user=flynn password='s3:cr\\'et' dbname=postgres"
        f" sslmode=verify-full sslrootcert={one.identity.ca_path}"
    )


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with cluster(FLYNN_RELEASE_ID=OLD) as one, AsyncExitStack() as stack:
        for _ in range(MOST_PEERS - 3):
            one.add()  # their ports have to be known to the controller
        await until(one.whole, 90)
        database = await stack.enter_async_context(Database(conninfo(one)).connected())
        await migrate(database)
        spawn = await stack.enter_async_context(supervisor())
        stores = Stores.over(database)
        spawn("follow events", stores.hub.run())
        await stores.hub.started()
        app = await stores.apps.create(App(name="postgres", strategy="sirenia", deploy_timeout=60))
        artifact = await stores.artifacts.create(
            Artifact(
                type="flynn", uri="https://images.test/pg.json", manifest=MANIFEST, layer_url_template="file:///{id}"
            )
        )
        hosts = OneHost()
        site = Site(one, stores, Scheduler(one, stores), hosts, Writer(one), app, Release(artifacts=[artifact.id]))
        hosts.scheduler = site.scheduler
        site.scheduler.free += reversed(one.nodes[3:])
        site.old = await site.release(OLD)
        await stores.apps.set_release(app.id, site.old.id)
        await stores.formations.scale(app.id, site.old.id, {"postgres": 3}, None)
        await site.scheduler.adopt(app.id, site.old.id)
        spawn("schedule", site.scheduler.run())
        spawn("watch", site.record_shapes())
        spawn("write", site.writer.run())
        await until(site.writing)
        site.writer.gap = 0.0
        yield site


async def test_all_peers_are_replaced_one_role_at_a_time_while_a_client_writes(site: Site) -> None:
    new = await site.release()
    async with site.working():
        deployment = await site.finished(await site.deploy(new))
    assert (deployment.status, deployment.error) == ("complete", "")
    await site.settled()
    assert await site.releases() == {new.id}
    assert await site.counts() == {"old": 0, "new": 3}
    assert (await site.stores.apps.get(site.app.id)).release == new.id
    passed = [shape for shape in site.shapes if shape.count("O") + shape.count("N") >= 3]
    order = ["O/O/[O,N]", "O/O/[N]", "O/O/[N,N]", "O/N/[N]", "O/N/[N,N]", "N/N/[N]"]
    assert [shape for shape in passed if shape in order] == order, site.shapes
    once = ["new starting", "new up", "old stopping", "old down"]
    assert await site.steps(deployment) == ["pending", "running", *once * 3, "complete"]
    print(f"\n{len(site.writer.acknowledged)} writes acknowledged, longest gap {site.writer.gap:.2f} s")
    print(f"deployed in {(deployment.finished_at - deployment.created_at).total_seconds():.0f} s")  # type: ignore[operator]
    assert site.writer.gap < 10
    # The next release comes up on the volumes of the one before: former members, one of them deposed.
    third = await site.release()
    async with site.working():
        deployment = await site.finished(await site.deploy(third), 300)
    assert (deployment.status, deployment.error) == ("complete", "")
    await site.settled()
    assert await site.releases() == {third.id}
    print(f"once more in {(deployment.finished_at - deployment.created_at).total_seconds():.0f} s")  # type: ignore[operator]


async def test_a_worker_that_ends_in_the_middle_is_succeeded_by_one_that_goes_on(site: Site) -> None:
    new = await site.release()
    deployment = await site.deploy(new)
    for stop_after in ("O/O/[O,N]", "O/N/[N]", "O/N/[N,N]"):
        async with site.working():
            await until(lambda shape=stop_after: _passed(site, shape), 90, every=0.02)  # type: ignore[misc]
    async with site.working():
        deployment = await site.finished(deployment)
    assert (deployment.status, deployment.error) == ("complete", "")
    await site.settled()
    assert await site.releases() == {new.id}
    assert (await site.steps(deployment)).count("new up") <= 3, "nobody was started twice"


async def _passed(site: Site, shape: str) -> bool:
    return shape in site.shapes


async def test_peers_that_never_catch_up_are_taken_back_and_the_reason_is_told(site: Site) -> None:
    """The second new peer does not get in: what was stopped before is started again on its data."""
    new = await site.release()
    async with site.working():
        deployment = await site.deploy(new)
        await until(lambda: _passed(site, "O/O/[N]"), 90, every=0.02)
        site.scheduler.broken[new.id] = {"PGPASSWORD": "not the password of the others"}
        deployment = await site.finished(deployment, 300)
    assert deployment.status == "failed"
    assert "could not be rolled back" not in deployment.error
    assert deployment.error.startswith("async 1: ")
    await site.settled()
    assert await site.releases() == {site.old.id}
    assert await site.counts() == {"old": 3}
    assert (await site.stores.apps.get(site.app.id)).release == site.old.id
