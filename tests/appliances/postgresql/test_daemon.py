"""The database daemon and the provider with a real server; the directory is in memory."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection

from flynn.appliances.postgresql.main import Config, database_running, provider_running
from flynn.appliances.sirenia.client import DatabaseClient
from flynn.appliances.sirenia.cluster_state import Role
from flynn.discoverd.memory import MemoryRegistry
from flynn.http.client import HttpClient
from flynn.types.errors import Forbidden, Unreachable, ValidationError
from flynn.types.instance import Instance
from flynn.types.provider import Provisioned

from .conftest import Site

pytestmark = [pytest.mark.slow]


@asynccontextmanager
async def database(site: Site, registry: MemoryRegistry, **changes: str) -> AsyncIterator[DatabaseClient]:
    config = Config.from_environment(site.environment() | changes, 5432)
    async with database_running(config, registry, site.identity("postgres", "postgres", "postgres")):
        client = DatabaseClient(Instance.at(f"127.0.0.1:{config.port}", "tcp"), site.identity("controller"))
        try:
            yield client
        finally:
            await client.close()


async def connect(
    site: Site, user: str = "flynn", password: str = "s3cret", db: str = "postgres", **options: Any
) -> Any:
    return await AsyncConnection.connect(
        host="127.0.0.1",
        port=site.port,
        user=user,
        password=password,
        dbname=db,
        autocommit=True,
        **({"sslmode": "verify-full", "sslrootcert": str(site.root / "identity-postgres-postgres/ca.pem")} | options),
    )


async def query(site: Site, text: str) -> Any:
    async with await connect(site) as connection:
        row = await (await connection.execute(text)).fetchone()
        return row[0] if row else None


async def eventually(attempt: Callable[[], Awaitable[Any]], *errors: type[Exception], within: float = 20) -> Any:
    async with asyncio.timeout(within):
        while True:
            try:
                return await attempt()
            except errors:
                await asyncio.sleep(0.05)


async def test_a_cluster_of_one_founds_itself_and_speaks_tls_only_with_its_superuser(site: Site) -> None:
    registry = MemoryRegistry()
    async with database(site, registry) as client:
        await client.wait_read_write(timedelta(seconds=30))
        assert await query(site, "SHOW ssl") == "on"
        assert await query(site, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") is True
        with pytest.raises(psycopg.OperationalError, match="no encryption"):
            await connect(site, sslmode="disable")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            await connect(site, password="wrong")

        status = await client.status()
        assert status.peer.role is Role.PRIMARY
        assert status.peer.state is not None
        assert status.peer.state.singleton
        assert (status.database.running, status.database.user_exists, status.database.read_write) == (True, True, True)
        assert status.database.xlog > "0/00000000"
        leader = await registry.leader("postgres")
        assert leader is not None
        assert leader.addr == f"127.0.0.1:{site.port}"
        assert leader.meta["POSTGRES_ID"] == (site.root / "data/instance_id").read_text()
        assert leader.meta["FLYNN_JOB_ID"] == "host-1"
    assert await registry.instances("postgres") == []
    with pytest.raises(psycopg.OperationalError):
        await connect(site)


async def test_data_and_identity_survive_a_restart(site: Site) -> None:
    registry = MemoryRegistry()
    async with database(site, registry) as client:
        await client.wait_read_write(timedelta(seconds=30))
        async with await connect(site) as connection:
            await connection.execute("CREATE TABLE t AS SELECT 42 AS answer")
        before = (await client.status()).peer
    async with database(site, registry, PGPASSWORD="changed") as client:
        await client.wait_read_write(timedelta(seconds=30))
        after = (await client.status()).peer
        assert (after.id, after.role) == (before.id, Role.PRIMARY)
        assert after.state is not None
        assert after.state.generation == 1
        async with await connect(site, password="changed") as connection:
            assert await (await connection.execute("SELECT answer FROM t")).fetchone() == (42,)


async def test_a_killed_server_comes_back_with_what_was_acknowledged(site: Site) -> None:
    async with database(site, MemoryRegistry()) as client:
        await client.wait_read_write(timedelta(seconds=30))
        async with await connect(site) as connection:
            await connection.execute("CREATE TABLE t (n int)")
            await connection.execute("INSERT INTO t VALUES (7)")
        os.kill(server_pid(site), signal.SIGKILL)
        assert await eventually(lambda: query(site, "SELECT n FROM t"), psycopg.Error) == 7


async def test_stop_ends_the_database_and_the_registration_but_not_the_daemon(site: Site) -> None:
    registry = MemoryRegistry()
    async with database(site, registry) as client:
        await client.wait_read_write(timedelta(seconds=30))
        pid = server_pid(site)
        await client.stop()
        assert await registry.instances("postgres") == []
        assert not Path(f"/proc/{pid}").exists()
        status = await client.status()
        assert not status.database.running


async def test_who_may_ask_and_who_may_stop(site: Site) -> None:
    async with database(site, MemoryRegistry()) as client:
        await client.wait_read_write(timedelta(seconds=30))
        url = f"https://127.0.0.1:{site.port + 1}"
        async with HttpClient(url, tls=site.identity("blobstore")) as neighbour:
            await neighbour.get("/status", answer=dict)
            with pytest.raises(Forbidden):
                await neighbour.post("/stop")
        anonymous = ssl.create_default_context(cafile=str(site.root / "identity-postgres-postgres/ca.pem"))
        async with HttpClient(url, tls=anonymous) as stranger:
            with pytest.raises(Unreachable):
                await stranger.get("/status", answer=dict)
        assert (await client.status()).database.running


async def test_apps_get_databases_of_their_own(site: Site) -> None:
    registry = MemoryRegistry()
    provider_port = site.port + 1000 if site.port < 60000 else site.port - 1000
    environment = site.environment() | {"PGHOST": "127.0.0.1", "PGPORT": str(site.port), "PORT": str(provider_port)}
    async with (
        database(site, registry),
        provider_running(
            Config.from_environment(environment, 3000), registry, site.identity("postgres", "web", "postgres-api")
        ),
        HttpClient(f"https://127.0.0.1:{provider_port}", tls=site.identity("controller")) as http,
    ):
        (instance,) = await registry.instances("postgres-api")
        assert instance.proto == "https"
        await http.get("/ping")
        first, second = [await http.post("/databases", {}, answer=Provisioned) for _ in range(2)]
        user, password, name = first.env["PGUSER"], first.env["PGPASSWORD"], first.env["PGDATABASE"]
        for mode in ("require", "disable"):  # drivers without TLS are served too
            async with await connect(site, user, password, name, sslmode=mode, sslrootcert="") as connection:
                await connection.execute(f"CREATE TABLE t_{mode} (n int)")
                await connection.execute("CREATE EXTENSION IF NOT EXISTS hstore")
        with pytest.raises(psycopg.OperationalError, match="permission denied"):
            await connect(site, user, password, second.env["PGDATABASE"])

        held = await connect(site, user, password, name)  # somebody still uses it
        await http.delete("/databases", params={"id": first.id})
        with pytest.raises(psycopg.Error):
            await held.execute("SELECT 1")
        await held.close()
        with pytest.raises(psycopg.OperationalError):
            await connect(site, user, password, name)
        await http.delete("/databases", params={"id": first.id})  # once more does no harm
        with pytest.raises(ValidationError, match="id is invalid"):
            await http.delete("/databases", params={"id": "/databases/flynn:postgres"})
        async with HttpClient(f"https://127.0.0.1:{provider_port}", tls=site.identity("shop")) as other:
            with pytest.raises(Forbidden):
                await other.post("/databases", {})


DAEMON = """
import asyncio, os, sys
from flynn.appliances.postgresql.main import Config, database_running
from flynn.daemon import run
from flynn.discoverd.memory import MemoryRegistry
from flynn.identity import Identity
run("postgres", lambda: database_running(
    Config.from_environment(os.environ, 5432), MemoryRegistry(), Identity.from_environment()))
