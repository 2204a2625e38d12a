"""Releases: what an app consists of at one time. Their removal is in `removal`."""

from __future__ import annotations

from flynn.controller.database import Database, Transaction, jsonb
from flynn.controller.ids import given, new_id, sought
from flynn.controller.validation import normalized_release
from flynn.types.codec import replace
from flynn.types.errors import NotFound, ObjectExists, ValidationError
from flynn.types.event import EventType
from flynn.types.release import Release

COLUMNS = (
    "r.release_id AS id, r.app_id, r.env, r.meta, r.processes, r.created_at,"
    " linked.ids AS artifacts, linked.ids ->> 0 AS artifact"
)
TABLES = """
    releases r LEFT JOIN LATERAL (
        SELECT jsonb_agg(ra.artifact_id ORDER BY ra.index) AS ids
        FROM release_artifacts ra WHERE ra.release_id = r.release_id AND ra.deleted_at IS NULL
    ) linked ON true
"""


async def release_in(transaction: Transaction | Database, release_id: str) -> Release | None:
    """Return a live release, or None."""
    return await transaction.one(
        Release,
        f"SELECT {COLUMNS} FROM {TABLES} WHERE r.release_id = %s AND r.deleted_at IS NULL",
        (release_id,),
    )


class ReleaseStore:
    """Releases in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, release: Release) -> Release:
        """Store a release of the app `release.app_id`, normalized."""
        release = normalized_release(release)
        release = replace(
            release,
            id=given("id", release.id) if release.id else new_id(),
            app_id=given("app_id", release.app_id),
            artifacts=[given("artifacts", artifact) for artifact in release.artifacts],
        )
        async with self._database.transaction() as transaction:
            await _check_references(transaction, release)
            created_at = await transaction.value(
                "INSERT INTO releases (release_id, app_id, env, processes, meta) VALUES (%s, %s, %s, %s, %s)"
                " ON CONFLICT (release_id) DO NOTHING RETURNING created_at",
                (
                    release.id,
                    release.app_id,
                    jsonb(release.env or None),
                    jsonb(release.processes or None),
                    jsonb(release.meta or None),
                ),
            )
            if created_at is None:
                raise ObjectExists(f'release with id "{release.id}" already exists')
            for index, artifact in enumerate(release.artifacts):
                await transaction.execute(
                    "INSERT INTO release_artifacts (release_id, artifact_id, index) VALUES (%s, %s, %s)",
                    (release.id, artifact, index),
                )
            release = replace(release, created_at=created_at)
            transaction.emit(EventType.RELEASE, release.id, release, app=release.app_id)
        return release

    async def get(self, release_id: str) -> Release:
        """Return a live release. Raises `NotFound`."""
        release = await release_in(self._database, sought("release", release_id))
        if release is None:
            raise NotFound(f"release {release_id} not found")
        return release

    async def all(self, app_id: str | None = None) -> list[Release]:
        """Return live releases of one app or of all, newest first."""
        condition, params = ("AND r.app_id = %s", (app_id,)) if app_id else ("", ())
        return await self._database.all(
            Release,
            f"SELECT {COLUMNS} FROM {TABLES} WHERE r.deleted_at IS NULL {condition}"
            " ORDER BY r.created_at DESC, r.release_id",
            params,
        )


async def _check_references(transaction: Transaction, release: Release) -> None:
    if await transaction.value("SELECT 1 FROM apps WHERE app_id = %s", (release.app_id,)) is None:
        raise ValidationError("app_id", f'names no app: "{release.app_id}"')
    known = set(
        await transaction.all(
            str,
            "SELECT artifact_id FROM artifacts WHERE artifact_id = ANY(%s::uuid[]) AND deleted_at IS NULL",
            (release.artifacts,),
        )
    )
    for artifact in release.artifacts:
        if artifact not in known:
            raise ValidationError("artifacts", f'names no artifact: "{artifact}"')
