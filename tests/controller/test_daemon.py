"""`flynn-controller web` and `worker` as processes, with a real directory and a real database."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest

from flynn.controller.client import Controller
from flynn.controller.config import configuration
from flynn.controller.wire import AppUpdate
from flynn.daemon import ConfigError
from flynn.http.client import HttpClient, KeyAuth, Retry
from flynn.identity import Identity
from flynn.identity.authority import ClusterCA
from flynn.types.app import App
from flynn.types.artifact import Artifact
from flynn.types.errors import Unauthorized
from flynn.types.formation import Formation, ScaleRequest
from tests.discoverd.harness import Place, member

from .conftest import KEY, MANIFEST, PostgresServer, a_release


class Daemon:
    """One process of the controller."""

    def __init__(self, name: str, place: Place, environ: dict[str, str]) -> None:
        self.name = name
        self._place = place
        with socket.socket() as probe:
            probe.bind((place.address, 0))
            self.port: int = probe.getsockname()[1]
        identity = place.directory / "controller"
        if not identity.exists():
            place.ca.issue_job("controller", "web", "controller", [place.address]).write(identity)
        self._environ = {
            "PATH": os.environ["PATH"],
            "EXTERNAL_IP": place.address,
            "DISCOVERD": place.http_address,
            "FLYNN_IDENTITY": str(identity),
            "PORT": str(self.port),
            "AUTH_KEY": KEY,
            "DEFAULT_ROUTE_DOMAIN": "cluster.test",
            **environ,
        }
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "flynn.controller.main", self.name, env=self._environ
        )

    async def end(self, signum: signal.Signals) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(signum)
        async with asyncio.timeout(25):
            return await self.process.wait()

    def megabytes(self) -> float:
        """Proportional set size."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


@pytest.fixture
def environ(postgres_server: PostgresServer, conninfo: str) -> dict[str, str]:
    return {
        "PGHOST": "127.0.0.1",
        "PGPORT": str(postgres_server.port),
        "PGUSER": "postgres",
        "PGDATABASE": conninfo.rpartition("dbname=")[2],
        "PGSSLMODE": "disable",
    }


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(ClusterCA.create(), tmp_path)


@asynccontextmanager
async def running(place: Place, environ: dict[str, str], *names: str) -> AsyncIterator[list[Daemon]]:
    daemons = [Daemon(name, place, environ) for name in names]
    try:
        for daemon in daemons:
            await daemon.start()
        yield daemons
    finally:
        for daemon in daemons:
            await daemon.end(signal.SIGKILL)


def client(place: Place, web: Daemon, *, app: str = "scheduler", key: str = KEY) -> Controller:
    directory = place.directory / app
    if not directory.exists():
        place.ca.issue_job(app, "app", app, []).write(directory)
    url = f"https://controller.discoverd:{web.port}"
    return Controller(
        HttpClient(
            url,
            auth=KeyAuth(key),
            tls=Identity.load(directory),
            connect_to=f"{place.address}:{web.port}",
            retry=Retry(),
        )
    )


