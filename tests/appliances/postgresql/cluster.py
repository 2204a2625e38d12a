"""Three real peers as processes beside a real discoverd, all on loopback, and a writer that remembers what it was told.

python -m tests.appliances.postgresql.cluster 12        kills the primary's daemon, or its server, twelve times
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from psycopg import AsyncConnection

from flynn.appliances.sirenia.client import DatabaseClient
from flynn.appliances.sirenia.cluster_state import ClusterState, parse_state
from flynn.appliances.sirenia.management import ApplianceStatus
from flynn.discoverd.client import Discoverd
from flynn.identity import Identity
from flynn.identity.authority import ClusterCA
from flynn.types.errors import ApiError
from flynn.types.instance import Instance
from tests.appliances.postgresql.conftest import BIN, free_port
from tests.discoverd.harness import Place, member


@dataclass
class Node:
    """One peer's place and, while it runs, its daemon."""

    root: Path
    number: int
    ca: ClusterCA
    discoverd: str
    port: int = field(default_factory=free_port)
    job_id: str = ""
    process: asyncio.subprocess.Process | None = None

    def __post_init__(self) -> None:
        self.job_id = f"host{self.number}-{uuid4()}"
        (self.directory / "data").mkdir(parents=True)
        self.ca.issue_job("postgres", "postgres", "postgres", ["127.0.0.1"]).write(self.directory / "identity")

    @property
    def directory(self) -> Path:
        return self.root / f"n{self.number}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def server_pid(self) -> int:
        return int((self.directory / "data/db/postmaster.pid").read_text().split("\n", 1)[0])

    async def start(self, **environ: str) -> None:
        with (self.root / f"n{self.number}.log").open("a") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "flynn.appliances.postgresql.main",
                env={
                    "PATH": os.environ["PATH"],
                    "FLYNN_IDENTITY": str(self.directory / "identity"),
                    "FLYNN_APP_NAME": "postgres",
                    "FLYNN_JOB_ID": self.job_id,
                    "FLYNN_RELEASE_ID": "r1",
                    "FLYNN_PROCESS_TYPE": "postgres",
                    "EXTERNAL_IP": "127.0.0.1",
                    "DISCOVERD": self.discoverd,
                    "PORT": str(self.port),
                    "PGPASSWORD": "s3:cr'et",
                    "DATA_DIR": str(self.directory / "data"),
                    "RUN_DIR": str(self.directory / "run"),
                    "PG_BIN": str(BIN),
                    **environ,
                },
                stdout=log,
                stderr=log,
            )  # fmt: skip

    async def kill(self) -> None:
        """As when the process, or the container around it, dies: the kernel ends the server with it."""
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    async def terminate(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return await self.process.wait()

    async def end(self) -> None:
        if self.process is not None and self.process.returncode is None:
            await self.kill()


@dataclass
class Cluster:
    nodes: list[Node]
    registry: Discoverd
    identity: Identity  # of the controller

    def add(self) -> Node:
        """A place for one more peer, which is not started."""
        first = self.nodes[0]
        node = Node(first.root, len(self.nodes) + 1, first.ca, first.discoverd)
        self.nodes.append(node)
        return node

    async def state(self) -> ClusterState | None:
        meta = await self.registry.get_meta("postgres")
        return parse_state(meta.data) if meta is not None else None

    def at(self, instance: Instance | None) -> Node:
        assert instance is not None
        return next(node for node in self.nodes if node.address == instance.addr)

    async def primary(self) -> Node:
        state = await self.state()
        assert state is not None
        return self.at(state.primary)

    async def sync(self) -> Node:
        state = await self.state()
        assert state is not None
        return self.at(state.sync)

    async def status(self, node: Node) -> ApplianceStatus:
        client = DatabaseClient(Instance.at(node.address, "tcp"), self.identity, timeout=3)
        try:
            return await client.status()
        finally:
            await client.close()

    @asynccontextmanager
    async def client(self, node: Node) -> AsyncIterator[DatabaseClient]:
        client = DatabaseClient(Instance.at(node.address, "tcp"), self.identity)
        try:
            yield client
        finally:
            await client.close()

    async def whole(self, size: int = 3) -> bool:
        """A writable primary with a sync that has caught up, and a chain of asyncs that receive."""
        try:
            state = await self.state()
            if state is None or state.sync is None or len(state.asyncs or []) != size - 2:
                return False
            there = {instance.addr for instance in await self.registry.instances("postgres")}
            if any(peer.addr in there for peer in state.deposed):
                return False
            chain = [state.primary, state.sync, *(state.asyncs or [])]
            seen = [await self.status(self.at(peer)) for peer in chain]
        except (ApiError, StopIteration):
            return False
        if not seen[0].database.read_write or seen[0].database.synced_downstream is None:
            return False
        return all(
            upper.peer.id in lower.database.connected
            and lower.database.lineage is not None
            and lower.database.lineage.generation == state.generation
            for upper, lower in itertools.pairwise(seen)
        )

    async def connect(self, node: Node, **options: Any) -> AsyncConnection[Any]:
        return await AsyncConnection.connect(
            host="127.0.0.1", port=node.port, user="flynn", password="s3:cr'et", dbname="postgres", autocommit=True,
            sslmode="verify-full", sslrootcert=str(self.identity.ca_path), connect_timeout=2, **options,
        )  # fmt: skip

    def log(self, node: Node) -> str:
        return (node.root / f"n{node.number}.log").read_text()


async def until(condition: Callable[[], Any], within: float = 120, every: float = 0.1) -> float:
    """Seconds until the (async) condition held."""
    began = time.monotonic()
    async with asyncio.timeout(within):
        while not await condition():
            await asyncio.sleep(every)
    return time.monotonic() - began


@asynccontextmanager
async def cluster(
    size: int = 3, keep: bool = False, volume_megabytes: int = 0, **environ: str
) -> AsyncIterator[Cluster]:
    """A directory and so many peers, started but not yet whole; with `volume_megabytes` on volumes that can be full."""
    root = Path(tempfile.mkdtemp(prefix="flynn-pgc-", dir="/tmp"))
    root.chmod(0o755)
    ca = ClusterCA.create()
    place = Place(ca, root / "discoverd")
    nodes = [Node(root, number + 1, ca, place.http_address) for number in range(size)]
    volumes = [node.directory / "data" for node in nodes] if volume_megabytes else []
    try:
        for volume in volumes:
            _run("mount", "-t", "tmpfs", "-o", f"size={volume_megabytes}m", "tmpfs", str(volume))
        async with member(place), place.client() as registry:
            try:
                for node in nodes:
                    await node.start(**environ)
                ca.issue_job("controller", "worker", "", ["127.0.0.1"]).write(root / "controller")
                yield Cluster(nodes, registry, Identity.load(root / "controller"))
            finally:
                for node in nodes:
                    await node.end()
                await asyncio.sleep(0.3)  # the servers end by themselves
    finally:
        for volume in volumes:
            _run("umount", "--lazy", str(volume))
        if not keep:
            shutil.rmtree(root, ignore_errors=True)
        else:
            print("kept", root)


def _run(*command: str) -> None:
    subprocess.run(command, check=False)


@dataclass
class Writer:
    """Follows the service's leader and inserts numbers, one after the other."""

    cluster: Cluster
    acknowledged: list[int] = field(default_factory=list)
    last: float = field(default_factory=time.monotonic)  # when the last write was acknowledged
    gap: float = 0.0  # the longest time without one since it was reset
    errors: dict[str, int] = field(default_factory=dict)

    async def run(self) -> None:
        number = 0
        while True:
            try:
                leader = await self.cluster.registry.leader("postgres")
                if leader is None:
                    raise psycopg.OperationalError("no leader")
                async with await self.cluster.connect(self.cluster.at(leader)) as connection:
                    await connection.execute("CREATE TABLE IF NOT EXISTS written (n int PRIMARY KEY)")
                    while True:
                        number += 1
                        async with asyncio.timeout(3):  # a commit that hangs is given up: the connection is closed
                            await connection.execute("INSERT INTO written VALUES (%s)", [number])
                        self.acknowledged.append(number)
                        now = time.monotonic()
                        self.gap, self.last = max(self.gap, now - self.last), now
                        await asyncio.sleep(0.005)
            except (psycopg.Error, ApiError, OSError, TimeoutError) as error:
                text = (str(error) or type(error).__name__).split("\n")[0][-80:]
                self.errors[text] = self.errors.get(text, 0) + 1
            await asyncio.sleep(0.05)

    async def lost(self) -> set[int]:
        acknowledged = set(self.acknowledged)  # the writer goes on while we look
        async with await self.cluster.connect(await self.cluster.primary()) as connection:
            rows = await (await connection.execute("SELECT n FROM written")).fetchall()
        return acknowledged - {row[0] for row in rows}


async def main(kills: int) -> int:
    gaps: dict[str, list[float]] = {}
    async with cluster(keep=True) as one, asyncio.TaskGroup() as group:
        print(f"whole after {await until(one.whole, 90):.1f} s")
        writer = Writer(one)
        task = group.create_task(writer.run())
        for round in range(kills):
            await asyncio.sleep(random.uniform(0.5, 1.5))
            node = await one.primary()
            kind = ("daemon", "server", "both", "sync")[round % 4]
            writer.gap, writer.last = 0.0, time.monotonic()
            before = len(writer.acknowledged)
            if kind == "sync":
                node = await one.sync()
            if kind in ("server", "both"):
                os.kill(node.server_pid, signal.SIGKILL)
            if kind != "server":
                await node.kill()
            began = time.monotonic()
            await until(partial(_returned, writer, began, before), 60)
            gap = writer.gap
            if kind != "server":
                await asyncio.sleep(0.5)
                await node.start()
            await asyncio.sleep(1)
            whole = await until(one.whole, 90)
            lost = await writer.lost()
            gaps.setdefault(kind, []).append(gap)
            generation = (await one.state()).generation  # type: ignore[union-attr]
            print(f"{round + 1:3} {kind:7} n{node.number} gap {gap:5.2f} s, whole after {whole:5.1f} s, generation "
                  f"{generation}, acknowledged {len(writer.acknowledged)}, lost {len(lost)}", flush=True)  # fmt: skip
            if lost:
                print("LOST", sorted(lost))
                os._exit(1)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        for kind, values in gaps.items():
            print(f"{kind}: p50 {statistics.median(values):.2f} s, max {max(values):.2f} s, {len(values)} kills")
        everything = [value for values in gaps.values() for value in values]
        print(f"all: p50 {statistics.median(everything):.2f} s, max {max(everything):.2f} s; errors {writer.errors}")
    return 0


async def _returned(writer: Writer, began: float, before: int) -> bool:
    """Whether writes flow again: the last one is recent, and there was a pause, or so much time has passed."""
    now = time.monotonic()
    pausing = now - writer.last > 0.3
    return not pausing and len(writer.acknowledged) > before and (writer.gap > 0.3 or now - began > 8)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)))
