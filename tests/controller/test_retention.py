"""The past is forgotten within its limits, and nothing that is still going on is."""

from __future__ import annotations

from uuid import uuid4

from flynn.controller.client import Controller
from flynn.controller.store.retention import LOCK, Limits, Retention
from flynn.controller.stores import Stores
from flynn.types.formation import Formation, ScaleRequest
from flynn.types.job import Job

from .conftest import Shop, a_release

TIGHT = Limits(events=10, jobs_per_app=3, deployments_per_app=2)


def a_job(shop: Shop, state: str, *volumes: str) -> Job:
    return Job(uuid=str(uuid4()), app=shop.app.id, release=shop.release.id, state=state, volumes=list(volumes))


async def some_past(controller: Controller, shop: Shop) -> None:
    for number in range(5):
        for state in ("up", "down"):
            await controller.put_job(a_job(shop, state))
        await controller.put_job(a_job(shop, "down", str(uuid4())))
        release = await controller.create_release(a_release(shop.app, shop.artifact, NUMBER=str(number)))
        await controller.create_deployment("shop", release.id)
        await controller.put_formation(Formation(app="shop", release=shop.release.id, processes={"web": number}))


async def test_counts_are_bounded(controller: Controller, stores: Stores, shop: Shop) -> None:
    await some_past(controller, shop)
    newest = (await controller.events(count=1))[0].id
    removed = await Retention(stores.database, TIGHT).forget()
    assert (removed["jobs"], removed["deployments"]) == (7, 3)
    jobs = await controller.jobs("shop")
    assert sorted(job.state for job in jobs) == ["down"] * 3 + ["up"] * 5
    assert len(await controller.deployments("shop")) == 2
    events = await controller.events()
    assert len(events) == 10 and events[0].id == newest, "the latest are kept"
    assert await Retention(stores.database, TIGHT).forget() == {}


async def test_what_is_old_goes_and_what_goes_on_stays(controller: Controller, stores: Stores, shop: Shop) -> None:
    await some_past(controller, shop)
    await controller.put_scale_request(
        ScaleRequest(app="shop", release=shop.release.id, state="pending", new_processes={"web": 1})
    )
    for table, column in (
        ("events", "created_at"),
        ("job_cache", "updated_at"),
        ("scale_requests", "updated_at"),
        ("deployments", "created_at"),
    ):
        await stores.database.execute(f"UPDATE {table} SET {column} = now() - interval '300 days'")
    removed = await Retention(stores.database).forget()
    assert removed["jobs"] == 10 and removed["deployments"] == 4 and removed["events"] > 20
    assert {job.state for job in await controller.jobs("shop")} == {"up"}
    pending = (await controller.expanded_formation("shop", shop.release.id)).pending_scale_request
    assert pending is not None
    assert len(await controller.deployments("shop")) == 1, "the last one tells how the app came to where it is"


async def test_one_worker_at_a_time(controller: Controller, stores: Stores, shop: Shop) -> None:
    await some_past(controller, shop)
    async with stores.database.transaction() as other:
        await other.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
        assert await Retention(stores.database, TIGHT).forget() == {}
    assert await Retention(stores.database, TIGHT).forget()
