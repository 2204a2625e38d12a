"""Providers, resources, volumes, sinks and the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from uuid import uuid4

import pytest

from flynn.controller.client import Controller
from flynn.controller.stores import Stores
from flynn.http.server import Api, Request, Streaming, listen
from flynn.identity import ANYONE
from flynn.types.app import App
from flynn.types.errors import ApiError, NotFound, ObjectExists, ServiceUnavailable, ValidationError
from flynn.types.provider import Provider, Resource, ResourceReq
from flynn.types.sink import Sink
from flynn.types.volume import Volume

from .conftest import Identities, Shop, serving


@dataclass
class FakeProvider:
    """A provider that hands out databases."""

    url: str = ""
    configs: list[object] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    refusal: ApiError | None = None

    async def provision(self, request: Request) -> dict[str, object]:
        self.configs.append(await request.body(object))
        if self.refusal:
            raise self.refusal
        number = len(self.configs)
        return {"id": f"/databases/{number}", "env": {"DATABASE_URL": f"postgres://{number}"}}

    async def deprovision(self, request: Request) -> None:
        self.removed.append(request.query("id"))


@pytest.fixture
async def backend() -> AsyncIterator[FakeProvider]:
    backend = FakeProvider()
    api = Api("provider")
    api.route("POST", "/databases", backend.provision, allow=ANYONE)
    api.route("DELETE", "/databases", backend.deprovision, allow=ANYONE)
    async with listen(api, "127.0.0.1", 0) as (host, port):
        backend.url = f"http://{host}:{port}/databases"
        yield backend


@pytest.fixture
async def provider(controller: Controller, backend: FakeProvider) -> Provider:
    return await controller.create_provider(Provider(name="postgres", url=backend.url))


async def test_providers_are_unique_and_complete(controller: Controller, provider: Provider) -> None:
    assert await controller.provider("postgres") == provider == await controller.provider(provider.id)
    assert await controller.providers() == [provider]
    for again in (Provider(name="postgres", url="http://x/y"), Provider(name="other", url=provider.url)):
        with pytest.raises(ObjectExists) as refused:
            await controller.create_provider(again)
        assert not refused.value.retry
    for bad in (Provider(name=" ", url="http://x"), Provider(name="x"), Provider(name="x", url="x y")):
        with pytest.raises(ValidationError):
            await controller.create_provider(bad)


async def test_the_life_of_a_resource(
    controller: Controller, provider: Provider, backend: FakeProvider, shop: Shop
) -> None:
    other = await controller.create_app(App(name="other"))
    made = await controller.provision_resource("postgres", ResourceReq(apps=["shop"], config={"size": 1}))
    assert backend.configs == [{"size": 1}]
    assert (made.apps, made.env) == ([shop.app.id], {"DATABASE_URL": "postgres://1"})
    assert await controller.app_resources("shop") == [made] == await controller.provider_resources("postgres")
    linked = await controller.link_resource("postgres", made.id, "other")
    assert linked.apps == [shop.app.id, other.id]
    second = await controller.provision_resource("postgres", ResourceReq(apps=["other"]))
    assert backend.configs[1] == {}
    unlinked = await controller.unlink_resource("postgres", made.id, other.id)
    assert unlinked.apps == [shop.app.id]
    assert await controller.app_resources("other") == [second], "only this link is gone"
    await controller.link_resource("postgres", made.id, "other")
    gone = await controller.delete_resource("postgres", made.id)
    assert gone.apps == [shop.app.id, other.id]
    assert backend.removed == ["/databases/1"]
    assert await controller.resources() == [second]
    with pytest.raises(NotFound):
        await controller.resource("postgres", made.id)
    kinds = [event.object_type for event in await controller.events(object_id=made.id)]
    assert kinds == ["resource_deletion"] * 2 + ["resource", "resource_app_deletion", "resource", "resource"]


async def test_an_unknown_app_is_refused_before_anything_is_made(
    controller: Controller, provider: Provider, backend: FakeProvider
) -> None:
    with pytest.raises(ValidationError, match='names no app: "nobody"'):
        await controller.provision_resource("postgres", ResourceReq(apps=["nobody"]))
    assert backend.configs == []


async def test_a_provider_that_fails_is_quoted(
    controller: Controller, provider: Provider, backend: FakeProvider
) -> None:
    backend.refusal = ApiError("the disk is full")
    with pytest.raises(ApiError, match="provider postgres could not provision a resource: the disk is full"):
        await controller.provision_resource("postgres", ResourceReq())
    await controller.create_provider(Provider(name="away", url="http://127.0.0.1:1/x"))
    with pytest.raises(ServiceUnavailable) as refused:
        await controller.provision_resource("away", ResourceReq())
    assert not refused.value.retry


async def test_an_existing_resource_can_be_recorded_once(controller: Controller, provider: Provider) -> None:
    known = Resource(id=str(uuid4()), provider="postgres", external_id="x", env={"A": "b"})
    assert (await controller.put_resource(known)).env == {"A": "b"}
    with pytest.raises(ObjectExists):
        await controller.put_resource(known)


async def test_volumes(controller: Controller, shop: Shop) -> None:
    volume = Volume(
        id=str(uuid4()), host_id="node1", type="data", state="pending", app=shop.app.id, release=shop.release.id,
        path="/data",
    )  # fmt: skip
    async with asyncio.timeout(10), aclosing(controller.follow_volumes()) as stream:  # type: ignore[type-var]
        assert (await anext(stream)).id == ""
        await controller.put_volume(volume)
        assert (await anext(stream)).state == "pending"
        import msgspec

        created = msgspec.structs.replace(volume, state="created", job=str(uuid4()))  # type: ignore[type-var]
        stored = await controller.put_volume(created)
        assert await anext(stream) == stored
    assert await controller.volume("shop", volume.id) == stored == (await controller.volumes())[0]
    gone = await controller.decommission_volume("shop", Volume(id=volume.id))
    assert gone.decommissioned_at is not None and gone.path == "/data"
    with pytest.raises(NotFound):
        await controller.decommission_volume("shop", Volume(id=str(uuid4())))
    with pytest.raises(ValidationError, match="state"):
        await controller.put_volume(Volume(id=str(uuid4()), type="data", state="lost"))


async def test_sinks(controller: Controller) -> None:
    async with asyncio.timeout(10), aclosing(controller.follow_sinks()) as stream:  # type: ignore[type-var]
        assert (await anext(stream)).id == ""
        first = await controller.create_sink(Sink(kind="syslog", config={"url": "tcp://a:1"}))
        assert await anext(stream) == first
        second = await controller.create_sink(Sink(kind="syslog", config={"url": "tcp://b:1"}))
        assert await anext(stream) == second
        assert await controller.sinks() == [second, first]
        assert (await controller.delete_sink(first.id)).id == first.id
        gone = await anext(stream)
        assert (gone.id, gone.config) == (first.id, None)
    with pytest.raises(NotFound):
        await controller.sink(first.id)
    for bad in (Sink(kind="syslog"), Sink(config={"url": "x"}), Sink(kind="logaggregator", config={})):
        with pytest.raises(ValidationError):
            await controller.create_sink(bad)


LINES = b'{"host_id":"h","msg":"one","timestamp":"2024-01-01T00:00:00Z"}\n{"msg":"two","timestamp":"x"}\n'


async def test_the_log_is_passed_on(stores: Stores, identities: Identities) -> None:
    asked: list[str] = []
    api = Api("logaggregator")

    async def log(request: Request) -> Streaming:
        asked.append(request.query_string)

        async def chunks() -> AsyncIterator[bytes]:
            yield LINES[:30]
            await asyncio.sleep(0.01)
            yield LINES[30:]

        return Streaming(chunks(), content_type="text/plain")

    api.route("GET", "/log/{app}", log, allow=ANYONE)
    async with listen(api, "127.0.0.1", 0) as (host, port):
        async with serving(stores, identities, aggregator_url=f"http://{host}:{port}") as world:
            async with world.client() as controller:
                await controller.create_app(App(name="shop"))
                async with controller.app_log("shop", lines=2, process_type="", follow=True) as chunks:
                    assert b"".join([chunk async for chunk in chunks]) == LINES
                messages = [chunk async for chunk in controller.app_log_events("shop", job_id="j")]
                with pytest.raises(NotFound):
                    async with controller.app_log("nobody"):
                        pass
    assert [message.event for message in messages] == ["message", "message", "eof"]
    assert messages[0].data == {"host_id": "h", "msg": "one", "timestamp": "2024-01-01T00:00:00Z"}
    assert "follow=true" in asked[0] and "lines=2" in asked[0] and "process_type=" in asked[0]
    assert "job_id=j" in asked[1] and "stream_types=stdout" in asked[1] and "follow" not in asked[1]


async def test_a_log_that_cannot_be_had(controller: Controller, shop: Shop) -> None:
    with pytest.raises(ServiceUnavailable, match="the log aggregator cannot be reached"):
        async with controller.app_log("shop"):
            pass
