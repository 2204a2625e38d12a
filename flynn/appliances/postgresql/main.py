"""flynn-postgres: the daemon beside a PostgreSQL server, and `flynn-postgres api`: the provider of databases."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psycopg
from psycopg import AsyncConnection

from flynn.aio.backoff import Backoff, retrying
from flynn.aio.clock import SystemClock
from flynn.aio.supervisor import supervisor
from flynn.appliances.postgresql.configuration import SUPERUSER
from flynn.appliances.postgresql.postmaster import Installation
from flynn.appliances.postgresql.provisioning import Connect, Connection, provisioning_api
from flynn.appliances.postgresql.server import PostgreSQL
from flynn.appliances.postgresql.workplace import ServerConfig
from flynn.appliances.sirenia.client import HttpNeighbours
from flynn.appliances.sirenia.cluster_state import BadClusterState, parse_state
from flynn.appliances.sirenia.evaluate import Me
from flynn.appliances.sirenia.identity import ensure_instance_id
from flynn.appliances.sirenia.management import management_api
from flynn.appliances.sirenia.peer import Peer
from flynn.daemon import ConfigError, run
from flynn.discoverd.client import Discoverd
from flynn.discoverd.instances import instance_from_environment
from flynn.discoverd.registry import Registry
from flynn.http.server import listen
from flynn.identity import Identity
from flynn.types.instance import EventKind, LeaderType

log = logging.getLogger(__name__)

ID_KEY = "POSTGRES_ID"
GRACE = timedelta(seconds=25)  # an orderly stop of the server, below the 30 s after which a host kills
LEAVE_LIMIT = timedelta(seconds=3)  # the rest of the grace belongs to the server
RECONNECT = Backoff(first=timedelta(milliseconds=200), limit=timedelta(seconds=2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Of both daemons; each line names its variable."""

    service: str  # FLYNN_POSTGRES, the database's service
    port: int  # PORT: of the database, or of the provider
    management_port: int  # HTTP_PORT, one above the database's
    password: str  # PGPASSWORD of the superuser
    singleton: bool  # SINGLETON, true for exactly that word
    data: Path  # DATA_DIR, the volume
    run: Path  # RUN_DIR, sockets and certificate copies
    bin: Path  # PG_BIN, the server's programs
    host: str  # PGHOST, where the provider finds the primary
    host_port: int  # PGPORT
    environment: Mapping[str, str]

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], default_port: int) -> Config:
        port = _port(environ, "PORT", default_port)
        service = environ.get("FLYNN_POSTGRES") or "postgres"
        password = environ.get("PGPASSWORD", "")
        if not password:
            raise ConfigError("PGPASSWORD must be set: the superuser cannot be without a password")
        return cls(
            service=service,
            port=port,
            management_port=_port(environ, "HTTP_PORT", port + 1 if port else 0),
            password=password,
            singleton=environ.get("SINGLETON") == "true",
            data=Path(environ.get("DATA_DIR") or "/data"),
            run=Path(environ.get("RUN_DIR") or "/run/flynn-postgres"),
            bin=Path(environ.get("PG_BIN") or "/usr/lib/postgresql/15/bin"),
            host=environ.get("PGHOST") or f"leader.{service}.discoverd",
            host_port=_port(environ, "PGPORT", 5432),
            environment=environ,
        )


