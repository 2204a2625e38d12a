"""PostgreSQL as a sirenia database.

`apply` brings the server to a configuration; `keep_running` starts it again when it ends by itself; `keep_certificate`
hands renewed certificates on. All of them, and `stop`, take turns by one lock.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
from psycopg import AsyncConnection, sql

from flynn.aio.backoff import Backoff
from flynn.appliances.postgresql.configuration import (
    LOCAL_USER,
    SUPERUSER,
    ServerSettings,
    pg_hba_conf,
    postgresql_conf,
)
from flynn.appliances.postgresql.postmaster import Installation, Postmaster, ensure_data_directory
from flynn.appliances.sirenia.cluster_state import Role
from flynn.appliances.sirenia.database import DatabaseConfig, DatabaseError, DatabaseInfo
from flynn.identity import Identity

log = logging.getLogger(__name__)

START_LIMIT = timedelta(minutes=5)  # replaying the log after a crash takes its time
START_POLL = timedelta(milliseconds=50)
INFO_LIMIT = timedelta(seconds=2)  # a status never waits longer for the server
CERTIFICATE_CHECK = timedelta(seconds=60)  # certificates are renewed hours before they end
RESTART = Backoff(first=timedelta(milliseconds=100), factor=2, limit=timedelta(seconds=10))
STEADY = timedelta(minutes=1)  # a server that ran so long starts with the shortest pause again

Connection = AsyncConnection[tuple[Any, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    data: Path  # the volume; the cluster is in its directory `db`
    run: Path  # sockets and certificate copies, reachable for us and the server only
    port: int
    password: str  # of the superuser
    peer_id: str
    installation: Installation


class PostgreSQL:
    """Implements `sirenia.database.Database`. `keep_running` and `keep_certificate` belong to a supervisor."""

    zero_position = "0/00000000"

    def __init__(self, config: ServerConfig, identity: Identity | None) -> None:
        self._config = config
        self._identity = identity
        self._wanted: DatabaseConfig | None = None
        self._postmaster: Postmaster | None = None
        self._became_ready = asyncio.Event()  # the superuser can come in with the password of the environment
        self._lock = asyncio.Lock()  # one start, stop or reload at a time
        self._probe: Connection | None = None
        self._probing = asyncio.Lock()  # one query at a time on the probe's connection

    # --- what sirenia asks for

    async def apply(self, config: DatabaseConfig) -> None:
        if config.role not in (Role.PRIMARY, Role.NONE):
            raise DatabaseError(f"this database cannot be {config.role} yet: it does not replicate")
        async with self._lock:
            self._wanted = config
            if config.role is Role.NONE:
                await self._stop()
            elif not self._running:
                await self._start()

    async def stop(self) -> None:
        async with self._lock:
            self._wanted = None
            await self._stop()

    async def info(self) -> DatabaseInfo:
        running = self._running
        position, user_exists, read_write = "", False, False
        if running:
            try:
                async with asyncio.timeout(INFO_LIMIT.total_seconds()), self._probing:
                    position, user_exists, read_write = await self._ask()
            except (psycopg.Error, TimeoutError, OSError) as error:
                log.debug("the server does not answer", extra={"error": error})
        return DatabaseInfo(
            config=self._wanted,
            running=running,
            xlog=position,
            user_exists=user_exists,
            read_write=read_write
            and self._became_ready.is_set(),  # those who wait for this connect as the superuser next
        )

    # --- endless tasks

    async def keep_running(self) -> None:
        """Start the server again whenever it ends without having been asked to.

        A server that never became ready is the caller's of `apply`, who was told and tries again.
        """
        loop = asyncio.get_running_loop()
        delays = RESTART.delays()
        while True:
            await self._became_ready.wait()
            postmaster, began = self._postmaster, loop.time()
            assert postmaster is not None  # the event is cleared together with it
            status = await postmaster.exited()
            async with self._lock:
                if self._postmaster is not postmaster:
                    continue  # it was stopped on purpose, and maybe another one runs by now
                self._became_ready.clear()
                log.error("the server ended by itself", extra={"pid": postmaster.pid, "status": status})
            if loop.time() - began > STEADY.total_seconds():
                delays = RESTART.delays()
            back = False
            while not back:
                await asyncio.sleep(next(delays))
                back = await self._back_again()

    async def _back_again(self) -> bool:
        """Start the server if it is wanted and down; False if that failed."""
        async with self._lock:
            if self._running or self._wanted is None or self._wanted.role is Role.NONE:
                return True
            try:
                await self._start()
            except DatabaseError as error:
                log.error("the server did not start again", extra={"error": error})
                return False
            return True

    async def keep_certificate(self) -> None:
        """Let the server present a renewed certificate to new connections."""
        if self._identity is None:
            await asyncio.Event().wait()
            return
        while True:
            await asyncio.sleep(CERTIFICATE_CHECK.total_seconds())
            async with self._lock:
                if self._copy_certificate() and self._postmaster is not None and self._postmaster.running:
                    log.info("certificate renewed")
                    self._postmaster.reload()

    # --- the steps; the lock is held

    @property
    def _running(self) -> bool:
        return self._postmaster is not None and self._postmaster.running

    async def _start(self) -> None:
        config = self._config
        data = config.data / "db"
        try:
            os.chmod(config.data, 0o755)  # the server's user has to get through to its own directory
            config.run.mkdir(mode=0o700, parents=True, exist_ok=True)
            config.installation.own(config.run)
            await ensure_data_directory(config.installation, data)
            self._copy_certificate()
            self._write(data / "pg_hba.conf", pg_hba_conf())
            self._write(data / "postgresql.conf", postgresql_conf(self._settings()))
            self._postmaster = await Postmaster.start(config.installation, data)
        except OSError as error:
            raise DatabaseError(f"cannot start the server: {error}") from error
        await self._wait_until_ready(self._postmaster)
        await self._ensure_superuser()
        self._became_ready.set()
        log.info("the server is ready", extra={"pid": self._postmaster.pid, "port": config.port})

    async def _stop(self) -> None:
        postmaster, self._postmaster = self._postmaster, None
        self._became_ready.clear()
        await self._close_probe()
        if postmaster is not None:
            await postmaster.stop()
            log.info("the server has stopped")

    def _settings(self) -> ServerSettings:
        config = self._config
        return ServerSettings(
            port=config.port,
            socket_directory=config.run,
            certificate=config.run / "server.crt" if self._identity else None,
            key=config.run / "server.key" if self._identity else None,
            peer_id=config.peer_id,
            extension_whitelist=config.installation.extension_whitelist,
        )

    def _copy_certificate(self) -> bool:
        """Copy the identity to where the server's user can read it; returns whether it is a new one."""
        if self._identity is None:
            return False
        new = False
        # The key first: the server reads both at one moment, when it is told to, after both are in place.
        for source, target in (("key.pem", "server.key"), ("cert.pem", "server.crt")):
            content = (self._identity.directory / source).read_text()
            path = self._config.run / target
            if not path.exists() or path.read_text() != content:
                self._write(path, content)
                new = True
        return new

    def _write(self, path: Path, content: str) -> None:
        beside = path.with_name(f".{path.name}.new")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._config.installation.own(beside)
        beside.rename(path)

    async def _wait_until_ready(self, postmaster: Postmaster) -> None:
        try:
            async with asyncio.timeout(START_LIMIT.total_seconds()):
                while True:
                    try:
                        async with self._local_connection() as connection:
                            await connection.execute("SELECT 1")
                        return
                    except (psycopg.Error, OSError) as error:
                        if not postmaster.running:
                            raise DatabaseError("the server ended during its start, its log tells why") from error
                    await asyncio.sleep(START_POLL.total_seconds())
        except TimeoutError as error:
            await postmaster.stop()
            raise DatabaseError(f"the server was not ready after {START_LIMIT}") from error

    async def _ensure_superuser(self) -> None:
        """The password in the environment is the truth: a changed one takes effect at the next start."""
        try:
            async with self._local_connection() as connection:
                secret = connection.pgconn.encrypt_password(
                    self._config.password.encode(), SUPERUSER.encode(), b"scram-sha-256"
                )
                known = await (
                    await connection.execute("SELECT rolpassword FROM pg_authid WHERE rolname = %s", [SUPERUSER])
                ).fetchone()
                verb = sql.SQL("CREATE" if known is None else "ALTER")
                await connection.execute("SET default_transaction_read_only = off")
                await connection.execute(
                    sql.SQL(
                        "{} ROLE {} WITH LOGIN SUPERUSER CREATEDB CREATEROLE REPLICATION BYPASSRLS PASSWORD {}"
                    ).format(verb, sql.Identifier(SUPERUSER), sql.Literal(secret.decode()))
                )
        except psycopg.Error as error:
            raise DatabaseError(f"cannot make the superuser: {error}") from error

    # --- questions

    @asynccontextmanager
    async def _local_connection(self) -> AsyncIterator[Connection]:
        connection = await self._connect()
        try:
            yield connection
        finally:
            await connection.close()

    async def _connect(self) -> Connection:
        return await AsyncConnection.connect(
            host=str(self._config.run),
            port=self._config.port,
            user=LOCAL_USER,
            dbname="postgres",
            application_name="flynn-postgres",
            connect_timeout=2,
            autocommit=True,
        )

    async def _ask(self) -> tuple[str, bool, bool]:
        """Log position, whether the superuser exists, whether writes are accepted."""
        if self._probe is None or self._probe.closed:
            self._probe = await self._connect()
        try:
            cursor = await self._probe.execute(
                "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()"
                " ELSE pg_current_wal_lsn() END::text,"
                " EXISTS (SELECT FROM pg_roles WHERE rolname = %s),"
                " (SELECT setting = 'off' FROM pg_settings WHERE name = 'default_transaction_read_only')"
                " AND NOT pg_is_in_recovery()",
                [SUPERUSER],
            )
            row = await cursor.fetchone()
        except BaseException:
            await self._close_probe()
            raise
        assert row is not None
        return str(row[0] or ""), bool(row[1]), bool(row[2])

    async def _close_probe(self) -> None:
        probe, self._probe = self._probe, None
        if probe is not None:
            await probe.close()
