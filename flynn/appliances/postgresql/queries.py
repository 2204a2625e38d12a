"""What the daemon asks of the server beside it, by SQL, and what the answers mean."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from psycopg import AsyncConnection, sql

from flynn.appliances.postgresql.configuration import LOCAL_USER, NOBODY, SUPERUSER

PROMOTE_SECONDS = 60
RELOAD_LIMIT = timedelta(seconds=2)
POLL = timedelta(milliseconds=10)

Connection = AsyncConnection[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server says when it is asked; the defaults are those of one that does not answer."""

    position: str = ""
    user_exists: bool = False
    read_write: bool = False
    standbys: tuple[str, ...] = ()  # who receives from it
    sender: tuple[str, int] | None = None  # from whom it receives
    timeline: int = 0


async def connect(sockets: Path, port: int) -> Connection:
    """Connect through the socket that only we can reach. Raises psycopg.Error."""
    return await AsyncConnection.connect(
        host=str(sockets),
        port=port,
        user=LOCAL_USER,
        dbname="postgres",
        application_name="flynn-postgres",
        connect_timeout=2,
        autocommit=True,
    )


async def ask(connection: Connection) -> Answer:
    cursor = await connection.execute(
        "SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()"
        " ELSE pg_current_wal_lsn() END)::text,"
        " EXISTS (SELECT FROM pg_roles WHERE rolname = %s),"
        " (SELECT setting = 'off' FROM pg_settings WHERE name = 'default_transaction_read_only')"
        " AND NOT pg_is_in_recovery(),"
        " ARRAY(SELECT application_name FROM pg_stat_replication WHERE state = 'streaming'),"
        # An idle upstream is asked for a sign of life after half of the receiver's timeout.
        " (SELECT ARRAY[sender_host, sender_port::text] FROM pg_stat_wal_receiver"
        "  WHERE status = 'streaming' AND last_msg_receipt_time > clock_timestamp() - interval '3 s'),"
        " CASE WHEN pg_is_in_recovery() THEN (SELECT received_tli FROM pg_stat_wal_receiver)"
        " ELSE ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int END",
        [SUPERUSER],
    )
    row = await cursor.fetchone()
    assert row is not None
    position, user_exists, read_write, standbys, sender, timeline = row
    return Answer(
        str(position or ""),
        bool(user_exists),
        bool(read_write),
        tuple(standbys),
        (sender[0], int(sender[1])) if sender and sender[0] else None,
        timeline or 0,
    )


async def end_of_log(connection: Connection) -> str:
    """How far its log goes: what a primary has on disk, what a standby has replayed; empty if it cannot tell yet."""
    cursor = await connection.execute(
        "SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END)::text"
    )
    row = await cursor.fetchone()
    return str(row[0]) if row and row[0] else ""


async def has_reached(connection: Connection, standby: str, position: str, *, as_sync: bool) -> bool:
    """Whether a standby that streams from it has so much on its disk (and counts as the sync)."""
    cursor = await connection.execute(
        "SELECT FROM pg_stat_replication WHERE application_name = %s AND state = 'streaming'"
        " AND flush_lsn >= %s::pg_lsn AND (sync_state = 'sync' OR NOT %s)",
        [standby, position, as_sync],
    )
    return await cursor.fetchone() is not None


async def waits_for_nobody_real(connection: Connection) -> tuple[bool, str]:
    """Whether a primary can confirm nothing any more, and how far its log goes.

    A new connection has the postmaster's configuration, and a sender's priority is set by the sender itself: so ask
    twice, over two connections.
    """
    cursor = await connection.execute(
        "SELECT current_setting('synchronous_standby_names') LIKE %s"
        " AND NOT EXISTS (SELECT FROM pg_stat_replication WHERE sync_priority > 0),"
        " pg_current_wal_flush_lsn()::text",
        [f"%{NOBODY}%"],
    )
    row = await cursor.fetchone()
    assert row is not None
    return bool(row[0]), str(row[1])


async def at_rest(connection: Connection) -> tuple[str, str]:
    """Wait until a standby without upstream has replayed all it has; what it had received, and what it has replayed."""
    last = None
    while True:
        # Idle: the log on disk has been replayed to its end, and there is no receiver to make it longer.
        cursor = await connection.execute(
            "SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver) AND EXISTS (SELECT FROM pg_stat_activity"
            " WHERE backend_type = 'startup' AND wait_event = 'RecoveryRetrieveRetryInterval'),"
            " coalesce(pg_last_wal_receive_lsn(), '0/0')::text, coalesce(pg_last_wal_replay_lsn(), '0/0')::text"
        )
        row = await cursor.fetchone()
        assert row is not None
        idle, received, replayed = row
        if idle and last == (received, replayed):
            return received, replayed
        last = (received, replayed) if idle else None
        await asyncio.sleep(POLL.total_seconds())


async def works_by(connection: Connection, sync: str) -> None:
    """Return when the server works by the name of the sync that is in its configuration. Raises TimeoutError."""
    async with asyncio.timeout(RELOAD_LIMIT.total_seconds()):
        while True:
            row = await (await connection.execute("SHOW synchronous_standby_names")).fetchone()
            if row is not None and sync in row[0]:
                return
            await asyncio.sleep(POLL.total_seconds())


async def promote(connection: Connection) -> bool:
    cursor = await connection.execute("SELECT pg_promote(true, %s)", [PROMOTE_SECONDS])
    row = await cursor.fetchone()
    return bool(row and row[0])


async def ensure_superuser(connection: Connection, password: str) -> None:
    """The password in the environment is the truth: a changed one takes effect at the next start."""
    secret = connection.pgconn.encrypt_password(password.encode(), SUPERUSER.encode(), b"scram-sha-256")
    known = await (
        await connection.execute("SELECT rolpassword FROM pg_authid WHERE rolname = %s", [SUPERUSER])
    ).fetchone()
    verb = sql.SQL("CREATE" if known is None else "ALTER")
    await connection.execute("SET default_transaction_read_only = off")
    # The sync copies us by means of this very role, so nobody can confirm it yet.
    await connection.execute("SET synchronous_commit = local")
    await connection.execute(
        sql.SQL("{} ROLE {} WITH LOGIN SUPERUSER CREATEDB CREATEROLE REPLICATION BYPASSRLS PASSWORD {}").format(
            verb, sql.Identifier(SUPERUSER), sql.Literal(secret.decode())
        )
    )
