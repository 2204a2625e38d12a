"""Deployments and the worker, with a scheduler that does what it is told at once, or not at all."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import uuid4

import pytest

from flynn.aio.supervisor import TaskSet, supervisor
from flynn.controller.client import Controller, DeletionFailed, DeploymentFailed
from flynn.controller.database import Database
from flynn.controller.hosts import Hosts
from flynn.controller.neighbours import Neighbours
from flynn.controller.store.events import EventFilter
from flynn.controller.stores import Stores
from flynn.controller.wire import AppUpdate
from flynn.controller.worker.databases import DatabaseClusters
from flynn.controller.worker.loop import Worker
from flynn.controller.worker.procedures import procedures
from flynn.discoverd.memory import MemoryRegistry
from flynn.http.server import Api, Request, listen
from flynn.identity import ANYONE
from flynn.types.app import SYSTEM_CRITICAL, App
from flynn.types.artifact import Artifact
from flynn.types.codec import convert
from flynn.types.errors import Conflict, NotFound, UnknownError, ValidationError
from flynn.types.event import EventType
from flynn.types.formation import Formation, ScaleRequest
from flynn.types.instance import ServiceMeta
from flynn.types.job import Job
from flynn.types.provider import Provider, ResourceReq
from flynn.types.release import Release

from .conftest import MANIFEST, Shop, World, a_release


@asynccontextmanager
async def working(
    conninfo: str, blobstore: str = "http://127.0.0.1:1", directory: MemoryRegistry | None = None
) -> AsyncIterator[Stores]:
    """One worker process, but for the process."""
    async with Database(conninfo).connected() as database:
        stores = Stores.over(database)
        registry = directory or MemoryRegistry()
        databases = DatabaseClusters(registry, None)
        known = procedures(stores, Hosts(registry, None), Neighbours(None), databases, registry, blobstore=blobstore)
        async with TaskSet() as tasks, supervisor() as spawn:
            spawn("follow events", stores.hub.run())
            await stores.hub.started()
            spawn("work", Worker(stores.queue, stores.hub, known, tasks).run())
            yield stores


class Scheduler:
    """Completes scale requests; `refuse` says for which releases the jobs go down instead."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self.steps: list[str] = []
        self.names: dict[str, str] = {}
        self.works: Callable[[ScaleRequest], bool] = lambda request: True
        self.go = asyncio.Event()
        self.go.set()

    async def run(self) -> None:
        async for event in self._stores.hub.follow(EventFilter(object_types=frozenset({"scale_request"}))):
            request = convert(event.data, ScaleRequest)
            if request.state != "pending":
                continue
            await self.go.wait()
            name = self.names.get(request.release, "?")
            counts = " ".join(f"{type}={count}" for type, count in sorted((request.new_processes or {}).items()))
            self.steps.append(f"{name} {counts}")
            if self.works(request):
                with suppress(NotFound):
                    await self._stores.formations.set_scale_state(
                        ScaleRequest(id=request.id, app=request.app, release=request.release, state="complete")
                    )
            else:
                await self.crash(request)

    async def crash(self, request: ScaleRequest) -> None:
        for _ in range(6):
            await self._stores.jobs.put(
                Job(
                    uuid=str(uuid4()),
                    app=request.app,
                    release=request.release,
                    type="web",
                    state="down",
                    host_error="exec: not found",
                )
            )


@pytest.fixture
async def scheduler(stores: Stores) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(stores)
    async with supervisor() as spawn:
        spawn("schedule", scheduler.run())
        yield scheduler


@pytest.fixture
async def running(controller: Controller, shop: Shop, scheduler: Scheduler) -> Release:
    """The shop with web=2 clock=1 of its first release running; returns the next release."""
    scheduler.names[shop.release.id] = "old"
    await controller.deploy("shop", shop.release.id)
    await controller.scale("shop", shop.release.id, {"web": 2, "clock": 1})
    release = await controller.create_release(a_release(shop.app, shop.artifact, VERSION="2"))
    scheduler.names[release.id] = "new"
    scheduler.steps.clear()
    return release


async def counts(controller: Controller, release: str) -> dict[str, int]:
    try:
        return (await controller.formation("shop", release)).processes or {}
    except NotFound:
        return {}


async def statuses(controller: Controller, deployment: str) -> list[str]:
    events = await controller.events(object_types=[EventType.DEPLOYMENT], object_id=deployment)
    return [event.data["status"] for event in reversed(events)]