"""


@asynccontextmanager
async def daemon(site: Site) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DAEMON, env=dict(os.environ) | site.environment(), stdout=asyncio.subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_killed_daemon_leaves_no_server_behind_and_the_next_one_finds_the_data(site: Site) -> None:
    async with daemon(site) as process:
        await eventually(lambda: query(site, "SELECT 1"), psycopg.Error)
        async with await connect(site) as connection:
            await connection.execute("CREATE TABLE t AS SELECT 42 AS answer")
        pid = server_pid(site)
        process.kill()
        await process.wait()
        await eventually(lambda: gone(pid), AssertionError)
    async with daemon(site) as process:
        assert await eventually(lambda: query(site, "SELECT answer FROM t"), psycopg.Error) == 42
        process.terminate()
        assert await process.wait() == 0
    assert not (site.root / "data/db/postmaster.pid").exists()  # an orderly end


async def test_a_lock_file_of_another_life_does_not_matter(site: Site) -> None:
    async with database(site, MemoryRegistry()) as client:
        await client.wait_read_write(timedelta(seconds=30))
        lock = (site.root / "data/db/postmaster.pid").read_text()
    stale = "\n".join([str(os.getpid()), *lock.split("\n")[1:]])  # a pid that lives, but is no server
    (site.root / "data/db/postmaster.pid").write_text(stale)
    async with database(site, MemoryRegistry()) as client:
        await client.wait_read_write(timedelta(seconds=30))


async def test_an_initialisation_that_broke_off_is_begun_anew(site: Site) -> None:
    (site.root / "data/db.new").mkdir()
    (site.root / "data/db.new/PG_VERSION").write_text("15\n")
    async with database(site, MemoryRegistry()) as client:
        await client.wait_read_write(timedelta(seconds=30))


def server_pid(site: Site) -> int:
    return int((site.root / "data/db/postmaster.pid").read_text().split("\n", 1)[0])


async def gone(pid: int) -> None:
    assert not Path(f"/proc/{pid}").exists()


async def test_a_directory_with_something_else_in_it_is_not_touched(site: Site) -> None:
    (site.root / "data/db").mkdir()
    (site.root / "data/db/precious").write_text("x")
    async with database(site, MemoryRegistry()) as client:

        async def refused() -> None:
            assert (await client.status()).peer.retry_pending is not None

        await eventually(refused, AssertionError)
    assert (site.root / "data/db/precious").read_text() == "x"
