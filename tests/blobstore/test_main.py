"""The daemon as it starts: a successor registers only when it has everything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flynn.blobstore.client import Blobstore
from flynn.blobstore.main import Config, running
from flynn.daemon import ConfigError
from flynn.http.client import HttpClient
from flynn.http.server import Api, EventStream, Request, listen
from flynn.identity import ANYONE, Identity
from flynn.identity.authority import ClusterCA
from flynn.types.instance import DiscoverdEvent, EventKind, Instance


class Directory:
    """discoverd, as far as this daemon asks."""

    def __init__(self) -> None:
        self.services: dict[str, dict[str, Instance]] = {"blobstore": {}, "blobstore-mirror": {}}

    def api(self) -> Api:
        api = Api("discoverd")
        api.route("GET", "/services/{service}", self._watch, allow=ANYONE)
        api.route("GET", "/services/{service}/instances", self._instances, allow=ANYONE)
        api.route("PUT", "/services/{service}/instances/{id}", self._register, allow=ANYONE)
        api.route("DELETE", "/services/{service}/instances/{id}", self._deregister, allow=ANYONE)
        return api

    async def _instances(self, request: Request) -> list[Instance]:
        return list(self.services[request.path("service")].values())

    async def _register(self, request: Request) -> None:
        self.services[request.path("service")][request.path("id")] = await request.body(Instance)

    async def _deregister(self, request: Request) -> None:
        self.services[request.path("service")].pop(request.path("id"), None)

    async def _watch(self, request: Request) -> EventStream:
        service = request.path("service")

        async def events() -> AsyncIterator[DiscoverdEvent]:
            known: dict[str, Instance] = {}
            first = True
            while True:
                now = dict(self.services[service])
                for instance in [now[i] for i in now.keys() - known.keys()]:
                    yield DiscoverdEvent(service=service, kind=EventKind.UP, instance=instance)
                for instance in [known[i] for i in known.keys() - now.keys()]:
                    yield DiscoverdEvent(service=service, kind=EventKind.DOWN, instance=instance)
                if first:
                    yield DiscoverdEvent(service=service, kind=EventKind.CURRENT)
                known, first = now, False
                await asyncio.sleep(0.02)

        return EventStream(events())


async def test_a_new_release_takes_the_blobs_of_the_old_one(tmp_path: Path, unused_tcp_port_factory) -> None:  # type: ignore[no-untyped-def]  # a fixture
    ca = ClusterCA.create()
    for name in ("blobstore", "discoverd", "gitreceive"):
        ca.issue_job(name, "web", name, []).write(tmp_path / name)
    directory = Directory()
    tls = Identity.load(tmp_path / "discoverd")
    async with listen(directory.api(), "127.0.0.1", 0, tls=tls) as (_, discoverd):

        def config(volume: str) -> Config:
            return Config.from_environment(
                {
                    "PORT": str(unused_tcp_port_factory()),
                    "LISTEN_IP": "127.0.0.1",
                    "EXTERNAL_IP": "127.0.0.1",
                    "DISCOVERD": f"127.0.0.1:{discoverd}",
                    "FLYNN_IDENTITY": str(tmp_path / "blobstore"),
                    "BLOBSTORE_DATA": str(tmp_path / volume),
                }
            )

        def client() -> Blobstore:
            (instance,) = directory.services["blobstore"].values()
            assert instance.proto == "https"
            return Blobstore(HttpClient(f"https://{instance.addr}", tls=Identity.load(tmp_path / "gitreceive")))

        old = running(config("old"))
        await old.__aenter__()
        async with client() as blobs:
            await blobs.put("/a", b"1")
        async with running(config("new")):
            await old.__aexit__(None, None, None)
            async with client() as blobs:
                assert await blobs.read("/a") == b"1"
        assert directory.services == {"blobstore": {}, "blobstore-mirror": {}}


@pytest.mark.parametrize(("name", "value"), [("PORT", "x"), ("DEFAULT_BACKEND", "s3")])
def test_a_bad_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Config.from_environment({name: value})