async def test_the_first_deployment_only_sets_the_release(controller: Controller, shop: Shop) -> None:
    deployment = await controller.deploy("shop", shop.release.id)
    assert (deployment.status, deployment.finished_at is not None) == ("complete", True)
    assert (await controller.app_release("shop")).id == shop.release.id
    assert await controller.formations("shop") == []
    assert await statuses(controller, deployment.id) == ["complete"]


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [
        ("all-at-once", "new clock=1 web=2, old clock=0 web=0"),
        ("one-by-one", "new clock=1, old clock=0, new web=1, old web=1, new web=2, old web=0"),
        ("one-down-one-up", "old clock=0, new clock=1, old web=1, new web=1, old web=0, new web=2"),
    ],
)
async def test_a_deployment_replaces_the_jobs(
    conninfo: str, controller: Controller, shop: Shop, running: Release, scheduler: Scheduler, strategy: str, steps: str
) -> None:
    await controller.update_app("shop", AppUpdate(strategy=strategy))
    async with working(conninfo):
        deployment = await controller.deploy("shop", running.id, timeout=timedelta(seconds=10))
    assert (deployment.status, deployment.strategy) == ("complete", strategy)
    assert ", ".join(scheduler.steps) == steps
    assert await counts(controller, running.id) == {"web": 2, "clock": 1}
    assert not any((await counts(controller, shop.release.id)).values())
    assert (await controller.app_release("shop")).id == running.id
    assert await statuses(controller, deployment.id) == ["pending", "running", "complete"]


async def test_batches_follow_the_apps_setting(
    conninfo: str, controller: Controller, running: Release, scheduler: Scheduler
) -> None:
    await controller.update_app("shop", AppUpdate(strategy="in-batches", meta={"flynn-deploy-batch-size": "2"}))
    async with working(conninfo):
        deployment = await controller.deploy("shop", running.id, timeout=timedelta(seconds=10))
    assert deployment.deploy_batch_size == 2
    assert ", ".join(scheduler.steps) == "new clock=1, old clock=0, new web=2, old web=0"


async def test_only_one_deployment_at_a_time(controller: Controller, running: Release) -> None:
    await controller.create_deployment("shop", running.id)
    with pytest.raises(ValidationError, match=r"Cannot create deploy, there is already one in progress for this app\."):
        await controller.create_deployment("shop", running.id)
    with pytest.raises(ValidationError, match="could not find release with ID"):
        await controller.create_deployment("shop", str(uuid4()))


async def test_jobs_that_do_not_come_up_roll_it_back(
    conninfo: str, controller: Controller, shop: Shop, running: Release, scheduler: Scheduler
) -> None:
    await controller.update_app("shop", AppUpdate(strategy="one-by-one"))
    scheduler.works = lambda request: request.release != running.id or "web" not in (request.new_processes or {})
    async with working(conninfo):
        with pytest.raises(DeploymentFailed, match=r"^web job failed to start: exec: not found$"):
            await controller.deploy("shop", running.id, timeout=timedelta(seconds=10))
    assert await counts(controller, shop.release.id) == {"web": 2, "clock": 1}
    assert await counts(controller, running.id) == {}
    assert (await controller.app_release("shop")).id == shop.release.id
    scheduler.works = lambda request: True
    async with working(conninfo):
        await controller.deploy("shop", running.id, timeout=timedelta(seconds=10))


async def test_a_scheduler_that_does_nothing_lets_it_time_out(
    conninfo: str, controller: Controller, running: Release, scheduler: Scheduler
) -> None:
    await controller.update_app("shop", AppUpdate(deploy_timeout=1))
    scheduler.go.clear()
    async with working(conninfo):
        with pytest.raises(DeploymentFailed, match=r"timed out waiting for scale to complete \(waited 1 seconds\)"):
            await controller.deploy("shop", running.id, timeout=timedelta(seconds=20))


async def test_one_that_times_out_says_what_its_jobs_wait_for(
    conninfo: str, controller: Controller, shop: Shop, running: Release, scheduler: Scheduler
) -> None:
    await controller.update_app("shop", AppUpdate(deploy_timeout=1))
    scheduler.go.clear()
    await controller.put_job(
        Job(
            uuid=str(uuid.uuid4()),
            app=shop.app.id,
            release=running.id,
            type="web",
            state="blocked",
            reason="no hosts found matching job tags",
        )
    )
    async with working(conninfo):
        with pytest.raises(DeploymentFailed, match=r"1 seconds\); web is blocked: no hosts found matching job tags$"):
            await controller.deploy("shop", running.id, timeout=timedelta(seconds=20))


