"""PostgreSQL for the controller: pool, transactions, rows as wire types, and errors a client can act on.

A transaction collects its events and writes them last, under one advisory lock that is held until the commit. So event
ids become visible in the order of their numbers, and a reader that has seen event N never has to look below N again.

When the leader is lost, requests in flight fail with `ServiceUnavailable` (which clients repeat), idle connections are
found dead when they are next taken, and new ones go wherever `leader.postgres.discoverd` points by then.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import msgspec
import psycopg
from psycopg import AsyncConnection, errors
from psycopg.conninfo import make_conninfo
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb, set_json_loads
from psycopg.types.string import TextLoader
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests

from flynn.types.codec import encode
from flynn.types.errors import ApiError, Conflict, ServiceUnavailable, ValidationError
from flynn.types.event import EventType

log = logging.getLogger(__name__)

T = TypeVar("T")
Params = Sequence[Any] | Mapping[str, Any]
Connection = AsyncConnection[tuple[Any, ...]]

POOL_SIZE = (
    6  # requests wait for the database far less than they are waited for; every connection costs the server 10 MB
)
ACQUIRE_TIMEOUT = timedelta(seconds=8)  # below the 10 s for which clients repeat a refused request
CONNECT_TIMEOUT = timedelta(seconds=3)
GIVE_UP_CONNECTING = timedelta(seconds=3)  # the pool then starts afresh at the next request, without a grown back-off
STATEMENT_TIMEOUT = timedelta(seconds=30)
EVENT_LOCK = 0x666C796E  # any number that nobody else takes


@dataclass(frozen=True, slots=True)
class PendingEvent:
    """An event to be written with the transaction that caused it."""

    type: EventType
    object_id: str
    data: object
    app: str | None = None
    op: str = ""
    unique_id: str | None = None  # told at most once


class Transaction:
    """One decision: what it reads and writes, and the events it causes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._events: list[PendingEvent] = []

    async def execute(self, query: str, params: Params = ()) -> int:
        """Run a statement and return the number of rows it touched."""
        cursor = await self._connection.execute(query, params)
        return cursor.rowcount

    async def all(self, type: type[T], query: str, params: Params = ()) -> list[T]:
        """Return every row as a `type`."""
        return await _all(self._connection, type, query, params)

    async def one(self, type: type[T], query: str, params: Params = ()) -> T | None:
        """Return the first row as a `type`, or None."""
        rows = await _all(self._connection, type, query, params)
        return rows[0] if rows else None

    async def value(self, query: str, params: Params = ()) -> Any:
        """Return the first column of the first row, or None."""
        cursor = await self._connection.execute(query, params)
        row = await cursor.fetchone()
        return row[0] if row else None

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """Let a part fail alone: what it wrote and emitted is undone, and the error goes on."""
        emitted = len(self._events)
        try:
            async with self._connection.transaction():
                yield
        except BaseException:
            del self._events[emitted:]
            raise

    def emit(
        self,
        type: EventType,
        object_id: str,
        data: object,
        *,
        app: str | None = None,
        op: str = "",
        unique_id: str | None = None,
    ) -> None:
        """Have an event written with this transaction."""
        self._events.append(PendingEvent(type, object_id, data, app or None, op, unique_id))

    async def write_events(self) -> None:
        """Write what was emitted. Nothing may be locked after this, or two transactions could wait for each other."""
        if not self._events:
            return
        await self._connection.execute("SELECT pg_advisory_xact_lock(%s)", (EVENT_LOCK,))
        async with self._connection.cursor() as cursor:
            await cursor.executemany(
                "INSERT INTO events (app_id, object_type, object_id, data, op, unique_id)"
                " VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (unique_id) DO NOTHING",
                [(e.app, e.type.value, e.object_id, jsonb(e.data), e.op or None, e.unique_id) for e in self._events],
            )
        self._events.clear()


