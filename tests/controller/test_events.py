"""Events as list and stream, and what happens to streams when the database goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from flynn.controller.client import Controller
from flynn.controller.stores import Stores
from flynn.types.app import App
from flynn.types.errors import NotFound, ServiceUnavailable, ValidationError
from flynn.types.event import Event

from .conftest import KEY, PostgresServer, World


async def names(stream: AsyncIterator[Event], count: int) -> list[str]:
    async with asyncio.timeout(10):
        return [(await anext(stream)).data["name"] for _ in range(count)]


async def create(controller: Controller, *apps: str) -> None:
    for name in apps:
        await controller.create_app(App(name=name))


async def test_the_list_is_newest_first_and_its_bounds_exclusive(controller: Controller) -> None:
    await create(controller, "a", "b", "c")
    c, b, a = await controller.events(object_types=["app"])
    assert [event.data["name"] for event in (a, b, c)] == ["a", "b", "c"]
    assert await controller.events(object_types=["app"], before_id=c.id, since_id=a.id) == [b]
    assert await controller.events(object_types=["app"], count=1) == [c]
    assert await controller.events(app_id="b", object_types=["app"]) == [b]
    assert await controller.events(object_id=a.object_id, object_types=["app"]) == [a]
    assert await controller.events(object_types=["nonsense"]) == []
    assert await controller.event(b.id) == b


@pytest.mark.parametrize("query", ["count=x", "before_id=1.5", "since_id=99999999999999999999999"])
async def test_numbers_must_be_numbers(controller: Controller, query: str) -> None:
    with pytest.raises(ValidationError, match=query.partition("=")[0]):
        await controller._http.get(f"/events?{query}")


async def test_unknown_apps_and_events(controller: Controller) -> None:
    with pytest.raises(NotFound):
        await controller.events(app_id="nobody")
    with pytest.raises(NotFound):
        await controller.event(123456)


async def test_a_stream_tells_the_past_on_request_then_the_present(controller: Controller) -> None:
    await create(controller, "a", "b", "c")
    async with aclosing(controller.follow_events(object_types=["app"], past=True)) as stream:
        assert await names(stream, 3) == ["a", "b", "c"]
        await create(controller, "d")
        assert await names(stream, 1) == ["d"]
    async with aclosing(controller.follow_events(object_types=["app"], past=True, count=2)) as stream:
        assert await names(stream, 2) == ["c", "d"]


async def test_a_resumed_stream_misses_nothing(controller: Controller) -> None:
    await create(controller, "a")
    [first] = await controller.events(object_types=["app"])
    await create(controller, "b", "c")
    async with aclosing(controller.follow_events(object_types=["app"], last_id=first.id, count=1)) as stream:
        assert await names(stream, 2) == ["b", "c"], "`count` never cuts a resumed stream"


async def test_the_bytes_on_the_wire(world: World, controller: Controller) -> None:
    await create(controller, "a")
    import base64
    import ssl

    host, _, port = world.address.partition(":")
    context = world.identities.app("router").client_context()
    assert isinstance(context, ssl.SSLContext)
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    token = base64.b64encode(f":{KEY}".encode()).decode()
    writer.write(
        f"GET /events?object_types=app&past=true HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {token}\r\n"
        "Accept: */*\r\nConnection: close\r\n\r\n".encode()
    )
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"text/event-stream; charset=utf-8" in head
        event = await reader.readuntil(b"\n\n")
    assert b'data: {"id":1,"app":"' in event and b"event:" not in event
    writer.close()


async def test_concurrent_writers_never_hide_an_event(stores: Stores, controller: Controller) -> None:
    """Ids become visible in order, so a reader that only looks forward sees every one."""
    seen: list[int] = []

    async def read() -> None:
        async for event in controller.follow_events(object_types=["app"], past=True):
            seen.append(event.id)
            if len(seen) == 60:
                return

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(read())
        for _ in range(60):
            group.create_task(controller.create_app(App(meta={"flynn-system-app": "true"})))
    assert seen == sorted(seen) and len(set(seen)) == 60


async def test_the_database_may_be_killed(
    world: World, controller: Controller, postgres_server: PostgresServer
) -> None:
    """Requests in the gap are told to try again, streams stay open, and afterwards everything goes on."""
    await create(controller, "before")
    async with aclosing(controller.follow_events(object_types=["app"], past=True)) as stream:
        assert await names(stream, 1) == ["before"]
        postgres_server.kill()
        try:
            async with world.http() as impatient:
                with pytest.raises(ServiceUnavailable) as gap:
                    await impatient.get("/apps", answer=list[App])
                assert gap.value.retry
                with pytest.raises(Exception, match="unhealthy"):
                    await impatient.get("/.well-known/status")
        finally:
            await asyncio.to_thread(postgres_server.start)
        async with asyncio.timeout(15):
            while True:
                try:
                    await create(controller, "after")
                    break
                except ServiceUnavailable:
                    await asyncio.sleep(0.1)
        assert await names(stream, 1) == ["after"]


async def test_the_way_out(world: World, controller: Controller) -> None:
    async with world.http() as http, aclosing(http.events("/events", Event)) as stream:  # type: ignore[type-var]
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.1)
        world.door.open = False
        world.stores.hub.stop(world.door.reason)
        with pytest.raises(Exception, match="controller: shutting down"):
            await waiting
        with pytest.raises(ServiceUnavailable, match="controller: shutting down"):
            await http.get("/ping")