@pytest.mark.slow
async def test_web_and_worker_through_a_deployment_with_a_killed_worker(
    place: Place, environ: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    async with member(place), running(place, environ, "web", "worker") as (web, worker), place.client() as directory:
        found: dict[str, int] = {}

        async def registered() -> None:
            async with asyncio.timeout(20):
                while len(found) < 2:
                    for service in ("controller", "controller-worker"):
                        for instance in await directory.instances(service):
                            assert instance.proto == "https"
                            found[service] = instance.port
                    await asyncio.sleep(0.05)

        await registered()
        assert found == {"controller": web.port, "controller-worker": worker.port}
        async with client(place, web) as controller, asyncio.timeout(60):
            app = await controller.create_app(App(name="shop"))
            await controller.update_app("shop", AppUpdate(strategy="one-by-one"))
            artifact = await controller.create_artifact(
                Artifact(type="flynn", uri="https://images.test/shop.json", manifest=MANIFEST)
            )
            old = await controller.create_release(a_release(app, artifact))
            new = await controller.create_release(a_release(app, artifact, VERSION="2"))
            await controller.deploy("shop", old.id)
            await controller.put_formation(Formation(app="shop", release=old.id, processes={"web": 2}))
            deployment = await controller.create_deployment("shop", new.id)
            while not any(formation.release == new.id for formation in await controller.formations("shop")):
                await asyncio.sleep(0.05)
            await worker.end(signal.SIGKILL)
            await worker.start()

            async def schedule() -> None:
                async for formation in controller.follow_formations():
                    if request := formation.pending_scale_request:
                        await controller.put_scale_request(
                            ScaleRequest(app=request.app, release=request.release, id=request.id, state="complete")
                        )

            scheduling = asyncio.ensure_future(schedule())
            events = [event.status async for event in controller.follow_deployment(deployment)]
            scheduling.cancel()
            assert events == ["pending", "running", "complete"]
            assert (await controller.formation("shop", new.id)).processes == {"web": 2}
        with capfd.disabled():
            print(f"\nPSS: web {web.megabytes():.1f} MB, worker {worker.megabytes():.1f} MB")
        assert [await daemon.end(signal.SIGTERM) for daemon in (web, worker)] == [0, 0]
        assert await directory.instances("controller") == []


@pytest.mark.slow
async def test_web_comes_up_before_its_database_and_survives_its_loss(
    place: Place, environ: dict[str, str], postgres_server: PostgresServer
) -> None:
    postgres_server.kill()
    try:
        async with member(place), running(place, environ, "web") as (web,), place.client() as directory:
            await asyncio.sleep(1)
            assert await directory.instances("controller") == []
            await asyncio.to_thread(postgres_server.start)
            async with asyncio.timeout(20):
                while not await directory.instances("controller"):
                    await asyncio.sleep(0.05)
            async with client(place, web) as controller:
                await controller.create_app(App(name="shop"))
                postgres_server.kill()
                waiting = asyncio.ensure_future(controller.apps())
                await asyncio.sleep(1)
                await asyncio.to_thread(postgres_server.start)
                async with asyncio.timeout(20):
                    assert [app.name for app in await waiting] == ["shop"], "the client has waited it out"
            async with client(place, web, key="wrong") as stranger:
                with pytest.raises(Unauthorized):
                    await stranger.apps()
    finally:
        if postgres_server._process is None or postgres_server._process.poll() is not None:
            await asyncio.to_thread(postgres_server.start)


def test_the_wrong_command_is_told_how() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flynn.controller.main", "everything"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "usage: flynn-controller web|worker|scheduler\n")


GOOD = {"PGUSER": "u", "PGPASSWORD": "p w", "PGDATABASE": "d", "FLYNN_POSTGRES": "pg"}


def test_configuration(place: Place) -> None:
    identity = place.identity
    config = configuration({**GOOD, "AUTH_KEY": "a, b,", "PORT": "80", "DEFAULT_ROUTE_DOMAIN": "x.y"}, identity)
    assert (config.keys, config.port, config.domain) == (("a", "b"), 80, "x.y")
    parsed = psycopg.conninfo.conninfo_to_dict(config.database)
    assert (parsed["host"], parsed["sslmode"], parsed["password"]) == ("leader.pg.discoverd", "verify-full", "p w")
    assert parsed["sslrootcert"] == str(identity.ca_path)


@pytest.mark.parametrize(
    ("change", "variable"),
    [
        ({"PGUSER": ""}, "PGUSER"),
        ({"PORT": "x"}, "PORT"),
        ({"NAME_SEED": "zz"}, "NAME_SEED"),
        ({"NAME_SEED": "00"}, "10"),
    ],
)
def test_a_bad_value_is_named(place: Place, change: dict[str, str], variable: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        configuration({**GOOD, **change}, place.identity)
