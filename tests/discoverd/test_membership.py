"""Members and observers: promoted, demoted, removed while away, cut off. Real sockets, real files."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from flynn.aio.supervisor import supervisor
from flynn.discoverd import standing
from flynn.discoverd.directory import LiveDirectory
from flynn.identity.authority import ClusterCA
from flynn.types.errors import ApiError, Conflict
from flynn.types.instance import EventKind, Instance
from tests.discoverd.harness import Place, member, until

pytestmark = pytest.mark.slow


@dataclass
class Running:
    place: Place
    live: LiveDirectory
    stack: AsyncExitStack

    async def post(self, path: str) -> None:
        async with self.place.http() as http:
            await http.call("POST", path, timeout=60.0)

    async def create(self, service: str, within: float = 5) -> None:
        async with asyncio.timeout(within), self.place.client() as client:
            while True:
                try:
                    await client.create(service)
                    return
                except ApiError:
                    await asyncio.sleep(0.05)

    def knows(self, service: str) -> bool:
        return service in self.live.state.services


class Lab:
    def __init__(self, ca: ClusterCA, directory: Path, stack: AsyncExitStack) -> None:
        self._ca, self._directory, self._stack = ca, directory, stack

    def places(self, count: int) -> list[Place]:
        return [Place(self._ca, self._directory / f"n{number}") for number in range(count)]

    async def start(self, place: Place, members: list[Place]) -> Running:
        stack = await self._stack.enter_async_context(AsyncExitStack())
        return Running(place, await stack.enter_async_context(member(place, members)), stack)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with AsyncExitStack() as stack:
        yield Lab(ClusterCA.create(), tmp_path, stack)


async def leading(*nodes: Running) -> Running:
    async with asyncio.timeout(10):
        while True:
            for node in nodes:
                if node.live.leading:
                    return node
            await asyncio.sleep(0.02)


@asynccontextmanager
async def watched(node: Running, service: str) -> AsyncIterator[list[tuple[EventKind, str]]]:
    """What a watcher at `node` hears of `service`."""
    heard: list[tuple[EventKind, str]] = []

    async def listen() -> None:
        async with node.place.client() as client, aclosing(client.watch(service)) as events:
            async for event in events:
                heard.append((event.kind, event.instance.addr if event.instance else ""))

    async with supervisor() as spawn:
        spawn("listen", listen())
        yield heard


async def test_an_observer_knows_all_and_sends_writes_to_the_leader(lab: Lab) -> None:
    one, two = lab.places(2)
    founder = await lab.start(one, [one])
    await founder.create("before")
    observer = await lab.start(two, [one])
    await until(lambda: observer.knows("before"))
    await observer.create("through-the-observer")
    await until(lambda: observer.knows("through-the-observer"))
    assert not observer.live.raft.is_member
    assert founder.live.raft.members == observer.live.raft.members == [founder.live.raft.members[0]]


async def test_promoted_and_demoted_without_a_watcher_noticing(lab: Lab) -> None:
    one, two = lab.places(2)
    founder, observer = await lab.start(one, [one]), await lab.start(two, [one])
    await leading(founder)
    async with two.client() as client:
        await client.create("web")
        await client.register("web", Instance.at("10.0.0.1:80", "http"))
        await until(lambda: observer.knows("web"))
        async with watched(observer, "web") as heard:
            await until(lambda: (EventKind.CURRENT, "") in heard)
            await observer.post("/raft/promote")
            assert observer.live.raft.is_member
            assert len(founder.live.raft.members) == 2
            await client.register("web", Instance.at("10.0.0.2:80", "http"))
            await until(lambda: (EventKind.UP, "10.0.0.2:80") in heard)

            await observer.post("/raft/demote")
            assert not observer.live.raft.is_member
            assert len(founder.live.raft.members) == 1
            await client.register("web", Instance.at("10.0.0.3:80", "http"))
            await until(lambda: (EventKind.UP, "10.0.0.3:80") in heard)
            assert [kind for kind, _ in heard if kind is EventKind.DOWN] == []
            assert len(heard) == len(set(heard))


async def test_both_roles_are_remembered(lab: Lab) -> None:
    one, two = lab.places(2)
    founder, second = await lab.start(one, [one]), await lab.start(two, [one])
    await leading(founder)
    await second.post("/raft/promote")
    await second.stack.aclose()
    second = await lab.start(two, [one])
    assert second.live.raft.is_member
    await founder.create("with-both")
    await until(lambda: second.knows("with-both"))
    await second.post("/raft/demote")
    await second.stack.aclose()
    second = await lab.start(two, [one, two])  # whatever the configuration says
    assert not second.live.raft.is_member
    await founder.create("alone-again")
    await until(lambda: second.knows("alone-again"))


async def test_the_leader_itself_is_demoted(lab: Lab) -> None:
    places = lab.places(3)
    nodes = [await lab.start(place, places) for place in places]
    leader = await leading(*nodes)
    await leader.create("before")
    await leader.post("/raft/demote")
    rest = [node for node in nodes if node is not leader]
    successor = await leading(*rest)
    assert len(successor.live.raft.members) == 2
    await leader.create("after")
    await until(lambda: all(node.knows("after") and node.knows("before") for node in nodes))


async def test_the_only_member_stays(lab: Lab) -> None:
    (one,) = lab.places(1)
    founder = await lab.start(one, [one])
    await leading(founder)
    with pytest.raises(Conflict):
        await founder.post("/raft/demote")
    assert founder.live.raft.is_member


async def test_a_promotion_that_fails_leaves_an_observer_and_no_phantom(lab: Lab) -> None:
    places = lab.places(3)
    first, second = [await lab.start(place, places[:2]) for place in places[:2]]
    await leading(first, second)
    observer = await lab.start(places[2], places[:2])
    await observer.create("before")
    await second.stack.aclose()
    await until(lambda: first.live.raft.leader is None)
    with pytest.raises(ApiError):
        async with asyncio.timeout(60):
            await observer.post("/raft/promote")
    assert not observer.live.raft.is_member
    assert observer.knows("before")
    again = await lab.start(places[1], places[:2])
    await leading(first, again)
    await first.create("after")
    await until(lambda: observer.knows("after"))
    assert len(first.live.raft.members) == 2


async def test_who_is_cut_off_says_how_stale_it_is_and_keeps_what_it_knows(lab: Lab) -> None:
    places = lab.places(3)
    nodes = [await lab.start(place, places) for place in places]
    await leading(*nodes)
    last = nodes[0]
    async with last.place.client() as client:
        await client.create("web")
        await client.register("web", Instance.at("10.0.0.1:80", "http"))
    await until(lambda: bool(last.live.state.services["web"].instances))
    async with last.place.http() as http:
        async with http.download("/services/web/instances") as (headers, _):
            assert "Discoverd-Stale" not in headers
        for node in nodes[1:]:
            await node.stack.aclose()
        await until(lambda: last.live.raft.silence > 3.5)
        async with http.download("/services/web/instances") as (headers, _):
            assert int(headers["Discoverd-Stale"]) >= 3
    assert last.live.state.services["web"].instances  # nobody was declared down meanwhile


async def test_a_new_node_in_place_of_a_removed_member_observes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration still names it as one of the first members: it calls elections until it knows better."""
    places = lab.places(3)
    nodes = [await lab.start(place, places) for place in places]
    leader = await leading(*nodes)
    lost = next(node for node in nodes if node is not leader)
    await lost.stack.aclose()
    async with leader.place.http() as http:
        await http.delete(f"/raft/peers/{lost.place.http_address}")
    for entry in lost.place.directory.iterdir():
        if entry.name != "identity":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    monkeypatch.setattr(standing, "SILENCE", 4.0)
    back = await lab.start(lost.place, places)
    async with supervisor() as spawn:
        spawn("keep", standing.keep(back.live, lost.place.identity))
        await until(lambda: not back.live.raft.is_member)
        await leader.create("afterwards")
        await until(lambda: back.knows("afterwards"))
        await back.post("/raft/promote")
        await back.create("by-a-member")
        await until(lambda: all(node.knows("by-a-member") for node in (leader, back)))


async def test_who_was_removed_while_away_observes_when_it_is_back(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "SILENCE", 1.0)
    places = lab.places(3)
    nodes = [await lab.start(place, places) for place in places]
    leader = await leading(*nodes)
    lost = next(node for node in nodes if node is not leader)
    await lost.stack.aclose()
    async with leader.place.http() as http:
        await http.delete(f"/raft/peers/{lost.place.http_address}")
    back = await lab.start(lost.place, places)
    async with supervisor() as spawn:
        spawn("keep", standing.keep(back.live, lost.place.identity))
        await until(lambda: not back.live.raft.is_member)
        await leader.create("afterwards")
        await until(lambda: back.knows("afterwards"))
