"""Real discoverds for tests: inside this process, or as processes that can be killed."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from flynn.aio.clock import Clock, SystemClock
from flynn.discoverd import directory, expiry
from flynn.discoverd.api import DiscoverdApi
from flynn.discoverd.client import Discoverd
from flynn.discoverd.directory import LiveDirectory
from flynn.discoverd.membership import raft_address
from flynn.discoverd.raft.node import RaftConfig
from flynn.http.client import HttpClient
from flynn.http.server import listen
from flynn.identity import Identity
from flynn.identity.authority import ClusterCA

_numbers = itertools.count(1)
_second, _third = random.randrange(60, 250), random.randrange(1, 250)


def loopback_address() -> str:
    """An address of 127/8 that nobody else uses, so that fixed ports are free on it."""
    return f"127.{_second}.{_third}.{next(_numbers)}"


@dataclass
class Place:
    """What one member needs: an address, an identity, a directory."""

    ca: ClusterCA
    directory: Path
    address: str = field(default_factory=loopback_address)

    def __post_init__(self) -> None:
        self.ca.issue_job("discoverd", "app", "discoverd", [self.address]).write(self.directory / "identity")
        self.identity = Identity.load(self.directory / "identity")

    @property
    def http_address(self) -> str:
        return f"{self.address}:1111"

    def client(self) -> Discoverd:
        return Discoverd.connect(self.http_address, identity=self.identity)

    def http(self) -> HttpClient:
        return HttpClient(f"https://{self.http_address}", tls=self.identity, timeout=5)


@asynccontextmanager
async def member(
    place: Place, peers: list[Place] | None = None, ttl: timedelta = expiry.TTL, clock: Clock | None = None
) -> AsyncIterator[LiveDirectory]:
    """A member with its API, in this process."""
    config = RaftConfig(
        address=raft_address(place.http_address),
        peers=[raft_address(peer.http_address) for peer in peers or [place]],
        directory=place.directory / "data",
        password="secret of the test",
    )
    async with directory.running(config, clock or SystemClock(), ttl) as live:
        api = DiscoverdApi(live, place.http_address, place.identity, lambda: None).build()
        async with listen(api, place.address, 1111, tls=place.identity):
            if peers is None:
                await until(lambda: live.leading)
            yield live


async def until(condition: object, limit: float = 10.0) -> None:
    """Wait for a condition, with a deadline: a test that hangs says where."""
    async with asyncio.timeout(limit):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


class Process:
    """`flynn-discoverd` as a process."""

    def __init__(self, place: Place, *flags: str, environ: Mapping[str, str] | None = None) -> None:
        self.place = place
        self._flags = flags
        self._environ = {
            "PATH": os.environ["PATH"],
            "EXTERNAL_IP": place.address,
            "FLYNN_IDENTITY": str(place.directory / "identity"),
            "FLYNN_HOST_KEY_FILE": str(place.directory / "host.key"),
            "FLYNN_JOB_ID": "host0-discoverd",
            **(environ or {}),
        }
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, **environ: str) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "flynn.discoverd.main", "-data-dir", str(self.place.directory / "data"), *self._flags,
            env={**self._environ, **environ},
        )  # fmt: skip

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        await self._process.wait()

    async def stop(self) -> int:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(15):
            return await self._process.wait()

    async def __aenter__(self) -> Process:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._process is not None and self._process.returncode is None:
            await self.kill()
