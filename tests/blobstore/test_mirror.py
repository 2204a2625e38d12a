"""Several instances: a successor takes everything over, and members keep each other up to date."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flynn.aio.clock import SystemClock
from flynn.aio.supervisor import TaskSet, supervisor
from flynn.blobstore.api import blobstore_api
from flynn.blobstore.client import Blobstore
from flynn.blobstore.mirror import SERVICE, Mirror
from flynn.blobstore.volume import VolumeBackend
from flynn.discoverd.memory import MemoryRegistry
from flynn.http.client import HttpClient
from flynn.http.server import listen
from flynn.identity import Identity
from flynn.identity.authority import ClusterCA
from flynn.types.instance import Instance


@dataclass
class Member:
    """One running instance."""

    blobs: Blobstore
    backend: VolumeBackend
    mirror: Mirror
    stack: AsyncExitStack = field(repr=False)

    async def stop(self) -> None:
        await self.stack.aclose()


class Cluster:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.registry = MemoryRegistry()
        ca = ClusterCA.create()
        ca.issue_job("blobstore", "web", "blobstore", []).write(directory / "own")
        ca.issue_job("gitreceive", "app", "", []).write(directory / "caller")
        self._own = Identity.load(directory / "own")
        self._caller = Identity.load(directory / "caller")
        self.members: list[Member] = []

    def connect(self, instance: Instance) -> HttpClient:
        return HttpClient(f"https://{instance.addr}", tls=self._own, server_name="blobstore.discoverd", timeout=2)

    async def start(self, volume: str, *, port: int = 0) -> Member:
        """Start an instance as the daemon does; returns when it would register."""
        stack = AsyncExitStack()
        backend = VolumeBackend(self._directory / volume)
        spawn = await stack.enter_async_context(supervisor())
        tasks = await stack.enter_async_context(TaskSet())
        late: list[Mirror] = []

        class Late:
            """The address is known only once the port is bound."""

            members = staticmethod(lambda: late[0].members())
            records = staticmethod(lambda: late[0].records())
            caught_up = staticmethod(lambda: late[0].caught_up())
            put = staticmethod(lambda name: late[0].put(name))
            delete = staticmethod(lambda name: late[0].delete(name))

        api = blobstore_api(backend, signing_key="", clock=SystemClock(), mirror=Late())  # type: ignore[arg-type]  # stands in
        address = await stack.enter_async_context(listen(api, "127.0.0.1", port, tls=self._own, require_client=False))
        own = Instance.at(f"127.0.0.1:{address[1]}", "https")
        mirror = Mirror(own, backend, self.connect, tasks)
        late.append(mirror)
        await stack.enter_async_context(self.registry.registered(SERVICE, own))
        spawn("follow", mirror.follow(self.registry))
        await mirror.catch_up(self.registry)
        http = await stack.enter_async_context(HttpClient(f"https://{own.addr}", tls=self._caller))
        member = Member(Blobstore(http), backend, mirror, stack)
        self.members.append(member)
        return member


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    for member in cluster.members:
        await member.stop()


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def content(member: Member) -> dict[str, bytes]:
    return {blob.name: await member.blobs.read(blob.name) for blob in await member.backend.records()}


async def test_a_successor_begins_with_everything_and_misses_nothing_written_meanwhile(cluster: Cluster) -> None:
    old = await cluster.start("old")
    expected = {}
    for n in range(20):
        expected[f"/dir {n}/a"] = str(n).encode()
        await old.blobs.put(f"/dir {n}/a", expected[f"/dir {n}/a"])
    await old.blobs.put("/empty", b"", content_type="text/x")
    expected["/empty"] = b""
    writing = True

    async def write() -> None:
        n = 0
        while writing:
            n += 1
            await old.blobs.put(f"/busy/{n % 7}", str(n).encode())
            expected[f"/busy/{n % 7}"] = str(n).encode()
            await asyncio.sleep(0)

    writer = asyncio.ensure_future(write())
    new = await cluster.start("new")
    await asyncio.sleep(0.05)
    writing = False
    await writer
    await old.stop()
    assert await content(new) == expected
    info = await new.blobs.find("/empty")
    assert info is not None and info.content_type == "text/x"


async def test_members_tell_each_other(cluster: Cluster) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    await one.blobs.put("/a", b"1")
    await two.blobs.put("/b", b"2")
    await one.blobs.copy("/b", "/c")
    await two.blobs.put("/a", b"3")
    expected = {"/a": b"3", "/b": b"2", "/c": b"2"}
    assert await content(one) == await content(two) == expected
    assert [(b.name, b.etag, b.modified) for b in await one.backend.records()] == [
        (b.name, b.etag, b.modified) for b in await two.backend.records()
    ]
    await two.blobs.delete("/a")
    assert await one.blobs.find("/a") is None


async def test_a_member_that_does_not_answer_gets_its_writes_later(cluster: Cluster) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    await one.blobs.put("/a", b"1")
    port = int(two.mirror._own.addr.rpartition(":")[2])
    # Killed: its registration stays behind until it expires.
    cluster.members.remove(two)
    registration = two.mirror._own
    await two.stop()
    await cluster.registry.register(SERVICE, registration)
    await eventually(lambda: one.mirror.members() == [registration.id])
    await one.blobs.put("/a", b"2")
    await one.blobs.put("/b", b"2")
    again = await cluster.start("two", port=port)
    assert await content(again) == {"/a": b"2", "/b": b"2"}


async def test_the_version_written_later_wins(cluster: Cluster, tmp_path: Path) -> None:
    one = await cluster.start("one")
    await one.blobs.put("/stale", b"old here")
    alone = Cluster(tmp_path / "elsewhere")
    other = await alone.start("../two")
    await other.blobs.put("/stale", b"newer there")
    await other.blobs.put("/fresh", b"old there")
    await other.stop()
    alone.members.clear()
    await one.blobs.put("/fresh", b"newer here")
    two = await cluster.start("two")
    assert await content(two) == {"/stale": b"newer there", "/fresh": b"newer here"}


async def test_a_store_with_data_does_not_wait_for_the_dead(cluster: Cluster) -> None:
    one = await cluster.start("one")
    await one.blobs.put("/a", b"1")
    dead = Instance.at("127.0.0.1:1", "https")
    await cluster.registry.create(SERVICE)
    await cluster.registry.register(SERVICE, dead)
    await one.stop()
    cluster.members.clear()
    async with asyncio.timeout(8):
        again = await cluster.start("one")
    assert await content(again) == {"/a": b"1"}
    waiting = asyncio.ensure_future(cluster.start("empty"))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    await cluster.registry.deregister(SERVICE, dead.id)
    assert await content(await waiting) == {"/a": b"1"}


async def test_a_member_that_was_cut_off_longer_than_its_registration_lives_misses_nothing(cluster: Cluster) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    await one.blobs.put("/both", b"1")
    cut_off = two.mirror._own
    await cluster.registry.deregister(SERVICE, cut_off.id)  # expired, as the majority sees it
    await eventually(lambda: one.mirror.members() == [])
    await one.blobs.put("/only/one", b"1")
    await one.blobs.put("/both", b"2")
    await two.backend.put("/only/two", _bytes(b"2"))  # acknowledged on the other side of the cut
    await cluster.registry.register(SERVICE, cut_off)
    expected = {"/both": b"2", "/only/one": b"1", "/only/two": b"2"}
    async with asyncio.timeout(10):
        while not (await content(one) == await content(two) == expected):
            await asyncio.sleep(0.05)


async def _bytes(content: bytes) -> AsyncIterator[bytes]:
    yield content
