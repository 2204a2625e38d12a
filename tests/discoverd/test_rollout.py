"""A release of discoverd goes over the nodes one by one, while the directory is written, watched, asked for names."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from dnslib import DNSRecord

from flynn.aio.supervisor import supervisor
from flynn.discoverd.client import Discoverd
from flynn.http.client import HttpClient
from flynn.identity.authority import ClusterCA
from flynn.types.codec import builtins, replace
from flynn.types.errors import ApiError
from flynn.types.instance import DiscoverdEvent, EventKind, Instance, ServiceMeta
from flynn.types.rollout import Rollout, RolloutState
from flynn.types.status import StatusDocument
from tests.discoverd.harness import Place, Process

WEB = Instance.at("10.0.0.1:80", "http")
DNS_PORT = 5300
ONE, TWO = "10.0.0.1:1111", "10.0.0.2:1111"
PERFORMING, DONE = RolloutState.PERFORMING, RolloutState.DONE


def test_one_node_at_a_time() -> None:
    rollout = Rollout(id="d", release="r2")
    first = rollout.performed_by(ONE)
    assert first is not None and first.states == {ONE: PERFORMING}
    assert first.performed_by(ONE) == first, "who was interrupted may go on"
    assert first.performed_by(TWO) is None
    second = first.done_by(ONE).performed_by(TWO)
    assert second is not None and second.states == {ONE: DONE, TWO: PERFORMING}


@pytest.mark.parametrize(
    ("own", "holder", "wanted"),
    [("r2", "r1", True), ("r1", "r2", False), ("r2", "r2", False), ("", "r1", False), ("r3", "r1", False)],
)
def test_who_takes_over_from_whom(own: str, holder: str, wanted: bool) -> None:
    assert Rollout(id="d", release="r2").wants(own, instead_of=holder) is wanted


@dataclass
class Load:
    """What users of the directory go through meanwhile."""

    places: list[Place]
    writes: list[float] = field(default_factory=list)  # seconds each took
    names: int = 0
    unanswered: list[str] = field(default_factory=list)
    heard: list[DiscoverdEvent] = field(default_factory=list)
    busy: bool = True

    async def write(self) -> None:
        """A counter that only grows by one: no acknowledged write is lost, none is applied twice."""
        loop = asyncio.get_running_loop()
        async with Discoverd.connect(
            [place.http_address for place in self.places], identity=self.places[0].identity
        ) as client:
            await client.create("counter")
            meta = await client.put_meta("counter", ServiceMeta(data=0))
            while self.busy:
                before = loop.time()
                try:
                    meta = await client.put_meta("counter", replace(meta, data=meta.data + 1))
                except ApiError:
                    # A try whose answer was lost, and that had been written.
                    now = await client.get_meta("counter")
                    assert now is not None and now.data == meta.data + 1
                    meta = now
                self.writes.append(loop.time() - before)
        await asyncio.Event().wait()

    async def ask(self, place: Place) -> None:
        """Ask the name server of one node all the time, by datagram and without a second try."""
        loop = asyncio.get_running_loop()
        question = DNSRecord.question("web.discoverd").pack()
        while True:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.connect((place.address, DNS_PORT))
                try:
                    sock.send(question)
                    async with asyncio.timeout(2):
                        reply = DNSRecord.parse(await loop.sock_recv(sock, 4096))
                    if [str(record.rdata) for record in reply.rr] != ["10.0.0.1"]:
                        self.unanswered.append(f"{place.address}: {reply}")
                except (OSError, TimeoutError) as error:
                    self.unanswered.append(f"{place.address}: {error!r}")
            self.names += 1
            await asyncio.sleep(0.01)

    async def watch(self) -> None:
        async with self.places[0].client() as client, aclosing(client.watch("web")) as events:
            async for event in events:
                self.heard.append(event)


@asynccontextmanager
async def loaded(places: list[Place]) -> AsyncIterator[Load]:
    load = Load(places)
    async with supervisor() as spawn, places[0].client() as client, client.registered("web", WEB):
        await until(lambda: client.instances("web"))
        for place in places:
            await until(lambda place=place: _answers(place))  # type: ignore[misc]
        spawn("write", load.write())
        spawn("watch", load.watch())
        for place in places:
            spawn(f"ask {place.address}", load.ask(place))
        yield load


async def _answers(place: Place) -> bool:
    async with place.client() as client:
        return bool(await client.instances("web"))


async def until(condition: Any, limit: float = 30.0) -> None:
    async with asyncio.timeout(limit):
        while True:
            try:
                if await condition():
                    return
            except ApiError:
                pass
            await asyncio.sleep(0.05)


def a_process(place: Place, places: list[Place], release: str) -> Process:
    environ = {
        "FLYNN_RELEASE_ID": release,
        "FLYNN_JOB_ID": f"{place.address}-{release}",
        "RAFT_KEY": "secret of the test",
        "DISCOVERD_PEERS": ",".join(one.http_address for one in places),
    }
    return Process(place, "-notify", "", "-dns-addr", f"{place.address}:{DNS_PORT}", environ=environ)


async def detail(place: Place) -> dict[str, str]:
    async with HttpClient(f"https://{place.http_address}", tls=place.identity, timeout=3) as http:
        answer: dict[str, str] = (await http.get("/.well-known/status", answer=StatusDocument)).data.detail
        return answer


async def begin(places: list[Place], rollout: Rollout) -> None:
    async with places[0].client() as client:
        meta = await client.get_meta("discoverd") or ServiceMeta()
        await client.put_meta("discoverd", ServiceMeta(data=builtins(rollout), index=meta.index))


async def states(places: list[Place]) -> list[str]:
    async with places[0].client() as client:
        meta = await client.get_meta("discoverd")
        return sorted((meta.data if meta else {}).get("states", {}).values())


@pytest.fixture
def places(ca: ClusterCA, tmp_path: Path) -> list[Place]:
    for n in range(3):
        (tmp_path / str(n)).mkdir()
    return [Place(ca, tmp_path / str(n)) for n in range(3)]


@pytest.mark.slow
async def test_three_nodes_are_replaced_one_by_one_under_load(places: list[Place]) -> None:
    async with AsyncExitStack() as stack:
        old = [await stack.enter_async_context(a_process(place, places, "r1")) for place in places]
        load = await stack.enter_async_context(loaded(places))
        await until(lambda: _true(len(load.writes) > 20))
        await begin(places, Rollout(id="d1", release="r2"))
        new = [await stack.enter_async_context(a_process(place, places, "r2")) for place in places]
        seen: set[tuple[str, ...]] = set()

        async def finished() -> bool:
            seen.add(tuple(await states(places)))
            return await states(places) == ["done"] * 3

        await until(finished, 60)
        assert all(one.count("performing") <= 1 for one in seen), seen
        assert [(await detail(place))["release"] for place in places] == ["r2"] * 3
        written = len(load.writes)
        await until(lambda: _true(len(load.writes) > written + 20))
        for process in old:
            assert await process.stop() in (0, -signal.SIGTERM), "it stood by, or was about to, and goes at once"
        written = len(load.writes)
        await until(lambda: _true(len(load.writes) > written + 20))
        print(f"{len(load.writes)} writes, the longest {max(load.writes):.2f} s; {load.names} names")
        assert load.unanswered == []
        assert max(load.writes) < 6
        assert [event.kind for event in load.heard] == [EventKind.UP, EventKind.LEADER, EventKind.CURRENT]
        async with places[0].client() as client:
            jobs = {one.meta["FLYNN_JOB_ID"] for one in await client.instances("discoverd")}
        assert jobs == {f"{place.address}-r2" for place in places}
        load.busy = False
        for process in new:
            assert process.running


async def _true(value: bool) -> bool:
    return value


@pytest.mark.slow
async def test_a_successor_that_dies_is_followed_by_the_process_before_it(place: Place) -> None:
    places = [place]
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(a_process(place, places, "r1"))
        load = await stack.enter_async_context(loaded(places))
        await until(lambda: _true(len(load.writes) > 20))
        await begin(places, Rollout(id="d1", release="r2"))
        new = await stack.enter_async_context(a_process(place, places, "r2"))
        await until(lambda: _true_release(place, "r2"), 40)
        await new.kill()
        await until(lambda: _true_release(place, "r1"), 40)
        written = len(load.writes)
        await until(lambda: _true(len(load.writes) > written + 20))
        assert old.running
        load.busy = False
        assert [event.kind for event in load.heard] == [EventKind.UP, EventKind.LEADER, EventKind.CURRENT]


async def _true_release(place: Place, release: str) -> bool:
    return (await detail(place))["release"] == release


@pytest.mark.slow
async def test_who_is_no_successor_stands_by_until_the_place_is_free(place: Place) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(a_process(place, [place], "r1"))
        await until(lambda: _true_release(place, "r1"))
        second = await stack.enter_async_context(a_process(place, [place], "r0"))
        await begin([place], Rollout(id="d1", release="r2"))
        await asyncio.sleep(1)
        assert (await detail(place))["release"] == "r1"
        await first.kill()
        await until(lambda: _true_release(place, "r0"))
        assert second.running
