"""What every implementation of the registry does: the real one over TLS, and the one in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from flynn.discoverd.memory import MemoryRegistry
from flynn.discoverd.registry import Registry
from flynn.types.errors import NotFound, ObjectExists, PreconditionFailed, ValidationError
from flynn.types.instance import DiscoverdEvent, EventKind, Instance, LeaderType, ServiceMeta
from tests.discoverd.harness import Place, member

A, B = Instance.at("10.0.0.1:80", "http", {"n": "a"}), Instance.at("10.0.0.2:80", "http")


@pytest.fixture(params=["memory", "real"])
async def registry(request: pytest.FixtureRequest, place: Place) -> AsyncIterator[Registry]:
    if request.param == "memory":
        yield MemoryRegistry()
        return
    async with member(place), place.client() as client:
        yield client


async def test_absence_is_an_answer(registry: Registry) -> None:
    assert await registry.instances("web") == []
    assert await registry.leader("web") is None
    assert await registry.get_meta("web") is None
    await registry.create("web")
    assert await registry.instances("web") == []
    assert await registry.leader("web") is None
    assert await registry.get_meta("web") is None


async def test_a_service_is_created_once_and_removed_once(registry: Registry) -> None:
    assert await registry.create("web")
    assert not await registry.create("web", LeaderType.MANUAL)
    await registry.remove("web")
    with pytest.raises(NotFound):
        await registry.remove("web")
    with pytest.raises(ValidationError):
        await registry.create("Web")


async def test_instances_come_in_order_of_registration(registry: Registry) -> None:
    await registry.create("web")
    for instance in (B, A, B):
        await registry.register("web", instance)
    known = await registry.instances("web")
    assert [(one.id, one.addr, one.meta) for one in known] == [(B.id, B.addr, {}), (A.id, A.addr, {"n": "a"})]
    assert 0 < known[0].index < known[1].index
    assert await registry.leader("web") == known[0]
    await registry.deregister("web", B.id)
    await registry.deregister("web", B.id)
    assert await registry.leader("web") == known[1]
    await registry.deregister("nowhere", B.id)


async def test_what_a_job_registered_is_forgotten_with_it(registry: Registry) -> None:
    ended = Instance.at("10.0.0.3:80", "http", {"FLYNN_JOB_ID": "host-ended"})
    goes_on = Instance.at("10.0.0.4:80", "http", {"FLYNN_JOB_ID": "host-goes-on"})
    for service in ("web", "api"):
        await registry.create(service)
        await registry.register(service, ended)
    await registry.register("web", goes_on)
    await registry.register("web", A)
    await registry.forget_job("host-ended")
    await registry.forget_job("nobody's")
    assert await registry.instances("api") == []
    assert [one.id for one in await registry.instances("web")] == [goes_on.id, A.id]
    leader = await registry.leader("web")
    assert leader is not None and leader.id == goes_on.id


async def test_registering_needs_the_service_and_a_sound_instance(registry: Registry) -> None:
    with pytest.raises(NotFound):
        await registry.register("web", A)
    await registry.create("web")
    with pytest.raises(ValidationError):
        await registry.register("web", Instance(id="wrong", addr="10.0.0.1:80", proto="http"))


async def test_a_manual_leader(registry: Registry) -> None:
    await registry.create("db", LeaderType.MANUAL)
    await registry.register("db", A)
    assert await registry.leader("db") is None
    await registry.set_leader("db", A.id)
    leader = await registry.leader("db")
    assert leader is not None and leader.id == A.id
    await registry.create("web")
    with pytest.raises(ValidationError):
        await registry.set_leader("web", A.id)


async def test_metadata_is_compared_and_set(registry: Registry) -> None:
    with pytest.raises(NotFound):
        await registry.put_meta("db", ServiceMeta(data=1))
    await registry.create("db", LeaderType.MANUAL)
    first = await registry.put_meta("db", ServiceMeta(data={"n": [1, None]}))
    assert await registry.get_meta("db") == first
    with pytest.raises(ObjectExists):
        await registry.put_meta("db", ServiceMeta(data=2))
    with pytest.raises(PreconditionFailed):
        await registry.put_meta("db", ServiceMeta(data=2, index=first.index + 1))
    await registry.register("db", A)
    second = await registry.put_meta("db", ServiceMeta(data=2, index=first.index, leader_id=A.id))
    assert second.index > first.index
    leader, meta = await registry.leader("db"), await registry.get_meta("db")
    assert leader is not None and leader.id == A.id
    assert meta == ServiceMeta(data=2, index=second.index)


async def take(events: AsyncIterator[DiscoverdEvent], count: int) -> list[str]:
    taken = []
    async with asyncio.timeout(5):
        for _ in range(count):
            event = await anext(events)
            taken.append(f"{event.kind} {event.instance.addr if event.instance else '-'}")
    return taken


async def test_a_watch_tells_the_state_then_current_then_changes(registry: Registry) -> None:
    await registry.create("web")
    await registry.register("web", A)
    await registry.put_meta("web", ServiceMeta(data="m"))
    async with aclosing(registry.watch("web")) as events:
        assert await take(events, 4) == [f"up {A.addr}", f"leader {A.addr}", "service_meta -", "current -"]
        await registry.register("web", B)
        await registry.deregister("web", A.id)
        assert await take(events, 3) == [f"up {B.addr}", f"down {A.addr}", f"leader {B.addr}"]
        await registry.deregister("web", B.id)
        assert await take(events, 2) == [f"down {B.addr}", "leader -"]


async def test_a_service_that_does_not_exist_can_be_watched(registry: Registry) -> None:
    async with aclosing(registry.watch("later")) as events:
        assert await take(events, 1) == ["current -"]
        await registry.create("later")
        await registry.register("later", A)
        assert await take(events, 2) == [f"up {A.addr}", f"leader {A.addr}"]


async def test_leaders_are_watched(registry: Registry) -> None:
    async with aclosing(registry.watch_leader("web")) as changes:
        assert await anext(changes) is None
        async with registry.registered("web", A):
            leader = await anext(changes)
            assert leader is not None and leader.id == A.id
        assert await anext(changes) is None


async def test_a_kept_registration_comes_changes_and_goes(registry: Registry) -> None:
    async with aclosing(registry.watch("web")) as events, registry.registered("other", B):
        assert await take(events, 1) == ["current -"]
        async with registry.registered("web", A) as registration:
            assert await take(events, 2) == [f"up {A.addr}", f"leader {A.addr}"]
            await registration.set_meta({"ready": "yes"})
            changed = await anext(events)
            assert changed.kind is EventKind.UPDATE and changed.instance is not None
            assert changed.instance.meta == {"ready": "yes"}
        assert await take(events, 2) == [f"down {A.addr}", "leader -"]


async def test_what_fails_inside_a_registration_comes_out_as_it_was(registry: Registry) -> None:
    with pytest.raises(ZeroDivisionError):
        async with registry.registered("web", A):
            raise ZeroDivisionError
    assert await registry.instances("web") == []
