"""The status page, over TLS, in front of real little daemons that say how they are."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from flynn.discoverd.memory import MemoryRegistry
from flynn.http.client import HttpClient, KeyAuth
from flynn.http.server import Api, listen
from flynn.identity import Identity
from flynn.identity.authority import ClusterCA
from flynn.status.api import status_api
from flynn.status.checks import CHECKS, Ask, Check, is_free, summary
from flynn.status.main import Inquiry
from flynn.types.codec import decode
from flynn.types.errors import ApiError, Unauthorized
from flynn.types.instance import Instance
from flynn.types.status import Health, Status, StatusDocument

HEALTHY = Status(version="v1")
UNHEALTHY = Status(status=Health.UNHEALTHY.value)


def test_the_cluster_is_healthy_if_every_service_is_that_has_to_be() -> None:
    needed = {check.name: HEALTHY for check in CHECKS if not check.optional}
    assert summary(needed, "v2") == Status(
        version="v2", detail={name: {"status": "healthy", "version": "v1"} for name in sorted(needed)}
    )
    assert summary({**needed, "mariadb": UNHEALTHY}, "v2").healthy
    for name in needed:
        assert not summary({**needed, name: UNHEALTHY}, "v2").healthy
        assert not summary({key: value for key, value in needed.items() if key != name}, "v2").healthy


def test_the_port_of_a_check_is_the_registered_one_unless_it_is_known_better() -> None:
    instance = Instance.at("10.0.0.1:514", "tcp", {"API_PORT": "8080"})
    assert Check("a", "a").address(instance) == "10.0.0.1:514"
    assert Check("a", "a", port=80).address(instance) == "10.0.0.1:80"
    assert Check("a", "a", port=80, port_meta="API_PORT").address(instance) == "10.0.0.1:8080"


@pytest.mark.parametrize(
    ("address", "free"),
    [
        ("10.1.2.3", True),
        ("172.31.0.1", True),
        ("172.32.0.1", False),
        ("100.64.7.7", True),
        ("203.0.113.9", True),
        ("8.8.8.8", False),
        ("::1", True),
        ("fd12::1", True),
        ("2001:db8::1", False),
        ("::ffff:10.0.0.1", True),
        ("", False),
        ("not an address", False),
    ],
)
def test_who_may_look_without_a_key(address: str, free: bool) -> None:
    assert is_free(address) is free


class Cluster:
    def __init__(self, directory: Path) -> None:
        self.ca = ClusterCA.create()
        self.registry = MemoryRegistry()
        self._directory = directory

    def identity(self, app: str) -> Identity:
        directory = self._directory / app
        if not directory.exists():
            self.ca.issue_job(app, "web", "", []).write(directory)
        return Identity.load(directory)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """Every service that has to be there, healthy."""
    cluster = Cluster(tmp_path)
    async with AsyncExitStack() as stack:
        for check in CHECKS:
            if check.optional:
                continue
            api = Api(check.name)
            _, port = await stack.enter_async_context(listen(api, "127.0.0.1", 0, tls=cluster.identity(check.name)))
            addr, meta = f"127.0.0.1:{port}", {}
            if check.ask is Ask.LEADER and check.port_meta:
                addr, meta = "127.0.0.1:514", {check.port_meta: str(port)}
            await cluster.registry.create(check.service)
            await cluster.registry.register(check.service, Instance.at(addr, "https", meta))
        yield cluster


@asynccontextmanager
async def page(cluster: Cluster, peer: str, key: str = "", **client: object) -> AsyncIterator[HttpClient]:
    inquiry = Inquiry(cluster.registry, cluster.identity("status"), "controller key", random.Random(1))
    async with (
        listen(status_api(inquiry, key), "127.0.0.1", 0, tls=cluster.identity("status")) as (_, port),
        HttpClient(f"https://127.0.0.1:{port}", tls=cluster.identity(peer), **client) as http,  # type: ignore[arg-type]
    ):
        yield http


async def test_the_page_tells_what_is_unhealthy(cluster: Cluster) -> None:
    """Only PostgreSQL's management port cannot be played: it is a fixed number beside the database's."""
    async with page(cluster, "router") as http:
        with pytest.raises(ApiError) as refusal:
            await http.get("/any/path")
    assert refusal.value.status == 500
    told = decode(refusal.value.message, StatusDocument).data
    assert not told.healthy
    assert {name for name, entry in told.detail.items() if entry["status"] != "healthy"} == {"postgres"}
    assert told.detail["router"] == {"status": "healthy", "version": "dev"}


async def test_a_key_is_asked_from_outside_only(cluster: Cluster) -> None:
    async def looks(peer: str, query: str = "", **options: object) -> bool:
        async with page(cluster, peer, "secret", **options) as http:
            try:
                await http.get(f"/?key={query}")
            except Unauthorized:
                return False
            except ApiError:
                pass  # unhealthy, but told
            return True

    outside = {"X-Forwarded-For": "10.0.0.1, 8.8.8.8"}
    assert not await looks("router", headers=outside)
    assert not await looks("router", headers=outside, auth=KeyAuth("wrong"))
    assert await looks("router", headers=outside, auth=KeyAuth("secret"))
    assert await looks("router", query="secret", headers=outside)
    assert await looks("router", headers={"X-Forwarded-For": "8.8.8.8, 10.0.0.1"})
    assert await looks("controller", headers=outside)
