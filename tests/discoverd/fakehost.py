"""As much of flynn-host's API as discoverd and flannel talk to. Also runs as a process, inside a network namespace:

python -m tests.discoverd.fakehost <identity directory> <address> <file the status is kept in>
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from flynn.http.server import Api, Request, listen
from flynn.identity import Identity, access
from flynn.types.codec import encode, replace
from flynn.types.host import DiscoverdConfig, HostStatus, NetworkConfig


class FakeHost:
    """Remembers what it is told, as the real one does, and how often it was told."""

    def __init__(self, changed: Callable[[HostStatus], None] = lambda status: None) -> None:
        self.status = HostStatus(id="host0")
        self.told: list[DiscoverdConfig | NetworkConfig] = []
        self._changed = changed

    def forget(self) -> None:
        """What a restart of the daemon does."""
        self.status = HostStatus(id="host0")

    def api(self) -> Api:
        api = Api("fake-host")
        api.route("GET", "/host/status", self._get, allow=access("app:discoverd", "app:flannel"))
        api.route("POST", "/host/discoverd", self._discoverd, allow=access("app:discoverd"))
        api.route("POST", "/host/network", self._network, allow=access("app:flannel"))
        return api

    async def _get(self, request: Request) -> HostStatus:
        return self.status

    async def _discoverd(self, request: Request) -> None:
        config = await request.body(DiscoverdConfig)
        self.told.append(config)
        self.status = replace(self.status, discoverd=config)
        self._changed(self.status)

    async def _network(self, request: Request) -> None:
        config = await request.body(NetworkConfig)
        self.told.append(config)
        self.status = replace(self.status, network=replace(config, resolvers=[]))
        self._changed(self.status)


@asynccontextmanager
async def fake_host(identity: Identity, address: str) -> AsyncIterator[FakeHost]:
    host = FakeHost()
    async with listen(host.api(), address, 1113, tls=identity):
        yield host


async def main(directory: str, address: str, file: str) -> None:
    host = FakeHost(lambda status: _write(Path(file), encode(status)))
    async with listen(host.api(), address, 1113, tls=Identity.load(directory)):
        await asyncio.Event().wait()


def _write(path: Path, content: bytes) -> None:
    beside = path.with_suffix(".new")
    beside.write_bytes(content)
    os.replace(beside, path)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
