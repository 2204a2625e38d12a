"""discoverd beside etcd: three members each on loopback, with TLS and synced writes; DNS beside dnsmasq.

Both are driven by one process in one event loop, over connections that stay open: a write goes to the leader, and the
clock stops when a watch at another member tells of it. Registering and deregistering alternate; both count as
operations, and the latency is that of registering.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Protocol

import uvloop

from bench import etcd
from bench.rows import Row, table
from flynn.discoverd.client import Discoverd
from flynn.http.client import HttpClient
from flynn.identity.authority import ClusterCA
from flynn.types.errors import ApiError, ObjectExists
from flynn.types.instance import EventKind, Instance, ServiceConfig
from tests.discoverd.harness import Place, loopback_address

SERVICE = "bench"
WRITES = {1: 600, 64: 3000}  # operations per round, by number of clients
ROUNDS = 3  # taken in turns, because the machine's speed changes under us
KILLS = 10
WRITE_EVERY = 0.02  # how finely the time without writes is measured
LIMIT = 60.0
DNS_PORT = 53
DNS_SECONDS = 5
DNS_SERVICES, DNS_INSTANCES = 100, 3
DNS_RATE = 2000  # queries/s at which latency is measured
CHURN_PER_SECOND = 50
VERSION = "etcd 3.4"


def rows() -> list[Row]:
    work = Path(tempfile.mkdtemp(prefix="flynn-bench-"))
    try:
        return uvloop.run(_measure(work))
    finally:
        shutil.rmtree(work, ignore_errors=True)


async def _measure(work: Path) -> list[Row]:
    ca = ClusterCA.create()
    addresses = [loopback_address() for _ in range(3)]
    async with _members(work / "ours", ca) as ours, etcd.running(work / "etcd", addresses, ca) as peer:
        return [*await _latencies(ours, peer), *await _names(work, ours), *await _kills(ours, peer)]


# Writes


class Client(Protocol):
    """Someone who registers and deregisters."""

    async def register(self, number: int) -> None: ...

    async def deregister(self, number: int) -> None: ...


class _Ours:
    def __init__(self, http: HttpClient) -> None:
        self._http = http

    async def register(self, number: int) -> None:
        instance = _instance(number)
        await self._http.put(f"/services/{SERVICE}/instances/{instance.id}", instance)

    async def deregister(self, number: int) -> None:
        await self._http.delete(f"/services/{SERVICE}/instances/{_instance(number).id}")


class _Etcd:
    def __init__(self, client: etcd.Client) -> None:
        self._client = client

    async def register(self, number: int) -> None:
        instance = _instance(number)
        value = json.dumps({"id": instance.id, "addr": instance.addr, "proto": "http", "meta": instance.meta}).encode()
        await self._client.put(_key(number), value)

    async def deregister(self, number: int) -> None:
        await self._client.delete(_key(number))


def _instance(number: int) -> Instance:
    address = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}:8080"
    return Instance.at(address, "http", {"FLYNN_APP_ID": "6d2a6ba2-8b22-4d5e-9a07-0f2a3c9d1e11"})


def _key(number: int) -> bytes:
    return f"/{SERVICE}/{_instance(number).id}".encode()


class _Seen:
    """What a watcher has been told, for those who wait for it."""

    def __init__(self) -> None:
        self.current = asyncio.Event()
        self._waiting: dict[str, asyncio.Future[None]] = {}

    def expect(self, number: int) -> asyncio.Future[None]:
        waiting = self._waiting[_instance(number).id] = asyncio.get_running_loop().create_future()
        return waiting

    def tell(self, identity: str) -> None:
        waiting = self._waiting.pop(identity, None)
        if waiting is not None:
            waiting.set_result(None)


async def _latencies(ours: Members, peer: etcd.Cluster) -> list[Row]:
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    async with AsyncExitStack() as stack:
        mine, theirs = await stack.enter_async_context(_watched(ours)), await stack.enter_async_context(_followed(peer))
        leader, chief = await ours.leader(), await peer.leader()
        clients: dict[int, tuple[list[Client], list[Client]]] = {}
        for count in WRITES:
            https = [await stack.enter_async_context(ours.http(leader)) for _ in range(count)]
            channel = await stack.enter_async_context(peer.client(chief))
            clients[count] = [_Ours(http) for http in https], [_Etcd(channel)] * count
        for count, writes in WRITES.items():
            for number in range(ROUNDS + 1):
                for name, group, seen in (("ours", clients[count][0], mine), ("peer", clients[count][1], theirs)):
                    figures = await _write(group, seen, writes // 10 if number == 0 else writes)
                    if number:  # the first opens the connections
                        found.setdefault((name, count), []).append(figures)
    return [row for count in WRITES for row in _rows_of(found[("ours", count)], found[("peer", count)], count)]


async def _write(clients: list[Client], seen: _Seen, writes: int) -> tuple[float, float, float]:
    """p50 and p99 in milliseconds of registering until it is seen, and operations per second."""
    took: list[float] = []
    numbers = itertools.count(1)

    async def work(client: Client) -> None:
        while len(took) < writes // 2:
            number = next(numbers)
            for act, measured in ((client.register, True), (client.deregister, False)):
                told = seen.expect(number)
                begin = time.perf_counter()
                done = asyncio.ensure_future(_done(act, number))
                await told
                if measured:
                    took.append((time.perf_counter() - begin) * 1000)
                await done

    begin = time.perf_counter()
    async with asyncio.timeout(LIMIT), asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(work(client))
    spent = time.perf_counter() - begin
    return statistics.median(took), statistics.quantiles(took, n=100)[-1], 2 * len(took) / spent


async def _done(act: Callable[[int], Awaitable[None]], number: int) -> None:
    """Do it, again if need be: on a machine without a free moment a leader may lose its majority."""
    while True:
        try:
            return await act(number)
        except (ApiError, etcd.Refused):
            await asyncio.sleep(0.05)


def _rows_of(ours: list[tuple[float, float, float]], peer: list[tuple[float, float, float]], count: int) -> list[Row]:
    who = "1 client" if count == 1 else f"{count} clients"
    mine, theirs = ([statistics.median(column) for column in zip(*one, strict=True)] for one in (ours, peer))
    return [
        Row(
            name=f"discoverd: register -> watcher sees it, {who}, p50", ours=mine[0], peer=theirs[0], unit="ms",
            budget=1.5 if count == 1 else None, against=f"{VERSION}, put -> watch",
        ),
        Row(
            name=f"discoverd: register -> watcher sees it, {who}, p99", ours=mine[1], peer=theirs[1], unit="ms",
            against=f"{VERSION}, put -> watch",
        ),
        Row(
            name=f"discoverd: registrations and removals, {who}", ours=mine[2], peer=theirs[2], unit="operations/s",
            against=VERSION,
        ),
    ]  # fmt: skip


@asynccontextmanager
async def _watched(ours: Members) -> AsyncIterator[_Seen]:
    """A watch at a member that does not lead."""
    leader = await ours.leader()
    place = next(place for place in ours.places if place is not leader)

    async def follow(seen: _Seen) -> None:
        async with place.client() as registry, aclosing(registry.watch(SERVICE)) as events:
            async for event in events:
                if event.kind is EventKind.CURRENT:
                    seen.current.set()
                elif event.instance is not None and event.kind in (EventKind.UP, EventKind.DOWN):
                    seen.tell(event.instance.id)

    async with ours.http(leader) as http:
        with suppress(ObjectExists):
            await http.put(f"/services/{SERVICE}", ServiceConfig())
    async with _following(follow) as seen:
        yield seen


@asynccontextmanager
async def _followed(peer: etcd.Cluster) -> AsyncIterator[_Seen]:
    leader = await peer.leader()
    address = next(address for address in peer.addresses if address != leader)

    async def follow(seen: _Seen) -> None:
        async with peer.client(address) as client:
            async for key in client.watch(f"/{SERVICE}/".encode()):
                if key is None:
                    seen.current.set()
                else:
                    seen.tell(key.decode().rpartition("/")[2])

    async with _following(follow) as seen:
        yield seen


@asynccontextmanager
async def _following(follow: Callable[[_Seen], Awaitable[None]]) -> AsyncIterator[_Seen]:
    seen = _Seen()
    task = asyncio.ensure_future(follow(seen))
    try:
        async with asyncio.timeout(LIMIT):
            await seen.current.wait()
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# Our members


class Members:
    """Three flynn-discoverd processes, each of which can be killed and started again."""

    def __init__(self, places: list[Place]) -> None:
        self.places = places
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    async def start(self, place: Place) -> None:
        self._processes[place.address] = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "flynn.discoverd.main", "-data-dir", str(place.directory / "data"), "-notify", "",
            "-dns-addr", f"{place.address}:{DNS_PORT}",
            env={
                "PATH": os.environ["PATH"],
                "EXTERNAL_IP": place.address,
                "DISCOVERD_PEERS": ",".join(one.http_address for one in self.places),
                "RAFT_KEY": "the secret of the bench",
                "FLYNN_IDENTITY": str(place.directory / "identity"),
                "FLYNN_HOST_KEY_FILE": str(place.directory / "host.key"),
            },
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    async def kill(self, place: Place) -> None:
        process = self._processes.pop(place.address)
        process.send_signal(signal.SIGKILL)
        await process.wait()

    def http(self, place: Place) -> HttpClient:
        return HttpClient(f"https://{place.http_address}", tls=place.identity, timeout=10)

    async def answers(self, place: Place) -> None:
        """Wait until a member takes part: it answers no request before it has replayed its log."""
        async with asyncio.timeout(LIMIT):
            while True:
                async with self.http(place) as http:
                    try:
                        await http.get("/raft/leader")
                        return
                    except ApiError:
                        await asyncio.sleep(0.05)

    async def leader(self) -> Place:
        async with asyncio.timeout(LIMIT):
            while True:
                for place in self.places:
                    if place.address not in self._processes:
                        continue
                    async with self.http(place) as http:
                        try:
                            named = await http.get("/raft/leader", answer=dict[str, str])
                        except ApiError:
                            continue
                    for one in self.places:
                        if one.http_address == named["host"] and one.address in self._processes:
                            return one
                await asyncio.sleep(0.05)

    async def close(self) -> None:
        for place in self.places:
            if place.address in self._processes:
                await self.kill(place)


@asynccontextmanager
async def _members(directory: Path, ca: ClusterCA) -> AsyncIterator[Members]:
    members = Members([Place(ca, directory / str(number)) for number in range(3)])
    try:
        for place in members.places:
            await members.start(place)
        for place in members.places:
            await members.answers(place)
        yield members
    finally:
        await members.close()


# A leader that dies


async def _kills(ours: Members, peer: etcd.Cluster) -> list[Row]:
    mine = [await _kill_ours(ours) for _ in range(KILLS)]
    theirs = [await _kill_theirs(peer) for _ in range(KILLS)]
    against = f"{VERSION} defaults"
    return [
        Row(
            name="discoverd: leader killed -> writes again, p50", ours=statistics.median(mine), unit="s",
            peer=statistics.median(theirs), against=against,
        ),
        Row(
            name=f"discoverd: leader killed -> writes again, worst of {KILLS}", ours=max(mine), unit="s", limit=1.5,
            budget=1.0, against="the limit",
        ),
        Row(
            name=f"the same, beside the worst of {VERSION}", ours=max(mine), unit="s", peer=max(theirs),
            against=against,
        ),
    ]  # fmt: skip


async def _kill_ours(ours: Members) -> float:
    leader = await ours.leader()
    async with AsyncExitStack() as stack:
        https = [await stack.enter_async_context(ours.http(place)) for place in ours.places if place is not leader]
        for http in https:
            await http.get("/raft/leader")

        async def write(number: int) -> None:
            await _Ours(https[number % 2]).register(number)

        await ours.kill(leader)
        took = await _until_written(write, (ApiError,))
    await ours.start(leader)
    await ours.answers(leader)
    return took


async def _kill_theirs(peer: etcd.Cluster) -> float:
    leader = await peer.leader()
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(peer.client(one)) for one in peer.addresses if one != leader]
        for client in clients:
            await client.get(b"connect")

        async def write(number: int) -> None:
            await _Etcd(clients[number % 2]).register(number)

        await peer.kill(leader)
        took = await _until_written(write, (etcd.Refused,))
    await peer.start(leader)
    await peer.answers(leader)
    return took


async def _until_written(write: Callable[[int], Awaitable[None]], refusals: tuple[type[Exception], ...]) -> float:
    """Seconds until a write is acknowledged. One sets out every few milliseconds, as one may hang where it began."""
    begin = time.perf_counter()
    written: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    tries: set[asyncio.Task[None]] = set()

    async def once(number: int) -> None:
        with suppress(*refusals):
            await write(number)
            if not written.done():
                written.set_result(time.perf_counter() - begin)

    try:
        async with asyncio.timeout(LIMIT):
            for number in itertools.count(1):
                tries.add(asyncio.ensure_future(once(number)))
                with suppress(TimeoutError):
                    return await asyncio.wait_for(asyncio.shield(written), WRITE_EVERY)
        raise AssertionError("not reached")
    finally:
        for task in tries:
            task.cancel()
        await asyncio.gather(*tries, return_exceptions=True)


# Names


async def _names(work: Path, ours: Members) -> list[Row]:
    """A records of services of three instances each, asked of one member while registrations come and go."""
    leader = await ours.leader()
    server = next(place for place in ours.places if place is not leader)
    queries = work / "queries"
    queries.write_text("".join(f"app{n}-web.discoverd A\n" for n in range(DNS_SERVICES)))
    async with leader.client() as registry:
        async with asyncio.timeout(LIMIT):
            for n in range(DNS_SERVICES):
                await registry.create(f"app{n}-web")
        async with _churn(registry), _dnsmasq(work) as address:
            await asyncio.sleep(1)
            figures = {}
            for who, at in (("ours", server.address), ("peer", address)):
                rate = await _dnsperf(at, queries, "-c", "4")
                figures[who] = rate[0], (await _dnsperf(at, queries, "-Q", str(DNS_RATE), "-v"))[1]
    against = "dnsmasq, same names from a file, nothing changes"
    return [
        Row(
            name=f"DNS: answers under {CHURN_PER_SECOND} changes/s", ours=figures["ours"][0], peer=figures["peer"][0],
            unit="answers/s", against=against,
        ),
        Row(
            name=f"DNS: p99 at {DNS_RATE} queries/s", ours=figures["ours"][1], peer=figures["peer"][1], unit="ms",
            against=against,
        ),
    ]  # fmt: skip


def _named(service: int, instance: int) -> Instance:
    return Instance.at(f"10.1.{service}.{instance + 1}:8080", "http")


@asynccontextmanager
async def _churn(registry: Discoverd) -> AsyncIterator[None]:
    """All instances keep their heartbeat, and some come and go all the time, as in a deploy."""
    for n in range(DNS_SERVICES):
        for i in range(DNS_INSTANCES):
            await registry.register(f"app{n}-web", _named(n, i))

    async def beat() -> None:
        while True:
            for n in range(DNS_SERVICES):
                for i in range(DNS_INSTANCES):
                    await registry.register(f"app{n}-web", _named(n, i))
                await asyncio.sleep(3 / DNS_SERVICES)

    async def change() -> None:
        for number in itertools.count():
            service, extra = f"app{number % DNS_SERVICES}-web", _named(number % DNS_SERVICES, DNS_INSTANCES)
            await registry.register(service, extra)
            await asyncio.sleep(1 / CHURN_PER_SECOND)
            await registry.deregister(service, extra.id)
            await asyncio.sleep(1 / CHURN_PER_SECOND)

    tasks = [asyncio.ensure_future(beat()), asyncio.ensure_future(change())]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()  # it has failed, so what was measured is not what was meant
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _dnsmasq(work: Path) -> AsyncIterator[str]:
    address = loopback_address()
    hosts = work / "hosts"
    hosts.write_text(
        "".join(
            f"{_named(n, i).host} app{n}-web.discoverd\n" for n in range(DNS_SERVICES) for i in range(DNS_INSTANCES)
        )
    )
    process = await asyncio.create_subprocess_exec(
        "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", f"--listen-address={address}",
        "--bind-interfaces", "--no-resolv", "--no-hosts", f"--addn-hosts={hosts}", "--local-ttl=0",
        f"--pid-file={work / 'dnsmasq.pid'}", stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield address
    finally:
        process.terminate()
        await process.wait()


async def _dnsperf(address: str, queries: Path, *flags: str) -> tuple[float, float]:
    """Answers per second, and the 99th percentile in milliseconds if `-v` lists the answers. All have to be good."""
    process = await asyncio.create_subprocess_exec(
        "dnsperf", "-s", address, "-p", str(DNS_PORT), "-d", str(queries), "-l", str(DNS_SECONDS), *flags,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    async with asyncio.timeout(LIMIT):
        output, _ = await process.communicate()
    report = output.decode()
    rate = re.search(r"Queries per second:\s+([\d.]+)", report)
    lost = re.search(r"Queries lost:\s+(\d+)", report)
    codes = re.search(r"Response codes:\s+(.*)", report)
    if rate is None or lost is None or codes is None or int(lost[1]) or "(100.00%)" not in codes[1]:
        raise RuntimeError(f"queries failed:\n{report[-2000:]}")
    took = sorted(float(found) * 1000 for found in re.findall(r"^> NOERROR \S+ \S+ ([\d.]+)$", report, re.MULTILINE))
    return float(rate[1]), took[len(took) * 99 // 100] if took else 0.0


if __name__ == "__main__":
    print(table(rows()))