async def test_a_later_scale_of_the_same_release_ends_it(
    conninfo: str, controller: Controller, shop: Shop, running: Release, scheduler: Scheduler
) -> None:
    scheduler.go.clear()
    async with working(conninfo), asyncio.timeout(10):
        deployment = await controller.create_deployment("shop", running.id)
        while not await counts(controller, running.id):
            await asyncio.sleep(0.02)
        await controller.put_formation(Formation(app="shop", release=running.id, processes={"web": 1}))
        scheduler.go.set()
        events = [event async for event in controller.follow_deployment(deployment)]
    assert (events[-1].status, events[-1].error) == ("failed", "scale request cancelled")


async def test_a_deployment_goes_on_after_a_stop_of_the_worker(
    conninfo: str, controller: Controller, shop: Shop, running: Release, scheduler: Scheduler
) -> None:
    """The worker stops with a request on its way; the next one waits for that instead of taking old jobs down."""
    await controller.update_app("shop", AppUpdate(strategy="one-by-one"))
    scheduler.go.clear()
    async with asyncio.timeout(20):
        async with working(conninfo):
            deployment = await controller.create_deployment("shop", running.id)
            while await counts(controller, running.id) != {"clock": 1}:
                await asyncio.sleep(0.02)
        assert (await controller.deployment(deployment.id)).status == "running"
        async with working(conninfo):
            await asyncio.sleep(0.3)
            assert (await counts(controller, shop.release.id))["clock"] == 1, "nothing has confirmed the new job yet"
            scheduler.go.set()
            events = [event async for event in controller.follow_deployment(deployment)]
    assert events[-1].status == "complete"
    assert ", ".join(scheduler.steps) == "new clock=1, old clock=0, new web=1, old web=1, new web=2, old web=0"


async def test_a_dead_workers_job_is_taken_over_when_its_lease_ends(
    conninfo: str, controller: Controller, stores: Stores, running: Release
) -> None:
    await controller.create_deployment("shop", running.id)
    leased = await stores.queue.take()
    assert leased is not None and await stores.queue.take() is None, "leased to someone who will not come back"
    await stores.database.execute("UPDATE que_jobs SET locked_until = now() + interval '1 second'")
    async with working(conninfo), asyncio.timeout(10):
        while (await controller.deployments("shop"))[0].status != "complete":
            await asyncio.sleep(0.05)
    assert not await stores.queue.renew(leased), "the old lease is void"
    await stores.queue.postpone(leased, "late")
    assert (await controller.deployments("shop"))[0].status == "complete"


async def test_deploying_what_runs_already_changes_nothing(
    conninfo: str, controller: Controller, shop: Shop, running: Release, scheduler: Scheduler
) -> None:
    async with working(conninfo):
        await controller.deploy("shop", shop.release.id, timeout=timedelta(seconds=10))
    assert await counts(controller, shop.release.id) == {"web": 2, "clock": 1}
    assert scheduler.steps == []


@pytest.mark.parametrize(
    ("process", "reason"),
    [
        ("", "unable to determine sirenia process type"),
        ("db", "sirenia process type not present in new release"),
        ("web", "sirenia process type has no service"),
    ],
)
async def test_a_database_that_cannot_be_replaced_is_left_alone(
    conninfo: str, controller: Controller, shop: Shop, running: Release, process: str, reason: str
) -> None:
    release = await controller.create_release(a_release(shop.app, shop.artifact, SIRENIA_PROCESS=process))
    await controller.update_app("shop", AppUpdate(strategy="sirenia"))
    async with working(conninfo):
        with pytest.raises(DeploymentFailed, match=reason):
            await controller.deploy("shop", release.id, timeout=timedelta(seconds=10))
    assert await counts(controller, shop.release.id) == {"web": 2, "clock": 1}
    failed = (await controller.deployments("shop"))[0]
    assert (failed.status, failed.error) == ("failed", reason)


