"""The peer of flynn-postgres: three Patroni members with PostgreSQL 15 on loopback, and etcd to agree by.

Everything is at its default (ttl 30 s, loop_wait 10 s), except that former primaries may be rewound, as Patroni's
manual recommends: otherwise none could come back.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import yaml

from flynn.http.client import HttpClient
from flynn.types.codec import Wire
from flynn.types.errors import ApiError
from tests.appliances.postgresql.conftest import BIN, free_port

START_SECONDS = 120.0
END_SECONDS = 20.0
AS_POSTGRES = ("setpriv", "--reuid", "postgres", "--regid", "postgres", "--init-groups", "--pdeathsig", "KILL", "--")


@dataclass
class Member:
    root: Path
    number: int
    etcd: str
    synchronous: bool
    port: int = field(default_factory=free_port)
    rest: int = field(default_factory=free_port)
    process: asyncio.subprocess.Process | None = None

    @property
    def name(self) -> str:
        return f"p{self.number}"

    @property
    def data(self) -> Path:
        return self.root / self.name / "data"

    def configuration(self) -> dict[str, Any]:
        user = {"username": "postgres", "password": "postgres"}
        return {
            "scope": "bench",
            "name": self.name,
            "restapi": {"listen": f"127.0.0.1:{self.rest}", "connect_address": f"127.0.0.1:{self.rest}"},
            "etcd3": {"host": self.etcd},
            "bootstrap": {
                "dcs": {
                    "postgresql": {"use_pg_rewind": True},
                    **({"synchronous_mode": True} if self.synchronous else {}),
                },
                "initdb": ["data-checksums", {"encoding": "UTF8"}],
                "pg_hba": [f"host {database} all 127.0.0.1/32 trust" for database in ("all", "replication")],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{self.port}",
                "connect_address": f"127.0.0.1:{self.port}",
                "data_dir": str(self.data),
                "bin_dir": str(BIN),
                "pgpass": str(self.root / self.name / "pgpass"),
                "authentication": {"superuser": user, "replication": user, "rewind": user},
                "parameters": {"unix_socket_directories": str(self.root / self.name)},
            },
        }

    async def start(self) -> None:
        directory = self.root / self.name
        directory.mkdir(exist_ok=True)
        shutil.chown(directory, "postgres", "postgres")
        (directory / "patroni.yml").write_text(yaml.safe_dump(self.configuration()))
        with (self.root / f"{self.name}.log").open("a") as log:
            self.process = await asyncio.create_subprocess_exec(
                *AS_POSTGRES, "/usr/bin/patroni", str(directory / "patroni.yml"),
                cwd="/", env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}, stdout=log, stderr=log,
            )  # fmt: skip

    async def kill(self) -> None:
        """kill -9 of Patroni and of the server it has started."""
        pids = [self.process.pid] if self.process is not None and self.process.returncode is None else []
        with suppress(OSError, ValueError):
            pids.append(int((self.data / "postmaster.pid").read_text().split("\n", 1)[0]))
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            await self.process.wait()


class MemberInfo(Wire):
    name: str
    role: str
    state: str


class Document(Wire):
    members: list[MemberInfo] = []


@dataclass
class Cluster:
    members: list[Member]

    async def view(self) -> dict[str, str]:
        """Role and state of each member, as the first one that answers tells."""
        for member in self.members:
            async with HttpClient(f"http://127.0.0.1:{member.rest}", timeout=2) as http:
                try:
                    document = await http.get("/cluster", answer=Document)
                except ApiError:
                    continue
            return {one.name: f"{one.role} {one.state}" for one in document.members}
        return {}

    async def whole(self) -> bool:
        view = await self.view()
        roles = [text.split()[0] for text in view.values()]
        running = all(text.split()[1] in ("running", "streaming") for text in view.values())
        wanted = ["leader", "replica", "replica"]
        if self.members[0].synchronous:
            wanted = ["leader", "replica", "sync_standby"]
        return sorted(roles) == wanted and running and await self._streaming() == len(self.members) - 1

    async def _streaming(self) -> int:
        """How many replicas really receive; one that Patroni calls running may be on another timeline."""
        primary = await self.primary()
        conninfo = f"host=127.0.0.1 port={primary.port} user=postgres dbname=postgres connect_timeout=2"
        try:
            async with await psycopg.AsyncConnection.connect(conninfo) as connection:
                asked = await connection.execute("SELECT FROM pg_stat_replication WHERE state = 'streaming'")
                return asked.rowcount
        except psycopg.Error:
            return 0

    async def primary(self) -> Member:
        view = await self.view()
        return next(member for member in self.members if view.get(member.name, "").startswith("leader"))

    @property
    def ports(self) -> list[int]:
        return [member.port for member in self.members]


async def until(condition: Callable[[], Any], within: float) -> None:
    async with asyncio.timeout(within):
        while not await condition():
            await asyncio.sleep(0.2)


@asynccontextmanager
async def running(root: Path, *, synchronous: bool = False) -> AsyncIterator[Cluster]:
    """Three members below `root`, whole."""
    client, peer = free_port(), free_port()
    etcd = await asyncio.create_subprocess_exec(
        "etcd", "--data-dir", str(root / "etcd"), "--log-level", "error", "--logger", "zap",
        "--listen-client-urls", f"http://127.0.0.1:{client}", "--advertise-client-urls", f"http://127.0.0.1:{client}",
        "--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
        "--initial-cluster", f"default=http://127.0.0.1:{peer}",
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "ETCD_UNSUPPORTED_ARCH": os.uname().machine},
    )  # fmt: skip
    cluster = Cluster([Member(root, number, f"127.0.0.1:{client}", synchronous) for number in (1, 2, 3)])
    try:
        for member in cluster.members:
            await member.start()
        await until(cluster.whole, START_SECONDS)
        yield cluster
    finally:
        for member in cluster.members:
            await member.kill()
        etcd.kill()
        await etcd.wait()
        with suppress(TimeoutError):
            await until(lambda: _gone(root), END_SECONDS)


async def _gone(root: Path) -> bool:
    """Whether the servers' own children have noticed and ended as well."""
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            if entry.resolve().is_relative_to(root):
                return False
    return True
