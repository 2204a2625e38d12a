"""Members together and members alone: commits, elections, restarts, snapshots. Real sockets, real files."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack, aclosing
from datetime import timedelta
from pathlib import Path

import pytest

from flynn.aio.clock import SystemClock
from flynn.aio.supervisor import supervisor
from flynn.discoverd import expiry
from flynn.discoverd.api import DiscoverdApi
from flynn.discoverd.directory import LiveDirectory
from flynn.discoverd.raft.node import ELECTION_TIMEOUT
from flynn.http.client import HttpClient, KeyAuth
from flynn.http.server import listen
from flynn.identity.authority import ClusterCA
from flynn.types.errors import ApiError, ObjectExists
from flynn.types.instance import EventKind, Instance, ServiceMeta
from tests.discoverd.harness import Place, member, until

A, B = Instance.at("10.0.0.1:80", "http"), Instance.at("10.0.0.2:80", "http")


async def test_everything_acknowledged_is_there_after_a_restart(place: Place) -> None:
    async with member(place) as live, place.client() as client:
        await client.create("web")
        await client.register("web", A)
        meta = await client.put_meta("web", ServiceMeta(data={"n": 1}))
        before = live.state
    async with member(place) as live, place.client() as client:
        assert live.state.services == before.services
        assert await client.get_meta("web") == meta
        assert (await client.put_meta("web", ServiceMeta(data=2, index=meta.index))).index > meta.index


async def test_a_snapshot_replaces_the_log(place: Place) -> None:
    async with member(place) as live, place.client() as client:
        await client.create("web")
        for n in range(20):
            await client.register("web", Instance.at(f"10.0.0.{n}:80", "http"))
        live.raft._member.forceLogCompaction()
        await client.register("web", Instance.at("10.9.9.9:80", "http"))
        await until(lambda: len(live.raft._member.journal) < 10)
        await client.register("web", Instance.at("10.9.9.8:80", "http"))
        before = live.state.services
    async with member(place) as live:
        assert live.state.services == before


async def test_a_crash_between_snapshot_and_shorter_log_loses_nothing(place: Place) -> None:
    log = place.directory / "data" / "raft.log"
    async with member(place) as live, place.client() as client:
        await client.create("web")
        for n in range(10):
            await client.register("web", Instance.at(f"10.0.0.{n}:80", "http"))
        long_log = log.read_bytes()
        live.raft._member.forceLogCompaction()
        await client.register("web", A)
        await until(lambda: (place.directory / "data" / "snapshot").exists())
        await until(lambda: log.stat().st_size < len(long_log))
        snapshot = (place.directory / "data" / "snapshot").read_bytes()
        await client.register("web", B)
        before = live.state.services
        newer = log.read_bytes()
    # As if the process had died after the snapshot was in place, with the log still long and growing.
    tail = newer[8:]
    long_entries = long_log[8:]
    overlap = next(n for n in range(len(tail), 0, -1) if long_entries.endswith(tail[:n]) and n > 24)
    log.write_bytes(long_log + tail[overlap:])
    (place.directory / "data" / "snapshot").write_bytes(snapshot)
    async with member(place) as live:
        assert live.state.services == before


@pytest.mark.slow
async def test_silent_instances_expire_and_talking_ones_stay(place: Place) -> None:
    async with member(place, ttl=timedelta(seconds=1.5)), place.client() as client:
        await client.create("web")
        await client.register("web", A)
        await client.register("web", B)
        async with aclosing(client.watch("web")) as events:
            async with asyncio.timeout(8):
                async for event in events:
                    if event.kind is EventKind.CURRENT:
                        break
                talking = asyncio.ensure_future(_talk(client, B))
                try:
                    gone = [await anext(events), await anext(events)]
                finally:
                    talking.cancel()
        assert [(event.kind, event.instance and event.instance.id) for event in gone] == [
            (EventKind.DOWN, A.id),
            (EventKind.LEADER, B.id),
        ]


@pytest.mark.slow
async def test_nobody_expires_at_the_moment_of_registration(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registration is there as soon as it is committed, which is before whoever asked for it is told."""
    monkeypatch.setattr(expiry, "CHECK_EVERY", timedelta(milliseconds=1))
    loop = asyncio.get_running_loop()
    registered: dict[str, float] = {}
    lived: list[float] = []
    async with member(place, ttl=timedelta(seconds=1)) as live, place.client() as client, supervisor() as spawn:
        await client.create("web")

        async def note_departures() -> None:
            async with aclosing(live.watch("web")) as events:
                async for event in events:
                    if event.kind is EventKind.DOWN and event.instance is not None:
                        lived.append(loop.time() - registered[event.instance.id])

        spawn("note departures", note_departures())
        await asyncio.sleep(1.1)  # from now on nobody profits from the grace of a new leader
        for n in range(200):
            one = Instance.at(f"10.0.{n}.1:80", "http")
            registered[one.id] = loop.time()
            await live.put_instance("web", one)
        await until(lambda: len(lived) == len(registered))
    assert min(lived) > 0.9


