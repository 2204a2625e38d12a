"""Artifacts: images and slugs by their manifests."""

from __future__ import annotations

from flynn.controller.database import Database, jsonb
from flynn.controller.ids import given, new_id, sought
from flynn.types.artifact import Artifact
from flynn.types.errors import NotFound, ObjectExists
from flynn.types.event import EventType

COLUMNS = "artifact_id AS id, type, uri, meta, manifest, hashes, size, layer_url_template, created_at"


class ArtifactStore:
    """Artifacts in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, artifact: Artifact) -> Artifact:
        """Store an artifact; one of the same type and URI is there only once, what it lacks is filled in."""
        artifact_id = given("id", artifact.id) if artifact.id else new_id()
        async with self._database.transaction() as transaction:
            if artifact.id and (
                await transaction.value(
                    "SELECT 1 FROM artifacts WHERE artifact_id = %s AND (type, uri) <> (%s, %s)",
                    (artifact_id, artifact.type, artifact.uri),
                )
            ):
                raise ObjectExists(f'artifact with id "{artifact_id}" already exists')
            stored = await transaction.one(
                Artifact,
                f"""
                INSERT INTO artifacts (artifact_id, type, uri, meta, manifest, hashes, size, layer_url_template)
                VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
                ON CONFLICT (type, uri) WHERE deleted_at IS NULL DO UPDATE SET
                    meta = coalesce(artifacts.meta, EXCLUDED.meta),
                    manifest = coalesce(artifacts.manifest, EXCLUDED.manifest),
                    hashes = coalesce(artifacts.hashes, EXCLUDED.hashes),
                    size = coalesce(artifacts.size, EXCLUDED.size),
                    layer_url_template = coalesce(artifacts.layer_url_template, EXCLUDED.layer_url_template)
                RETURNING {COLUMNS}
                """,
                (
                    artifact_id,
                    artifact.type,
                    artifact.uri,
                    jsonb(artifact.meta or None),
                    jsonb(artifact.manifest),
                    jsonb(artifact.hashes or None),
                    artifact.size or None,
                    artifact.layer_url_template or None,
                ),
            )
            assert stored is not None
            transaction.emit(EventType.ARTIFACT, stored.id, stored)
        return stored

    async def get(self, artifact_id: str) -> Artifact:
        """Return a live artifact. Raises `NotFound`."""
        artifact = await self._database.one(
            Artifact,
            f"SELECT {COLUMNS} FROM artifacts WHERE artifact_id = %s AND deleted_at IS NULL",
            (sought("artifact", artifact_id),),
        )
        if artifact is None:
            raise NotFound(f"artifact {artifact_id} not found")
        return artifact

    async def all(self) -> list[Artifact]:
        """Return all live artifacts, newest first."""
        return await self._database.all(
            Artifact, f"SELECT {COLUMNS} FROM artifacts WHERE deleted_at IS NULL ORDER BY created_at DESC, artifact_id"
        )

    async def by_ids(self, artifact_ids: list[str]) -> list[Artifact]:
        """Return live artifacts in the order of the ids; those that do not exist are missing."""
        known = await self._database.all(
            Artifact,
            f"SELECT {COLUMNS} FROM artifacts WHERE artifact_id = ANY(%s::uuid[]) AND deleted_at IS NULL",
            (artifact_ids,),
        )
        by_id = {artifact.id: artifact for artifact in known}
        return [by_id[artifact_id] for artifact_id in artifact_ids if artifact_id in by_id]
