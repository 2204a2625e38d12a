"""Databases for apps: the provider's rules and its HTTP surface. See spec/appliances section 7."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
from psycopg import AsyncConnection, sql

from flynn.http.server import Api, Request
from flynn.identity import ANYONE, access
from flynn.types.errors import ServiceUnavailable, UnknownError, ValidationError
from flynn.types.provider import Provisioned

log = logging.getLogger(__name__)

PREFIX = "/databases/"
NAME = re.compile(r"[0-9a-f]{32}")
PORT = 5432

Connection = AsyncConnection[tuple[Any, ...]]
Connect = Callable[[], Awaitable[Connection]]
CALLERS = access("app:controller", "operator", "host")


def parse_id(resource_id: str) -> tuple[str, str]:
    """User and database of a resource id. Only names of our own making pass: nobody deletes `postgres`."""
    user, _, database = resource_id.removeprefix(PREFIX).partition(":")
    if not NAME.fullmatch(user) or not NAME.fullmatch(database):
        raise ValidationError("id", "is invalid")
    return user, database


def provisioned(service: str, user: str, password: str, database: str) -> Provisioned:
    host = f"leader.{service}.discoverd"
    return Provisioned(
        id=f"{PREFIX}{user}:{database}",
        env={
            "FLYNN_POSTGRES": service,
            "PGHOST": host,
            "PGUSER": user,
            "PGPASSWORD": password,
            "PGDATABASE": database,
            "DATABASE_URL": f"postgres://{user}:{password}@{host}:{PORT}/{database}",
        },
    )


async def create_database(connection: Connection, user: str, password: str, database: str) -> None:
    """A role and a database that it owns and nobody else can enter; what was made is undone on failure."""
    role, name = sql.Identifier(user), sql.Identifier(database)
    # Only the verifier is sent: passwords do not appear in any server's log.
    secret = connection.pgconn.encrypt_password(password.encode(), user.encode(), b"scram-sha-256").decode()
    await connection.execute(sql.SQL("CREATE ROLE {} WITH LOGIN PASSWORD {}").format(role, sql.Literal(secret)))
    try:
        # The owner, not only somebody with all privileges: since version 15 only owners may use the schema `public`.
        await connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(name, role))
        await connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(name))
    except psycopg.Error:
        await drop_database(connection, user, database)
        raise


async def drop_database(connection: Connection, user: str, database: str) -> None:
    """Remove both, whoever is connected. Absent ones are no error, so that a broken-off removal can be repeated."""
    await connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(database)))
    await connection.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(user)))


class _Refused:
    """Turns what the database says into answers that may be tried again; the details go to the log only."""

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, psycopg.OperationalError | OSError):
            log.warning("the database is not reachable", extra={"error": error})
            raise ServiceUnavailable("the database cannot be reached") from error
        if isinstance(error, psycopg.Error):
            log.error("the database refused", extra={"error": error})
            raise UnknownError("Something went wrong", retry=True) from error


def provisioning_api(service: str, connect: Connect) -> Api:
    """The provider. `connect` opens a superuser connection in autocommit mode, which is closed after each request."""

    async def post_database(request: Request) -> Provisioned:
        # The body is the resource's configuration, of which PostgreSQL databases have none.
        user, password, database = (secrets.token_hex(16) for _ in range(3))
        async with _Refused(), await connect() as connection:
            await create_database(connection, user, password, database)
        log.info("database created", extra={"database": database, "user": user})
        return provisioned(service, user, password, database)

    async def delete_database(request: Request) -> None:
        user, database = parse_id(request.query("id"))
        async with _Refused(), await connect() as connection:
            await drop_database(connection, user, database)
        log.info("database deleted", extra={"database": database, "user": user})

    async def ping(request: Request) -> None:
        async with _Refused(), await connect() as connection:
            await connection.execute("SELECT 1")

    api = Api("postgres-api")
    api.route("POST", "/databases", post_database, allow=CALLERS)
    api.route("DELETE", "/databases", delete_database, allow=CALLERS)
    api.route("GET", "/ping", ping, allow=ANYONE)
    return api