class Interrupted(SystemClock):
    """A machine that was suspended, or a process that was stopped: suddenly it is much later."""

    lost = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.lost


@pytest.mark.slow
async def test_a_leader_that_was_stopped_itself_does_not_blame_the_others(place: Place) -> None:
    clock = Interrupted()
    async with member(place, ttl=timedelta(seconds=2), clock=clock), place.client() as client:
        await client.create("web")
        await client.register("web", A)
        clock.lost = 60
        await asyncio.sleep(1.5)
        assert [one.id for one in await client.instances("web")] == [A.id]
        async with asyncio.timeout(6):
            while await client.instances("web"):
                await asyncio.sleep(0.1)


async def _talk(client, instance: Instance) -> None:  # type: ignore[no-untyped-def]
    while True:
        await client.register("web", instance)
        await asyncio.sleep(0.3)


@pytest.fixture
def three(ca: ClusterCA, tmp_path: Path) -> list[Place]:
    places = []
    for n in range(3):
        (tmp_path / str(n)).mkdir()
        places.append(Place(ca, tmp_path / str(n)))
    return places


async def leader_among(members: list[LiveDirectory], limit: float = 10) -> LiveDirectory:
    await until(lambda: any(one.leading for one in members), limit)
    return next(one for one in members if one.leading)


async def written(place: Place, service: str) -> None:
    """Write through a member whoever leads: a follower sends the client on."""
    async with place.client() as client:
        await client.create(service)


async def operator_writes_at(place: Place, live: LiveDirectory) -> None:
    """With the host's key on loopback there is no certificate to be redirected with."""
    api = DiscoverdApi(live, place.http_address, place.identity, lambda: None).build()
    async with listen(api, "127.0.0.1", 0, key="key") as (ip, port):
        async with HttpClient(f"http://{ip}:{port}", auth=KeyAuth("key")) as http:
            await http.put("/services/by-operator", {"leader_type": "manual"})
            meta = await http.put("/services/by-operator/meta", {"data": [1], "index": 0}, answer=ServiceMeta)
            assert meta.data == [1] and meta.index > 0
            with pytest.raises(ObjectExists):
                await http.put("/services/by-operator", {})
            await http.delete("/services/by-operator")


@pytest.mark.slow
async def test_three_members_replicate_elect_and_catch_up(three: list[Place]) -> None:
    async with AsyncExitStack() as all_of_them:
        stacks = [await all_of_them.enter_async_context(AsyncExitStack()) for _ in three]
        members = [
            await stack.enter_async_context(member(place, three)) for place, stack in zip(three, stacks, strict=True)
        ]
        leader = await leader_among(members)
        for place in three:
            await written(place, f"by-{place.address.replace('.', '-')}")
        await until(lambda: all(len(one.state.services) == 3 for one in members))

        follower = next(one for one in members if one is not leader)
        await operator_writes_at(three[members.index(follower)], follower)

        gone = members.index(leader)
        rest = [one for one in members if one is not leader]
        before = asyncio.get_running_loop().time()
        await stacks[gone].aclose()
        survivor = three[members.index(rest[0])]
        async with asyncio.timeout(5):
            while True:
                try:
                    await written(survivor, "after-the-loss")
                    break
                except ApiError:
                    continue
        assert asyncio.get_running_loop().time() - before < 4  # includes the orderly stop of the old leader
        await until(lambda: all("after-the-loss" in one.state.services for one in rest))

        back = await stacks[gone].enter_async_context(member(three[gone], three))
        await until(lambda: "after-the-loss" in back.state.services and len(back.state.services) == 4)


