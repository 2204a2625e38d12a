"""Volumes as the scheduler reports them."""

from __future__ import annotations

from datetime import datetime

from flynn.controller import validation
from flynn.controller.database import Database, jsonb
from flynn.controller.ids import given, sought
from flynn.controller.store.formations import EARLIEST
from flynn.types.errors import NotFound
from flynn.types.event import EventType
from flynn.types.volume import Volume

COLUMNS = (
    "volume_id AS id, host_id, type, state, path, delete_on_stop, app_id AS app, release_id AS release, job_id AS job,"
    " job_type, meta, created_at, updated_at, decommissioned_at"
)
NEWEST_FIRST = "ORDER BY updated_at DESC, volume_id"


class VolumeStore:
    """Volumes in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, volume: Volume) -> Volume:
        """Record a volume; the whole row is replaced, but for when it was made and decommissioned."""
        validation.one_of("type", volume.type, validation.VOLUME_TYPES)
        validation.one_of("state", volume.state, validation.VOLUME_STATES)
        async with self._database.transaction() as transaction:
            stored = await transaction.one(
                Volume,
                f"""
                INSERT INTO volumes (volume_id, host_id, type, state, app_id, release_id, job_id, job_type, path,
                    delete_on_stop, meta)
                VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
                ON CONFLICT (volume_id) DO UPDATE SET host_id = EXCLUDED.host_id, state = EXCLUDED.state,
                    job_id = EXCLUDED.job_id, job_type = EXCLUDED.job_type, meta = EXCLUDED.meta, updated_at = now()
                RETURNING {COLUMNS}
                """,
                (
                    given("id", volume.id),
                    volume.host_id,
                    volume.type,
                    volume.state,
                    given("app", volume.app) if volume.app else None,
                    given("release", volume.release) if volume.release else None,
                    given("job", volume.job) if volume.job else None,
                    volume.job_type,
                    volume.path,
                    volume.delete_on_stop,
                    jsonb(volume.meta or None),
                ),
            )
            assert stored is not None
            transaction.emit(EventType.VOLUME, stored.id, stored, app=stored.app)
        return stored

    async def decommission(self, app_id: str, volume_id: str) -> Volume:
        """Mark a volume of an app as not to be used again. Raises `NotFound`."""
        async with self._database.transaction() as transaction:
            volume = await transaction.one(
                Volume,
                "UPDATE volumes SET decommissioned_at = coalesce(decommissioned_at, now()), updated_at = now()"
                f" WHERE volume_id = %s AND app_id = %s RETURNING {COLUMNS}",
                (sought("volume", volume_id), app_id),
            )
            if volume is None:
                raise NotFound(f"volume {volume_id} not found")
            transaction.emit(EventType.VOLUME, volume.id, volume, app=volume.app)
        return volume

    async def get(self, app_id: str, volume_id: str) -> Volume:
        """Return a volume of an app. Raises `NotFound`."""
        volume = await self.find(volume_id)
        if volume is None or volume.app != app_id:
            raise NotFound(f"volume {volume_id} not found")
        return volume

    async def find(self, volume_id: str) -> Volume | None:
        """Return any volume, or None."""
        return await self._database.one(
            Volume, f"SELECT {COLUMNS} FROM volumes WHERE volume_id = %s", (sought("volume", volume_id),)
        )

    async def all(self, app_id: str = "") -> list[Volume]:
        """Return the volumes of one app or of all, most recently changed first."""
        condition, params = ("WHERE app_id = %s", (app_id,)) if app_id else ("", ())
        return await self._database.all(Volume, f"SELECT {COLUMNS} FROM volumes {condition} {NEWEST_FIRST}", params)

    async def changed_since(self, since: datetime) -> list[Volume]:
        """Return the volumes changed at or after a time, most recently changed first."""
        return await self._database.all(
            Volume, f"SELECT {COLUMNS} FROM volumes WHERE updated_at >= %s {NEWEST_FIRST}", (max(since, EARLIEST),)
        )