async def test_a_database_alone_is_replaced_in_place(
    conninfo: str, controller: Controller, shop: Shop, running: Release, scheduler: Scheduler
) -> None:
    """Old down and new up are one decision: once the database is gone, nobody could ask for the new one."""
    release = await controller.create_release(a_release(shop.app, shop.artifact, SIRENIA_PROCESS="clock"))
    scheduler.names[release.id] = "new"
    await controller.update_app("shop", AppUpdate(strategy="sirenia"))
    async with working(conninfo):
        await controller.deploy("shop", release.id, timeout=timedelta(seconds=10))
    assert ", ".join(scheduler.steps) == "old clock=0, new clock=1, new web=1, old web=1, new web=2, old web=0"


async def test_what_was_swapped_is_swapped_back(
    conninfo: str, controller: Controller, shop: Shop, running: Release, scheduler: Scheduler
) -> None:
    """Also if the worker is stopped in between: the verdict is on record, so nobody begins the deployment anew."""
    release = await controller.create_release(a_release(shop.app, shop.artifact, SIRENIA_PROCESS="clock"))
    scheduler.names[release.id] = "new"
    await controller.update_app("shop", AppUpdate(strategy="sirenia"))
    scheduler.works = lambda request: request.release != release.id
    async with working(conninfo):
        with pytest.raises(DeploymentFailed, match="web job failed to start"):
            await controller.deploy("shop", release.id, timeout=timedelta(seconds=20))
    assert await counts(controller, shop.release.id) == {"web": 2, "clock": 1}
    assert await counts(controller, release.id) == {}
    # the last entry is the new formation's deletion
    assert ", ".join(scheduler.steps) == "old clock=0, new clock=1, new clock=0, old clock=1 web=2, new clock=0"


async def test_a_release_of_discoverd_is_announced_and_runs_beside_the_old_one(
    conninfo: str, controller: Controller, shop: Shop, running: Release, scheduler: Scheduler
) -> None:
    directory = MemoryRegistry()
    await directory.create("discoverd")
    before = ServiceMeta(data={"id": "before", "release": "old", "states": {"10.0.0.1:1111": "performing"}})
    await directory.put_meta("discoverd", before)
    await controller.update_app("shop", AppUpdate(strategy="discoverd-meta"))
    async with working(conninfo, directory=directory):
        await controller.deploy("shop", running.id, timeout=timedelta(seconds=10))
    meta = await directory.get_meta("discoverd")
    assert meta is not None and meta.data["id"] != "before"
    assert (meta.data["release"], meta.data["states"]) == (running.id, {})
    assert scheduler.steps[:2] == ["new clock=1", "old clock=0"]


async def test_the_platform_cannot_be_scaled_away(controller: Controller, shop: Shop, running: Release) -> None:
    await controller.update_app("shop", AppUpdate(meta={SYSTEM_CRITICAL: "true"}))
    for refused in (
        controller.put_formation(Formation(app="shop", release=shop.release.id, processes={"web": 0})),
        controller.put_formation(Formation(app="shop", release=shop.release.id)),
        controller.delete_formation("shop", shop.release.id),
        controller.request_app_deletion("shop"),
    ):
        with pytest.raises(Conflict, match="the platform cannot be without it"):
            await refused
    await controller.put_formation(Formation(app="shop", release=shop.release.id, processes={"web": 1}))


@dataclass
class FakeBackends:
    """A blobstore and a provider in one, remembering what they were asked to delete."""

    url: str = ""
    deleted: list[str] = field(default_factory=list)
    broken: bool = False

    async def provision(self, request: Request) -> dict[str, object]:
        return {"id": f"db{len(self.deleted)}", "env": {}}

    async def delete(self, request: Request) -> None:
        if self.broken:
            raise UnknownError("the disk is on fire")
        self.deleted.append(request.raw_path + (f"?{request.query_string}" if request.query_string else ""))
        if request.raw_path.endswith("-cache.tgz"):
            raise NotFound("no cache was ever written")


@pytest.fixture
async def backends() -> AsyncIterator[FakeBackends]:
    backends = FakeBackends()
    api = Api("backends")
    api.route("POST", "/databases", backends.provision, allow=ANYONE)
    api.route("DELETE", "/{path:.*}", backends.delete, allow=ANYONE)
    async with listen(api, "127.0.0.1", 0) as (host, port):
        backends.url = f"http://{host}:{port}"
        yield backends