@pytest.mark.slow
async def test_a_cluster_of_one_grows_and_remembers_it(three: list[Place]) -> None:
    first, second, _ = three
    async with AsyncExitStack() as running:
        alone = await running.enter_async_context(AsyncExitStack())
        founder = await alone.enter_async_context(member(first))
        await written(first, "before")
        joined = await running.enter_async_context(member(second, [first, second]))
        async with first.http() as http:
            await http.put(f"/raft/peers/{second.http_address}")
        await until(lambda: "before" in joined.state.services)
        assert founder.raft.members == joined.raft.members
        await alone.aclose()
        # The founder's configuration still says that it is alone; on its own it must not think so.
        again = await alone.enter_async_context(member(first, [first]))
        assert len(again.raft.members) == 2
        await leader_among([again, joined])
        await written(first, "after")
        await until(lambda: all("after" in one.state.services for one in (again, joined)))


class Held:
    """A member that the others cannot reach for a while; its watchers can, and stay connected.

    Its Raft thread stands still, and what was sent to it meanwhile is lost with the connections.
    """

    def __init__(self, live: LiveDirectory) -> None:
        self._member = live.raft._member
        self._tick = self._member.doTick
        self._held = threading.Event()
        self._go_on = threading.Event()

    async def __aenter__(self) -> None:
        def wait(patience: float) -> None:
            self._held.set()
            self._go_on.wait(30)
            self._tick(patience)

        self._member.doTick = wait
        await until(self._held.is_set)

    async def __aexit__(self, *error: object) -> None:
        self._member.doTick = self._tick
        for connection in list(self._member._SyncObj__transport._connections.values()):
            connection.disconnect()
        self._go_on.set()


@pytest.mark.slow
async def test_a_member_that_is_sent_a_snapshot_tells_its_watchers_what_they_missed(three: list[Place]) -> None:
    async with AsyncExitStack() as stack:
        members = [await stack.enter_async_context(member(place, three)) for place in three]
        leader = await leader_among(members)
        behind = next(one for one in members if one is not leader)
        leaving, changing, staying, coming = (Instance.at(f"10.0.0.{n}:80", "http") for n in range(1, 5))
        changed = Instance.at(changing.addr, "http", {"version": "2"})
        heard: list[tuple[str, str]] = []
        async with three[members.index(leader)].client() as client, supervisor() as spawn:
            await client.create("web")
            for one in (leaving, changing, staying):
                await client.register("web", one)
            await client.put_meta("web", ServiceMeta(data="before"))
            await until(lambda: behind.state.index == leader.state.index)

            async def listen() -> None:
                async with aclosing(behind.watch("web")) as events:
                    async for event in events:
                        what = (
                            event.instance.addr
                            if event.instance
                            else str(event.service_meta and event.service_meta.data)
                        )
                        heard.append((str(event.kind), what))

            spawn("listen", listen())
            await until(lambda: any(kind == "current" for kind, _ in heard))
            heard.clear()
            async with Held(behind):
                await client.deregister("web", leaving.id)
                for round in range(30):  # many steps, of which watchers hear the sum
                    await client.register("web", Instance.at(changing.addr, "http", {"version": f"1.{round}"}))
                await client.register("web", changed)
                await client.register("web", coming)
                meta = await client.get_meta("web")
                assert meta is not None
                await client.put_meta("web", ServiceMeta(data="after", index=meta.index))
                long = len(leader.raft._member.journal)
                leader.raft._member.forceLogCompaction()
                await client.create("wakes-the-thread")
                await until(lambda: len(leader.raft._member.journal) < min(long, 10))
                held_at = behind.state.index
            await until(lambda: behind.state.services == leader.state.services)
            await until(lambda: ("service_meta", "after") in heard)
        assert held_at < leader.state.index - 30
        assert heard == [
            ("update", changed.addr),
            ("up", coming.addr),
            ("down", leaving.addr),
            ("leader", changed.addr),
            ("service_meta", "after"),
        ]


@pytest.mark.slow
async def test_a_member_that_stood_still_or_was_cut_off_comes_back_without_an_election(three: list[Place]) -> None:
    async with AsyncExitStack() as stack:
        members = [await stack.enter_async_context(member(place, three)) for place in three]
        leader = await leader_among(members)
        away = next(one for one in members if one is not leader)
        await written(three[members.index(leader)], "before")
        term = leader.raft._member.raftCurrentTerm
        for number in range(5):
            async with Held(away):
                await asyncio.sleep(2 * ELECTION_TIMEOUT[1])
                await written(three[members.index(leader)], f"while-away-{number}")
            await until(lambda: away.state.index == leader.state.index)
        assert leader.leading
        assert {one.raft._member.raftCurrentTerm for one in members} == {term}