@dataclass(slots=True)
class Database:
    """The controller's database, connected while inside `connected`."""

    conninfo: str
    pool_size: int = POOL_SIZE
    _pool: AsyncConnectionPool[Connection] = field(init=False)

    def __post_init__(self) -> None:
        self.conninfo = make_conninfo(
            self.conninfo,
            connect_timeout=int(CONNECT_TIMEOUT.total_seconds()),
            target_session_attrs="read-write",  # a leader that was just demoted is none
            keepalives_idle=3,  # a primary without power is noticed after 6 s, as any other neighbour
            keepalives_interval=1,
            keepalives_count=3,
            tcp_user_timeout=6_000,
            options=f"-c timezone=UTC -c statement_timeout={int(STATEMENT_TIMEOUT.total_seconds() * 1000)}",
        )

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Database]:
        """Hold the pool open. Connections are made as they are needed; the server need not be there yet."""
        self._pool = AsyncConnectionPool(
            self.conninfo,
            open=False,
            min_size=1,
            max_size=self.pool_size,
            timeout=ACQUIRE_TIMEOUT.total_seconds(),
            reconnect_timeout=GIVE_UP_CONNECTING.total_seconds(),
            max_idle=60,
            max_waiting=500,
            configure=_configure,
            check=AsyncConnectionPool.check_connection,
        )
        await self._pool.open(wait=False)
        try:
            yield self
        finally:
            await self._pool.close()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """Run one decision: committed with its events on leaving, rolled back on any error."""
        with translated_errors():
            async with self._pool.connection() as connection, connection.transaction():
                transaction = Transaction(connection)
                yield transaction
                await transaction.write_events()

    async def all(self, type: type[T], query: str, params: Params = ()) -> list[T]:
        """Return every row as a `type`."""
        with translated_errors():
            async with self._pool.connection() as connection:
                return await _all(connection, type, query, params)

    async def one(self, type: type[T], query: str, params: Params = ()) -> T | None:
        """Return the first row as a `type`, or None."""
        rows = await self.all(type, query, params)
        return rows[0] if rows else None

    async def execute(self, query: str, params: Params = ()) -> int:
        """Run one statement and return the number of rows it touched."""
        with translated_errors():
            async with self._pool.connection() as connection:
                return (await connection.execute(query, params)).rowcount

    async def ping(self) -> None:
        """Return if the database answers and takes writes. Raises `ServiceUnavailable`."""
        with translated_errors():
            async with self._pool.connection(timeout=2) as connection:
                cursor = await connection.execute("SELECT pg_is_in_recovery()")
                if (await cursor.fetchone() or (True,))[0]:
                    raise ServiceUnavailable("the database is read-only")

    async def dedicated(self) -> Connection:
        """Return a connection outside the pool, in autocommit, for LISTEN; the caller closes it."""
        with translated_errors():
            connection = await AsyncConnection.connect(self.conninfo, autocommit=True, row_factory=tuple_row)
            await _configure(connection)
            return connection


async def _configure(connection: Connection) -> None:
    await connection.set_autocommit(True)  # single statements need no round trips for BEGIN and COMMIT
    connection.adapters.register_loader("uuid", TextLoader)
    set_json_loads(msgspec.json.decode, connection)


async def _all(connection: Connection, type: type[T], query: str, params: Params) -> list[T]:
    cursor = await connection.execute(query, params)
    build = row_builder([column.name for column in cursor.description or ()], type)
    return [build(row) for row in await cursor.fetchall()]


def row_builder(columns: Sequence[str], type: type[T]) -> Callable[[Sequence[Any]], T]:
    """Return a function from rows to `type`; NULL means the field's default. One column and no record: its value."""
    if len(columns) == 1 and not issubclass(type, msgspec.Struct | dict):
        return lambda row: msgspec.convert(row[0], type)

    def build(row: Sequence[Any]) -> T:
        present = {name: value for name, value in zip(columns, row, strict=True) if value is not None}
        return msgspec.convert(present, type)

    return build


def jsonb(value: object) -> Jsonb | None:
    """Wrap a wire value for a jsonb column; None stays NULL."""
    return None if value is None else Jsonb(value, dumps=encode)


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn the driver's errors into `ApiError`s: by class, never by text.

    What breaks a rule of the schema is the client's mistake; what speaks of the connection is ours, and worth a retry.
    """
    try:
        yield
    except ApiError:
        raise
    except (PoolTimeout, TooManyRequests) as error:
        raise ServiceUnavailable("the database cannot be reached right now") from error
    except errors.UniqueViolation as error:
        raise Conflict(error.diag.message_detail or "already exists") from error
    except errors.ForeignKeyViolation as error:
        raise ValidationError("", f"refers to something unknown: {error.diag.message_detail}") from error
    except errors.CheckViolation as error:
        raise ValidationError("", error.diag.message_primary or "not allowed") from error
    except (errors.ReadOnlySqlTransaction, errors.QueryCanceled) as error:
        raise ServiceUnavailable("the database does not take writes right now") from error
    except (psycopg.IntegrityError, psycopg.DataError) as error:
        raise ValidationError("", str(error).partition("\n")[0]) from error
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        raise ServiceUnavailable("the database connection was lost") from error
