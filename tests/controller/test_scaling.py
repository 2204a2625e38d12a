"""Formations, scale requests and the scheduler's stream of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime

import pytest

from flynn.controller.client import Controller, ScaleFailed
from flynn.types.app import App
from flynn.types.errors import NotFound, ValidationError
from flynn.types.event import EventType
from flynn.types.formation import ExpandedFormation, Formation, ScaleRequest
from flynn.types.job import Job
from flynn.types.release import Release

from .conftest import Shop


def wanted(shop: Shop, **processes: int) -> Formation:
    return Formation(app="shop", release=shop.release.id, processes=processes)


async def test_a_request_merges_into_the_formation(controller: Controller, shop: Shop) -> None:
    await controller.put_formation(wanted(shop, web=2))
    await controller.put_scale_request(
        ScaleRequest(app="shop", release=shop.release.id, state="pending", new_processes={"clock": 1})
    )
    formation = await controller.formation("shop", shop.release.id)
    assert formation.processes == {"web": 2, "clock": 1}
    expanded = await controller.expanded_formation("shop", shop.release.id)
    assert expanded.app is not None and expanded.app.name == "shop"
    assert expanded.release is not None and expanded.release.id == shop.release.id
    assert [artifact.manifest for artifact in expanded.artifacts] == [shop.artifact.manifest]
    request = expanded.pending_scale_request
    assert request is not None
    assert (request.old_processes, request.new_processes) == ({"web": 2}, {"clock": 1})


async def test_tags_of_a_type_are_replaced(controller: Controller, shop: Shop) -> None:
    await controller.put_formation(
        Formation(app="shop", release=shop.release.id, processes={"web": 1}, tags={"web": {"disk": "ssd", "a": "b"}})
    )
    await controller.put_scale_request(
        ScaleRequest(app="shop", release=shop.release.id, state="pending", new_tags={"web": {"disk": "hdd"}})
    )
    formation = await controller.formation("shop", shop.release.id)
    assert (formation.processes, formation.tags) == ({"web": 1}, {"web": {"disk": "hdd"}})


async def test_a_formation_without_counts_means_none(controller: Controller, shop: Shop) -> None:
    await controller.put_formation(Formation(app="shop", release=shop.release.id))
    assert (await controller.formation("shop", shop.release.id)).processes == {"web": 0, "clock": 0}


@pytest.mark.parametrize(
    ("request_body", "message"),
    [
        (ScaleRequest(state="pending"), "either processes or tags"),
        (ScaleRequest(state="pending", new_processes={"x": 1, "a": 1}), "do not exist in the release: a, x"),
        (ScaleRequest(state="pending", new_processes={"web": -1}), "web must be between"),
        (ScaleRequest(state="soon", new_processes={"web": 1}), "state Enum error"),
        (ScaleRequest(new_processes={"web": 1}), "state"),
        (ScaleRequest(state="complete", id="nonsense"), "id must be a UUID"),
    ],
    ids=["nothing", "unknown types", "negative", "unknown state", "no state", "bad id"],
)
async def test_bad_requests(controller: Controller, shop: Shop, request_body: ScaleRequest, message: str) -> None:
    import msgspec

    request = msgspec.structs.replace(request_body, app="shop", release=shop.release.id)  # type: ignore[type-var]
    with pytest.raises(ValidationError, match=message):
        await controller.put_scale_request(request)


async def test_a_release_without_images_cannot_be_deployed(controller: Controller, shop: Shop) -> None:
    empty = await controller.create_release(Release(app_id=shop.app.id))
    with pytest.raises(ValidationError, match="release is not deployable"):
        await controller.put_formation(Formation(app="shop", release=empty.id))


async def test_a_later_request_cancels_only_what_is_pending(controller: Controller, shop: Shop) -> None:
    first = await controller.put_scale_request(
        ScaleRequest(app="shop", release=shop.release.id, state="pending", new_processes={"web": 1})
    )
    await controller.put_scale_request(ScaleRequest(app="shop", release=shop.release.id, state="complete", id=first.id))
    second = await controller.put_scale_request(
        ScaleRequest(app="shop", release=shop.release.id, state="pending", new_processes={"web": 2})
    )
    await controller.put_scale_request(
        ScaleRequest(app="shop", release=shop.release.id, state="pending", new_processes={"web": 3})
    )
    events = await controller.events(object_types=["scale_request", "scale_request_cancelation"])
    told = [(event.object_type, event.object_id, event.data["state"]) for event in reversed(events)]
    assert told.count(("scale_request", first.id, "cancelled")) == 0
    assert ("scale_request_cancelation", second.id, "cancelled") in told
    assert ("scale_request", second.id, "cancelled") in told


async def test_deleting_a_formation(controller: Controller, shop: Shop) -> None:
    with pytest.raises(NotFound):
        await controller.delete_formation("shop", shop.release.id)
    await controller.put_formation(wanted(shop, web=2))
    await controller.delete_formation("shop", shop.release.id)
    with pytest.raises(NotFound):
        await controller.formation("shop", shop.release.id)
    assert await controller.formations("shop") == []
    [newest] = await controller.events(object_types=["scale_request"], count=1)
    assert newest.object_id
    [request] = [e for e in await controller.events(object_types=["scale_request"]) if e.data["state"] == "pending"][:1]
    assert request.data["new_processes"] == {"web": 0}


async def test_only_formations_with_processes_are_active(controller: Controller, shop: Shop) -> None:
    await controller.put_formation(wanted(shop, web=0))
    assert await controller.active_formations() == []
    await controller.put_formation(wanted(shop, web=0, clock=1))
    [active] = await controller.active_formations()
    assert active.processes == {"web": 0, "clock": 1}
    with pytest.raises(ValidationError, match="must either request a stream or only active formations"):
        await controller._http.get("/formations")


async def next_of(stream: AsyncIterator[ExpandedFormation]) -> ExpandedFormation:
    async with asyncio.timeout(5):
        return await anext(stream)


async def test_the_stream_replays_marks_and_follows(controller: Controller, shop: Shop) -> None:
    await controller.put_formation(wanted(shop, web=1))
    async with aclosing(controller.follow_formations()) as stream:  # type: ignore[type-var]
        assert (await next_of(stream)).processes == {"web": 1}
        mark = await next_of(stream)
        assert (mark.app, mark.updated_at.year) == (None, 1)
        await controller.put_formation(wanted(shop, web=2))
        live = await next_of(stream)
        while live.processes != {"web": 2}:  # what was told already may be told again
            live = await next_of(stream)
        assert live.pending_scale_request is not None
        await controller.delete_formation("shop", shop.release.id)
        gone = await next_of(stream)
        while not gone.deleted:  # the cancelled request is told as well
            gone = await next_of(stream)
        assert gone.processes is None and gone.app is not None
    async with aclosing(controller.follow_formations(datetime.now(UTC))) as stream:  # type: ignore[type-var]
        assert (await next_of(stream)).app is None, "deleted formations are not replayed"


async def test_scaling_waits_for_the_scheduler(controller: Controller, shop: Shop) -> None:
    seen: list[Job] = []

    async def scheduler() -> None:
        async for formation in controller.follow_formations():
            request = formation.pending_scale_request
            if request is None:
                continue
            for state in ("starting", "up"):
                await controller.put_job(
                    Job(
                        uuid="0b6f0c5e-7c0f-4b52-9a39-0d9f6a1d2e11",
                        app=shop.app.id,
                        release=shop.release.id,
                        type="web",
                        state=state,
                    )
                )
            await controller.put_scale_request(
                ScaleRequest(app=request.app, release=request.release, id=request.id, state="complete")
            )

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        work = group.create_task(scheduler())
        done = await controller.scale("shop", shop.release.id, {"web": 1}, on_job=seen.append)
        work.cancel()
    assert done.state == "complete"
    assert [job.state for job in seen] == ["starting", "up"]


async def test_scaling_that_nobody_carries_out_times_out(controller: Controller, shop: Shop) -> None:
    from datetime import timedelta

    with pytest.raises(ScaleFailed, match=r"waited 0.3 seconds"):
        await controller.scale("shop", shop.release.id, {"web": 1}, timeout=timedelta(milliseconds=300))


async def test_events_tell_the_whole_change(controller: Controller, shop: Shop) -> None:
    await controller.put_formation(wanted(shop, web=1))
    kinds = [event.object_type for event in reversed(await controller.events(app_id="shop"))]
    assert kinds == [EventType.APP, EventType.ROUTE, EventType.RELEASE, EventType.SCALE_REQUEST, EventType.SCALE]


async def test_an_unknown_release_or_app_is_not_found(controller: Controller, shop: Shop) -> None:
    await controller.create_app(App(name="other"))
    for app, release in (("shop", shop.app.id), ("nobody", shop.release.id), ("shop", "nonsense")):
        with pytest.raises(NotFound):
            await controller.put_formation(Formation(app=app, release=release, processes={"web": 1}))
