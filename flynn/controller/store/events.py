"""Stored events. They are written with the transaction that causes them, see `database.Transaction.emit`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from flynn.controller.database import Database
from flynn.types.errors import NotFound
from flynn.types.event import Event

COLUMNS = "event_id AS id, app_id AS app, object_type, object_id, data, created_at"
BATCH = 500  # rows of one round trip; a replay of a long history never sits in memory as a whole


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events someone wants; empty means any."""

    app_id: str = ""
    object_types: frozenset[str] = frozenset()
    object_id: str = ""

    def admits(self, event: Event) -> bool:
        """Tell whether the event is wanted. A filter by app never admits one without an app."""
        return (
            (not self.app_id or event.app == self.app_id)
            and (not self.object_types or event.object_type in self.object_types)
            and (not self.object_id or event.object_id == self.object_id)
        )

    def conditions(self) -> tuple[list[str], list[object]]:
        """Return the same as SQL."""
        conditions: list[str] = []
        values: list[object] = []
        if self.app_id:
            conditions.append("app_id = %s")
            values.append(self.app_id)
        if self.object_types:
            conditions.append("object_type = ANY(%s)")
            values.append(sorted(self.object_types))
        if self.object_id:
            conditions.append("object_id = %s")
            values.append(self.object_id)
        return conditions, values


class EventStore:
    """Events in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, event_id: int) -> Event:
        """Return one event. Raises `NotFound`."""
        event = await self._database.one(Event, f"SELECT {COLUMNS} FROM events WHERE event_id = %s", (event_id,))
        if event is None:
            raise NotFound(f"event {event_id} not found")
        return event

    async def all(
        self,
        wanted: EventFilter,
        *,
        before_id: int | None = None,
        since_id: int | None = None,
        count: int | None = None,
    ) -> list[Event]:
        """Return events, newest first; both ids are exclusive, no count means all."""
        conditions, values = wanted.conditions()
        if before_id is not None:
            conditions.append("event_id < %s")
            values.append(before_id)
        if since_id is not None:
            conditions.append("event_id > %s")
            values.append(since_id)
        return await self._select(conditions, values, "event_id DESC", count)

    async def after(self, wanted: EventFilter, event_id: int) -> AsyncIterator[Event]:
        """Yield the events after one, oldest first, up to the newest at the time of asking for the last batch."""
        conditions, values = wanted.conditions()
        while True:
            batch = await self._select([*conditions, "event_id > %s"], [*values, event_id], "event_id", BATCH)
            for event in batch:
                event_id = event.id
                yield event
            if len(batch) < BATCH:
                return

    async def newest_id(self) -> int:
        """Return the id of the newest event, 0 if there is none."""
        row = await self._database.one(dict, "SELECT coalesce(max(event_id), 0) AS id FROM events")
        return int(row["id"]) if row else 0

    async def _select(
        self, conditions: Sequence[str], values: Sequence[object], order: str, count: int | None
    ) -> list[Event]:
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        limit = " LIMIT %s" if count else ""
        query = f"SELECT {COLUMNS} FROM events{where} ORDER BY {order}{limit}"
        return await self._database.all(Event, query, [*values, *([count] if count else [])])
