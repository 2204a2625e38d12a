"""Log sinks: where the logs of all apps are copied to. The scheduler brings them to the hosts."""

from __future__ import annotations

from datetime import datetime

from flynn.controller import validation
from flynn.controller.database import Database, jsonb
from flynn.controller.ids import given, new_id, sought
from flynn.controller.store.formations import EARLIEST
from flynn.types.codec import replace
from flynn.types.errors import NotFound, ObjectExists, ValidationError
from flynn.types.event import EventType
from flynn.types.sink import Sink

COLUMNS = "sink_id AS id, kind, config, created_at, updated_at"
NEWEST_FIRST = "ORDER BY updated_at DESC, sink_id"


class SinkStore:
    """Sinks in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, sink: Sink) -> Sink:
        """Store a sink. Raises `ObjectExists`."""
        validation.required("kind", sink.kind)
        validation.one_of("kind", sink.kind, validation.SINK_KINDS)
        if not isinstance(sink.config, dict):
            raise ValidationError("config", "must be an object")
        async with self._database.transaction() as transaction:
            created = await transaction.one(
                Sink,
                "INSERT INTO sinks (sink_id, kind, config) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING"
                f" RETURNING {COLUMNS}",
                (given("id", sink.id) if sink.id else new_id(), sink.kind, jsonb(sink.config)),
            )
            if created is None:
                raise ObjectExists(f'sink with id "{sink.id}" already exists')
            transaction.emit(EventType.SINK, created.id, created)
        return created

    async def get(self, sink_id: str) -> Sink:
        """Return a live sink. Raises `NotFound`."""
        sink = await self._database.one(
            Sink,
            f"SELECT {COLUMNS} FROM sinks WHERE sink_id = %s AND deleted_at IS NULL",
            (sought("sink", sink_id),),
        )
        if sink is None:
            raise NotFound(f"sink {sink_id} not found")
        return sink

    async def all(self) -> list[Sink]:
        """Return all live sinks, most recently changed first."""
        return await self._database.all(Sink, f"SELECT {COLUMNS} FROM sinks WHERE deleted_at IS NULL {NEWEST_FIRST}")

    async def changed_since(self, since: datetime) -> list[Sink]:
        """Return the live sinks changed at or after a time, most recently changed first."""
        return await self._database.all(
            Sink,
            f"SELECT {COLUMNS} FROM sinks WHERE deleted_at IS NULL AND updated_at >= %s {NEWEST_FIRST}",
            (max(since, EARLIEST),),
        )

    async def delete(self, sink_id: str) -> Sink:
        """Remove a sink and return it as it was; followers are told by one without `config`."""
        async with self._database.transaction() as transaction:
            sink = await transaction.one(
                Sink,
                "UPDATE sinks SET deleted_at = now(), updated_at = now()"
                f" WHERE sink_id = %s AND deleted_at IS NULL RETURNING {COLUMNS}",
                (sought("sink", sink_id),),
            )
            if sink is None:
                raise NotFound(f"sink {sink_id} not found")
            transaction.emit(EventType.SINK_DELETION, sink.id, replace(sink, config=None))
        return sink
