"""A real PostgreSQL and the controller's API on a real TLS listener; every test has a database of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from flynn.aio.supervisor import supervisor
from flynn.controller.api.server import Door, controller_api
from flynn.controller.client import Controller
from flynn.controller.database import Database
from flynn.controller.hosts import Hosts
from flynn.controller.migrate import migrate
from flynn.controller.neighbours import Neighbours
from flynn.controller.stores import Stores
from flynn.discoverd.memory import MemoryRegistry
from flynn.http.client import HttpClient, KeyAuth
from flynn.http.server import listen
from flynn.identity import Identity
from flynn.identity.authority import ClusterCA
from flynn.logaggregator.client import LogAggregator
from flynn.types.app import App
from flynn.types.artifact import Artifact
from flynn.types.release import ProcessType, Release

BIN = Path("/usr/lib/postgresql/15/bin")
KEY = "the-controller-key"
DOMAIN = "cluster.test"
MANIFEST: dict[str, object] = {
    "_type": "application/vnd.flynn.image.manifest.v1+json",
    "entrypoints": {"_default": {"args": ["/bin/app"], "env": {"FROM_IMAGE": "yes"}, "cwd": "/srv"}},
    "rootfs": [
        {
            "platform": {"architecture": "amd64", "os": "linux"},
            "layers": [
                {
                    "id": "layer1",
                    "type": "application/vnd.flynn.image.squashfs.v1",
                    "length": 10,
                    "hashes": {"sha512_256": "aa"},
                }
            ],
        }
    ],
}


class PostgresServer:
    """A server of our own in a temporary directory; `kill` and `start` are for tests of its loss."""

    def __init__(self, directory: Path) -> None:
        self.data = directory / "data"
        self.sockets = directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        self._as_postgres(BIN / "initdb", "-D", self.data, "-A", "trust", "-N", "--no-instructions", check=True)

    def start(self) -> None:
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self.sockets,
            "fsync": "off",
            "max_connections": "100",
            "shared_buffers": "16MB",
        }
        arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        self._process = subprocess.Popen(
            self._command(BIN / "postgres", "-D", self.data, "-p", str(self.port), *arguments),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                psycopg.connect(self.conninfo("postgres")).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.05)
        raise TimeoutError("PostgreSQL did not start")

    def kill(self) -> None:
        """kill -9 of the postmaster, as the power cut that it cannot prepare for; its children notice and go."""
        pid = int((self.data / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait(10)
        deadline = time.monotonic() + 10
        while (
            time.monotonic() < deadline and subprocess.run(["pgrep", "-f", str(self.data)], capture_output=True).stdout
        ):
            time.sleep(0.05)

    def _children(self) -> bool:
        return bool(subprocess.run(["pgrep", "-f", str(self.data)], capture_output=True, check=False).stdout)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._as_postgres(BIN / "pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop", check=False)
            self._process.wait(10)

    def conninfo(self, database: str) -> str:
        return f"host=127.0.0.1 port={self.port} user=postgres dbname={database}"

    def _command(self, *command: object) -> list[str]:
        prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
        return [*prefix, *map(str, command)]

    def _as_postgres(self, *command: object, check: bool) -> None:
        subprocess.run(self._command(*command), check=check, capture_output=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever needs the server is among the tests with real neighbours."""
    for item in items:
        if "postgres_server" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    directory = Path(tempfile.mkdtemp(prefix="flynn-test-pg-"))
    if os.getuid() == 0:
        shutil.chown(directory, "postgres")
    server = PostgresServer(directory)
    try:
        server.create()
        server.start()
        with psycopg.connect(server.conninfo("postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE controller")
        asyncio.run(migrated(server.conninfo("controller")))
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


async def migrated(conninfo: str) -> None:
    assert await migrate(Database(conninfo)) and not await migrate(Database(conninfo))


KEPT_TABLES = (
    "schema_migrations deployment_strategies event_types job_states release_types scale_request_states volume_types"
    " volume_states sink_kinds backup_statuses"
)


@pytest.fixture
def conninfo(postgres_server: PostgresServer) -> str:
    """A migrated database with nothing in it. Emptying one is several times as fast as making one."""
    conninfo = postgres_server.conninfo("controller")
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        emptied = ", ".join(sorted({name for (name,) in tables} - set(KEPT_TABLES.split())))
        connection.execute(f"TRUNCATE {emptied} CASCADE".encode())
        for sequence in ("event_ids", "name_ids"):
            connection.execute(f"ALTER SEQUENCE {sequence} RESTART".encode())
    return conninfo


@pytest.fixture
async def stores(conninfo: str) -> AsyncIterator[Stores]:
    async with Database(conninfo).connected() as database, supervisor() as spawn:
        stores = Stores.over(database, default_domain=DOMAIN)
        spawn("follow events", stores.hub.run())
        await stores.hub.started()
        yield stores


class Identities:
    """Certificates of one cluster."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._authority = ClusterCA.create()

    def app(self, name: str, service: str = "") -> Identity:
        directory = self._directory / name
        if not directory.exists():
            self._authority.issue_job(name, "web", service or name, ["127.0.0.1"]).write(directory)
        return Identity.load(directory)


@pytest.fixture(scope="session")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    return Identities(tmp_path_factory.mktemp("identities"))


@dataclass(frozen=True, slots=True)
class World:
    """A running API and what it is connected to."""

    stores: Stores
    registry: MemoryRegistry
    address: str
    door: Door
    identities: Identities

    def http(self, *, key: str | None = KEY, app: str = "router") -> HttpClient:
        auth = KeyAuth(key) if key is not None else None
        return HttpClient(f"https://{self.address}", auth=auth, tls=self.identities.app(app))

    def client(self) -> Controller:
        return Controller(self.http())


@asynccontextmanager
async def serving(
    stores: Stores, identities: Identities, *, aggregator_url: str = "https://127.0.0.1:1"
) -> AsyncIterator[World]:
    """Serve the API over some stores."""
    registry, door = MemoryRegistry(), Door()
    identity = identities.app("controller")
    aggregator = LogAggregator(HttpClient(aggregator_url, tls=identity))
    async with aggregator:
        api = controller_api(
            stores,
            keys=[KEY, "the-next-key"],
            ca_cert="-----BEGIN CERTIFICATE-----\n",
            domain=DOMAIN,
            hosts=Hosts(registry, identity),
            neighbours=Neighbours(identity),
            aggregator=aggregator,
            door=door,
        )
        async with listen(api, "127.0.0.1", 0, tls=identity) as (host, port):
            yield World(stores, registry, f"{host}:{port}", door, identities)


@pytest.fixture
async def world(stores: Stores, identities: Identities) -> AsyncIterator[World]:
    async with serving(stores, identities) as world:
        yield world


@pytest.fixture
async def controller(world: World) -> AsyncIterator[Controller]:
    async with world.client() as controller:
        yield controller


@dataclass(frozen=True, slots=True)
class Shop:
    """An app with one release of two process types."""

    app: App
    artifact: Artifact
    release: Release


@pytest.fixture
async def shop(controller: Controller) -> Shop:
    app = await controller.create_app(App(name="shop"))
    artifact = await controller.create_artifact(
        Artifact(
            type="flynn", uri="https://images.test/shop.json", manifest=MANIFEST, layer_url_template="file:///l/{id}"
        )
    )
    release = await controller.create_release(a_release(app, artifact))
    return Shop(app, artifact, release)


def a_release(app: App, artifact: Artifact, **env: str) -> Release:
    return Release(
        app_id=app.id,
        artifacts=[artifact.id],
        env=env,
        processes={"web": ProcessType(args=["web"]), "clock": ProcessType(args=["clock"])},
    )
