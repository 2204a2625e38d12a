"""Releases: what an app consists of at one time, and the removal of those nobody needs any more."""

from __future__ import annotations

from flynn.controller.database import Database, Transaction, jsonb
from flynn.controller.ids import given, new_id, sought
from flynn.controller.store.queue import JobClass, enqueue
from flynn.controller.validation import normalized_release
from flynn.controller.wire import DeletedRelease, ReleaseDeletion
from flynn.types.artifact import Artifact
from flynn.types.codec import Wire, replace
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

SYSTEM_IMAGE_META = "flynn.system-image"  # never deleted
BLOBSTORE_META = "blobstore"  # its files may go with the release
TARRECEIVE_LAYER_META = "tar.layer_id"
TARRECEIVE_LAYER_URL = "https://blobstore.discoverd:80/tarreceive/layers/{id}.json"


class ReleaseCleanup(Wire):
    """Arguments of the queue job that removes a deleted release's files."""

    AppID: str = ""
    ReleaseID: str = ""
    FileURIs: list[str] = []


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

    async def delete(self, app_id: str, release_id: str) -> DeletedRelease:
        """Delete a release of an app; its files go later, by the queue.

        Raises:
            NotFound: no such release.
            ValidationError: it is the current release of an app.
        """
        sought("release", release_id)
        async with self._database.transaction() as transaction:
            if await release_in(transaction, release_id) is None:
                raise NotFound(f"release {release_id} not found")
            return await delete_release_in(transaction, app_id, release_id)


async def delete_release_in(transaction: Transaction, app_id: str, release_id: str) -> DeletedRelease:
    """Delete a release with everything that only it uses; see spec/controller-worker section 5."""
    await transaction.execute("SELECT 1 FROM releases WHERE release_id = %s FOR UPDATE", (release_id,))
    if await transaction.value("SELECT 1 FROM apps WHERE release_id = %s", (release_id,)) is not None:
        raise ValidationError("", "cannot delete current app release")
    await transaction.execute(
        "UPDATE formations SET processes = NULL, deleted_at = now(), updated_at = now()"
        " WHERE app_id = %s AND release_id = %s AND deleted_at IS NULL",
        (app_id, release_id),
    )
    others = await transaction.all(
        str,
        "SELECT app_id FROM formations WHERE release_id = %s AND deleted_at IS NULL ORDER BY app_id",
        (release_id,),
    )
    outcome = DeletedRelease(app=app_id, release=release_id, remaining_apps=others or None)
    files: list[str] = []
    if not others:
        await transaction.execute(
            "UPDATE releases SET deleted_at = now() WHERE release_id = %s AND deleted_at IS NULL", (release_id,)
        )
        files = await _drop_artifacts(transaction, release_id)
    if files:
        await enqueue(
            transaction,
            JobClass.RELEASE_CLEANUP,
            {"AppID": app_id, "ReleaseID": release_id, "FileURIs": files},
        )
    else:
        transaction.emit(EventType.RELEASE_DELETION, release_id, ReleaseDeletion(release_deletion=outcome), app=app_id)
    return replace(outcome, deleted_files=files or None)


async def _drop_artifacts(transaction: Transaction, release_id: str) -> list[str]:
    """Unlink a release's artifacts, delete those nobody else has, and return the files that belong to them alone."""
    linked = await transaction.all(
        Artifact,
        "UPDATE release_artifacts ra SET deleted_at = now() FROM artifacts a"
        " WHERE ra.release_id = %s AND ra.deleted_at IS NULL AND a.artifact_id = ra.artifact_id"
        " RETURNING a.artifact_id AS id, a.type, a.uri, a.meta, a.manifest, a.layer_url_template",
        (release_id,),
    )
    files: list[str] = []
    for artifact in linked:
        if artifact.meta.get(SYSTEM_IMAGE_META) == "true" or await transaction.value(
            "SELECT 1 FROM release_artifacts WHERE artifact_id = %s AND deleted_at IS NULL", (artifact.id,)
        ):
            continue
        await transaction.execute("UPDATE artifacts SET deleted_at = now() WHERE artifact_id = %s", (artifact.id,))
        if artifact.meta.get(BLOBSTORE_META) == "true":
            files += await _files_of(transaction, artifact)
    return files


async def _files_of(transaction: Transaction, artifact: Artifact) -> list[str]:
    files = [artifact.uri]
    for layer in artifact.image().layers():
        shared = await transaction.value(
            "SELECT 1 FROM artifacts WHERE deleted_at IS NULL AND manifest @> %s",
            (jsonb({"rootfs": [{"layers": [{"id": layer.id}]}]}),),
        )
        if shared:
            continue
        files.append(artifact.layer_url(layer))
        if layer_id := layer.meta.get(TARRECEIVE_LAYER_META):
            files.append(TARRECEIVE_LAYER_URL.format(id=layer_id))
    return files


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
