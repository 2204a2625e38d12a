"""PostgreSQL whose primary is killed: three flynn-postgres peers beside three Patroni members.

Both carry the same load: pgbench at a fixed rate, begun again whenever its connections have died, since it follows
nobody, and four witnesses, who insert numbers, one after the other, wherever libpq finds a server that takes writes,
and remember what was acknowledged, which pgbench does not. `kill -9` takes the primary's daemon and its server at once,
as when a container or its machine dies. The gap is the longest time in which no witness was acknowledged anything.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from asyncio.subprocess import DEVNULL
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import psycopg
from psycopg import AsyncConnection

from bench import patroni
from bench.rows import Row
from flynn.aio.supervisor import supervisor
from tests.appliances.postgresql import cluster as peers
from tests.appliances.postgresql.cluster import until
from tests.appliances.postgresql.conftest import BIN

KILLS = 10
KILLS_SYNCHRONOUS = 3  # of Patroni once more, with the mode in which it does not lose writes either
WITNESSES = 4
PGBENCH = ("--no-vacuum", "--client=4", "--rate=200", "--time=3600")  # of its transactions, TPC-B (sort of)
PGBENCH_SCALE = 10
PGBENCH_AGAIN = 0.2  # seconds
COMMIT_SECONDS = 3.0  # a client that is not answered so long tries another connection
CALM = 1.0  # seconds of undisturbed load before a kill
RECOVERY_SECONDS = 180.0
LONGEST = 5.0  # seconds, our budget
PEER = "Patroni 3.0"


class Node(Protocol):
    async def kill(self) -> None: ...

    async def start(self) -> None: ...


@dataclass
class Site:
    """A cluster of either kind, as the load sees it."""

    conninfo: str
    password: str
    primary: Callable[[], Awaitable[Node]]
    whole: Callable[[], Awaitable[bool]]


@dataclass
class Load:
    conninfo: str
    password: str
    acknowledged: set[int] = field(default_factory=set)
    times: list[float] = field(default_factory=list)
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def prepare(self) -> None:
        async with await self.connect() as connection:
            await connection.execute("CREATE TABLE written (n bigint PRIMARY KEY, filler text)")
        if status := await self._pgbench("--initialize", "--quiet", f"--scale={PGBENCH_SCALE}"):
            raise RuntimeError(f"pgbench --initialize ended with {status}")

    async def connect(self) -> AsyncConnection[tuple[object, ...]]:
        return await AsyncConnection.connect(
            self.conninfo, password=self.password, autocommit=True, connect_timeout=2, target_session_attrs="read-write"
        )

    async def pgbench(self) -> None:
        """Keep pgbench running, for ever."""
        while True:
            await self._pgbench(*PGBENCH)
            await asyncio.sleep(PGBENCH_AGAIN)

    async def _pgbench(self, *options: str) -> int:
        process = await asyncio.create_subprocess_exec(
            str(BIN / "pgbench"), *options, f"{self.conninfo} connect_timeout=2 target_session_attrs=read-write",
            env={"PGPASSWORD": self.password, "PATH": os.environ["PATH"]},
            stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL,
        )  # fmt: skip
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def witness(self) -> None:
        """Write for ever."""
        while True:
            try:
                async with await self.connect() as connection:
                    while True:
                        number = next(self.numbers)
                        async with asyncio.timeout(COMMIT_SECONDS):
                            await connection.execute("INSERT INTO written VALUES (%s, repeat('x', 80))", [number])
                        self.acknowledged.add(number)
                        self.times.append(time.monotonic())
                        await asyncio.sleep(0.002)
            except (psycopg.Error, OSError, TimeoutError):
                await asyncio.sleep(0.05)

    def gap(self, since: float) -> float:
        """The longest time without an acknowledgement after the last one before `since`."""
        first = next((at for at, moment in enumerate(self.times) if moment > since), len(self.times))
        return max((b - a for a, b in itertools.pairwise(self.times[max(0, first - 1) :])), default=0.0)

    async def lost(self) -> int:
        acknowledged = set(self.acknowledged)
        async with await self.connect() as connection:
            rows = await (await connection.execute("SELECT n FROM written")).fetchall()
        return len(acknowledged - {int(str(row[0])) for row in rows})


@dataclass
class Outcome:
    gaps: list[float] = field(default_factory=list)
    lost: int = 0
    acknowledged: int = 0


async def killed(site: Site, kills: int) -> Outcome:
    load, outcome = Load(site.conninfo, site.password), Outcome()
    await load.prepare()
    async with supervisor() as spawn:
        spawn("pgbench", load.pgbench())
        for number in range(WITNESSES):
            spawn(f"witness {number}", load.witness())
        for kill in range(kills):
            await asyncio.sleep(CALM + random.random())
            node = await site.primary()
            began, before = time.monotonic(), len(load.times)
            await node.kill()
            await until(partial(_flows, load, before), RECOVERY_SECONDS)
            outcome.gaps.append(load.gap(began))
            await node.start()
            await until(site.whole, RECOVERY_SECONDS)
            outcome.lost = await load.lost()
            print(f"  kill {kill + 1}: {outcome.gaps[-1]:.2f} s, lost {outcome.lost} of {len(load.times)}", flush=True)
    outcome.acknowledged = len(load.times)
    return outcome


async def _flows(load: Load, before: int) -> bool:
    """Whether writes are acknowledged again: enough of them, so that none can be from before the kill."""
    return len(load.times) > before + 10 * WITNESSES


@dataclass
class _Peer:
    node: peers.Node

    async def kill(self) -> None:
        """The server as well, which the kernel would end in its own way."""
        os.kill(self.node.server_pid, signal.SIGKILL)
        await self.node.kill()

    async def start(self) -> None:
        await self.node.start()


def _ours(one: peers.Cluster) -> Site:
    async def primary() -> Node:
        return _Peer(await one.primary())

    ports = [node.port for node in one.nodes]
    secured = f" sslmode=verify-full sslrootcert={one.identity.ca_path}"
    conninfo = f"{_hosts(ports)} user=flynn dbname=postgres{secured}"
    return Site(conninfo, "s3:cr'et", primary, one.whole)


def _theirs(one: patroni.Cluster) -> Site:
    return Site(f"{_hosts(one.ports)} user=postgres dbname=postgres", "", one.primary, one.whole)


def _hosts(ports: list[int]) -> str:
    hosts, numbers = ",".join("127.0.0.1" for _ in ports), ",".join(map(str, ports))
    return f"host={hosts} port={numbers}"


async def _measure(root: Path) -> list[Row]:
    print("  flynn-postgres", flush=True)
    async with peers.cluster() as one:
        await until(one.whole, RECOVERY_SECONDS)
        ours = await killed(_ours(one), KILLS)
    print("  Patroni, defaults", flush=True)
    (root / "default").mkdir(mode=0o755)
    async with patroni.running(root / "default") as other:
        theirs = await killed(_theirs(other), KILLS)
    print("  Patroni, synchronous_mode", flush=True)
    (root / "synchronous").mkdir(mode=0o755)
    async with patroni.running(root / "synchronous", synchronous=True) as other:
        careful = await killed(_theirs(other), KILLS_SYNCHRONOUS)
    median, careful_median = statistics.median(theirs.gaps), statistics.median(careful.gaps)
    mine, what = statistics.median(ours.gaps), "PostgreSQL primary killed -> writes again"
    return [
        Row(name=f"{what}, p50 of {KILLS}", ours=mine, peer=median, unit="s", budget=1.0, against=PEER),
        Row(
            name=f"{what}, longest of {KILLS}", ours=max(ours.gaps), peer=max(theirs.gaps), unit="s", budget=1.0,
            against=PEER,
        ),
        Row(name=f"{what}, longest, beside the budget", ours=max(ours.gaps), limit=LONGEST, unit="s", budget=1.0),
        Row(
            name=f"{what}, p50, peer in synchronous_mode", ours=mine, peer=careful_median, unit="s", budget=1.0,
            against=PEER,
        ),
        Row(name="acknowledged writes lost, all kills", ours=ours.lost, peer=theirs.lost, unit="writes", against=PEER),
        Row(
            name=f"the same, peer in synchronous_mode, {KILLS_SYNCHRONOUS} kills", ours=ours.lost, peer=careful.lost,
            unit="writes", against=PEER,
        ),
    ]  # fmt: skip


def rows() -> list[Row]:
    # Below /tmp, which the servers' user may enter.
    root = Path(tempfile.mkdtemp(prefix="flynn-bench-pg-", dir="/tmp"))
    root.chmod(0o755)
    try:
        return asyncio.run(_measure(root))
    finally:
        shutil.rmtree(root, ignore_errors=True)