async def test_deleting_an_app_takes_everything_with_it(
    conninfo: str, controller: Controller, shop: Shop, running: Release, scheduler: Scheduler, backends: FakeBackends
) -> None:
    await controller.create_provider(Provider(name="db", url=f"{backends.url}/databases"))
    own = await controller.provision_resource("db", ResourceReq(apps=["shop"]))
    await controller.create_app(App(name="other"))
    backends.deleted.append("")
    shared = await controller.provision_resource("db", ResourceReq(apps=["shop", "other"]))
    slug = await controller.create_artifact(
        Artifact(
            type="flynn",
            uri=f"{backends.url}/slug.json",
            manifest=MANIFEST,
            meta={"blobstore": "true"},
            layer_url_template=backends.url + "/layers/{id}.squashfs",
        )
    )
    pushed = await controller.create_release(Release(app_id=shop.app.id, artifacts=[slug.id]))
    backends.deleted.clear()
    async with working(conninfo, backends.url), asyncio.timeout(15):
        gone = await controller.delete_app("shop")
        while backends.deleted[-1:] != ["/slug.json"] and "/slug.json" not in backends.deleted:
            await asyncio.sleep(0.02)
    assert gone.deleted_resources is not None and [resource.id for resource in gone.deleted_resources] == [own.id]
    assert gone.deleted_releases is not None
    assert {release.id for release in gone.deleted_releases} == {shop.release.id, running.id, pushed.id}
    assert gone.deleted_routes is not None and len(gone.deleted_routes) == 1
    assert sorted(backends.deleted) == sorted(
        [
            f"/databases?id={own.external_id}",
            f"/repos/{shop.app.id}.tar",
            f"/{shop.app.id}-cache.tgz",
            "/slug.json",
            # Its layer stays: the shop's own image, which no release needs but nobody may delete either, has it too.
        ]
    )
    assert "old clock=0 web=0" in scheduler.steps, "jobs are stopped by scaling, not by forgetting"
    with pytest.raises(NotFound):
        await controller.app("shop")
    assert [resource.id for resource in await controller.resources()] == [shared.id]
    assert (await controller.app_resources("other"))[0].apps == [(await controller.app("other")).id]
    assert (await controller.create_app(App(name="shop"))).id != shop.app.id, "the name is free at once"


async def test_a_deletion_that_fails_says_why_and_is_taken_up_again(
    conninfo: str, controller: Controller, stores: Stores, shop: Shop, running: Release, backends: FakeBackends
) -> None:
    backends.broken = True
    async with working(conninfo, backends.url), asyncio.timeout(15):
        with pytest.raises(DeletionFailed, match="the disk is on fire"):
            await controller.delete_app("shop")
        assert await controller.app_releases("shop") == []
        backends.broken = False
        await stores.database.execute("UPDATE que_jobs SET run_at = now()")
        while True:
            try:
                await controller.app("shop")
                await asyncio.sleep(0.05)
            except NotFound:
                break


async def test_a_failing_job_is_postponed_and_at_last_left_alone(controller: Controller, stores: Stores) -> None:
    app = await controller.create_app(App(name="gone"))
    await controller.collect_garbage(app.id)
    for attempt in range(12):
        job = await stores.queue.take()
        assert job is not None and job.error_count == attempt
        await stores.queue.postpone(job, "no")
        assert await stores.queue.take() is None
        await stores.database.execute("UPDATE que_jobs SET run_at = now() WHERE run_at < 'infinity'")
    assert await stores.queue.take() is None
    assert await stores.queue.due_in() is None


async def test_old_pushes_are_collected_after_a_deployment(
    conninfo: str, controller: Controller, world: World, shop: Shop, running: Release
) -> None:
    await controller.set_app_meta("shop", {"gc.max_inactive_slug_releases": "1"})
    ids = []
    for number in range(3):
        slug = await controller.create_artifact(
            Artifact(
                type="flynn",
                uri=f"file:///slug{number}",
                manifest=MANIFEST,
                meta={"blobstore": "true"},
                layer_url_template="file:///l/{id}",
            )
        )
        release = await controller.create_release(
            Release(
                app_id=shop.app.id,
                artifacts=[shop.artifact.id, slug.id],
                meta={"git": "true"},
                processes=shop.release.processes,
            )
        )
        ids.append(release.id)
    async with working(conninfo), asyncio.timeout(15):
        await controller.deploy("shop", running.id)
        events = controller.follow_events(object_types=[EventType.APP_GARBAGE_COLLECTION], past=True)
        async for event in events:
            deleted = event.data["app_garbage_collection"]["deleted_releases"]
            break
    assert sorted(deleted) == sorted(ids[:2])
    left = {release.id for release in await controller.app_releases("shop")}
    assert ids[2] in left and not left & set(ids[:2])
