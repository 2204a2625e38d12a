"""Bring the schema up to date: numbered SQL files, each applied once, append-only.

Why not a migration library: the ones kept up (yoyo, alembic) are synchronous, and yoyo's lock is a row that a killed
process leaves behind, after which nobody starts any more. Here the lock is an advisory one, which the server drops with
the connection, and a step and the record of it are one transaction.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from flynn.controller.database import Connection, Database, translated_errors

log = logging.getLogger(__name__)

MIGRATION_LOCK = 0x6D696772


@dataclass(frozen=True, slots=True)
class Migration:
    """One step; `id` is the number its file name begins with."""

    id: int
    name: str
    sql: str


def migrations() -> list[Migration]:
    """Return all steps in order."""
    return sorted(
        (_migration(file) for file in files("flynn.controller.migrations").iterdir() if file.name.endswith(".sql")),
        key=lambda step: step.id,
    )


def _migration(file: Traversable) -> Migration:
    name = file.name.removesuffix(".sql")
    return Migration(int(name.partition("_")[0]), name, file.read_text())


async def migrate(database: Database) -> list[str]:
    """Apply the steps the database does not have yet and return their names. Several processes may try at once."""
    connection = await database.dedicated()
    try:
        with translated_errors():
            return await _migrate(connection)
    finally:
        await connection.close()


async def _migrate(connection: Connection) -> list[str]:
    await connection.execute("SET statement_timeout = 0")
    await connection.execute("SELECT pg_advisory_lock(%s)", (MIGRATION_LOCK,))
    await connection.execute("CREATE TABLE IF NOT EXISTS schema_migrations (id bigint PRIMARY KEY)")
    done = {row[0] for row in await (await connection.execute("SELECT id FROM schema_migrations")).fetchall()}
    applied = []
    for step in migrations():
        if step.id in done:
            continue
        async with connection.transaction():
            await connection.execute(step.sql.encode())
            await connection.execute("INSERT INTO schema_migrations (id) VALUES (%s)", (step.id,))
        log.info("migrated", extra={"step": step.name})
        applied.append(step.name)
    return applied