def _port(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    if not text.isdigit() or int(text) > 65535:
        raise ConfigError(f"{name} is not a port number: {text!r}")
    return int(text)


@asynccontextmanager
async def database_running(config: Config, registry: Registry, identity: Identity) -> AsyncIterator[None]:
    """Be a peer of the cluster while the block is open. Ready means: taking part, not that the database is up."""
    try:
        peer_id = ensure_instance_id(config.data / "instance_id", str(uuid.uuid4()))
    except OSError as error:
        raise ConfigError(f"DATA_DIR: {error}") from error
    instance = instance_from_environment(config.environment, config.port, meta={ID_KEY: peer_id})
    settings = ServerConfig(
        data=config.data,
        run=config.run,
        port=config.port,
        password=config.password,
        peer_id=peer_id,
        installation=Installation.find(config.bin),
    )
    database = PostgreSQL(settings, identity)
    me = Me(instance, ID_KEY, config.singleton)
    peer = Peer(registry, config.service, me, database, SystemClock(), HttpNeighbours(identity))
    leaving, registered, left = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def be_present() -> None:
        async with registry.registered(config.service, instance, leader_type=LeaderType.MANUAL):
            registered.set()
            await leaving.wait()
        left.set()
        await asyncio.Event().wait()

    async def leave() -> None:
        await peer.stop()
        leaving.set()
        await left.wait()

    api = management_api("postgres", peer, database, leave)
    async with supervisor() as spawn:
        spawn("postgres server", database.keep_running())
        spawn("replication", database.keep_in_step())
        spawn("certificate", database.keep_certificate())
        spawn("presence", be_present())
        try:
            async with listen(api, "0.0.0.0", config.management_port, tls=identity):
                await registered.wait()
                spawn("follow the cluster", peer.follow())
                spawn("look at the neighbours", peer.look())
                spawn("act", peer.act())
                yield
                leaving.set()  # out of the directory first: nobody is to be sent to a server that stops
                with suppress(TimeoutError):  # when a whole node stops, the directory may be gone already
                    async with asyncio.timeout(LEAVE_LIMIT.total_seconds()):
                        await left.wait()
        finally:
            await peer.stop()


@asynccontextmanager
async def provider_running(config: Config, registry: Registry, identity: Identity) -> AsyncIterator[None]:
    """Provision databases while the block is open. Found under `<service>-api` once the database accepts writes."""

    async def connect() -> Connection:
        return await AsyncConnection.connect(
            host=config.host,
            port=config.host_port,
            user=SUPERUSER,
            password=config.password,
            dbname="postgres",
            sslmode="verify-full",
            sslrootcert=str(identity.ca_path),
            connect_timeout=5,
            application_name="postgres-api",
            autocommit=True,
        )

    await _cluster_set_up(registry, config.service)
    await retrying(lambda: _check_writable(connect), on=psycopg.Error, policy=RECONNECT)
    api = provisioning_api(config.service, connect)
    async with listen(api, "0.0.0.0", config.port, tls=identity) as (_, port):
        own = instance_from_environment(config.environment, port, "https")
        async with registry.registered(f"{config.service}-api", own):
            yield


async def _cluster_set_up(registry: Registry, service: str) -> None:
    """Wait until the cluster has a state that allows writes (see spec/appliances section 5.2)."""
    async with aclosing(registry.watch(service)) as events:
        async for event in events:
            if event.kind is EventKind.SERVICE_META and event.service_meta is not None:
                try:
                    state = parse_state(event.service_meta.data)
                except BadClusterState as error:
                    log.warning("cannot read the cluster state", extra={"error": error})
                    continue
                if state.singleton or state.sync is not None:
                    return


async def _check_writable(connect: Connect) -> None:
    async with await connect() as connection:
        row = await (await connection.execute("SHOW default_transaction_read_only")).fetchone()
        if row is None or row[0] != "off":
            raise psycopg.OperationalError("the database is read-only")


@asynccontextmanager
async def running(kind: str, environ: Mapping[str, str]) -> AsyncIterator[None]:
    config = Config.from_environment(environ, 5432 if kind == "postgres" else 3000)
    try:
        identity = Identity.from_environment(environ)
    except FileNotFoundError as error:
        raise ConfigError(f"FLYNN_IDENTITY: {error}") from error
    body = database_running if kind == "postgres" else provider_running
    async with Discoverd.from_environment(environ) as registry, body(config, registry, identity):
        yield


def main() -> None:
    kind = sys.argv[1] if len(sys.argv) > 1 else "postgres"
    if kind not in ("postgres", "api") or len(sys.argv) > 2:
        print("usage: flynn-postgres {postgres|api}")
        sys.exit(2)
    component = "postgres" if kind == "postgres" else "postgres-api"
    run(component, lambda: running(kind, os.environ), grace=GRACE)


if __name__ == "__main__":
    main()
