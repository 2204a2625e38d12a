"""Removing a release with everything that only it uses. spec/controller-worker section 5."""

from __future__ import annotations

from flynn.controller.database import Database, Transaction, jsonb
from flynn.controller.ids import sought
from flynn.controller.store.apps import app_in
from flynn.controller.store.formations import delete_formation_in, formation_in
from flynn.controller.store.queue import JobClass, enqueue
from flynn.controller.store.releases import release_in
from flynn.controller.wire import DeletedRelease, ReleaseDeletion
from flynn.types.app import App
from flynn.types.artifact import Artifact
from flynn.types.codec import Wire, replace
from flynn.types.errors import NotFound, ValidationError
from flynn.types.event import EventType

SYSTEM_IMAGE_META = "flynn.system-image"  # never deleted
BLOBSTORE_META = "blobstore"  # its files may go with the release
TARRECEIVE_LAYER_META = "tar.layer_id"
TARRECEIVE_LAYER_URL = "https://blobstore.discoverd:80/tarreceive/layers/{id}.json"


class ReleaseCleanup(Wire):
    """Arguments of the queue job that removes a deleted release's files; the original's names."""

    AppID: str = ""
    ReleaseID: str = ""
    FileURIs: list[str] = []


class ReleaseRemoval:
    """Removes releases; their files go later, by the queue."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def delete(self, app_ref: str, release_id: str) -> DeletedRelease:
        """Delete a release of an app, or only scale it down while other apps use it.

        Raises:
            NotFound: no such app or release.
            ValidationError: it is the current release of an app.
        """
        async with self._database.transaction() as transaction:
            app = await app_in(transaction, app_ref, lock=True)
            if await release_in(transaction, sought("release", release_id)) is None:
                raise NotFound(f"release {release_id} not found")
            return await delete_release_in(transaction, app, release_id)


async def delete_release_in(transaction: Transaction, app: App, release_id: str) -> DeletedRelease:
    """Delete a release of an app whose row is locked."""
    await transaction.execute("SELECT 1 FROM releases WHERE release_id = %s FOR UPDATE", (release_id,))
    if await transaction.value("SELECT 1 FROM apps WHERE release_id = %s", (release_id,)) is not None:
        raise ValidationError("", "cannot delete current app release")
    if await formation_in(transaction, app.id, release_id) is not None:
        await delete_formation_in(transaction, app, release_id)
    others = await transaction.all(
        str,
        "SELECT app_id FROM formations WHERE release_id = %s AND deleted_at IS NULL ORDER BY app_id",
        (release_id,),
    )
    outcome = DeletedRelease(app=app.id, release=release_id, remaining_apps=others or None)
    files: list[str] = []
    if not others:
        await transaction.execute(
            "UPDATE releases SET deleted_at = now() WHERE release_id = %s AND deleted_at IS NULL", (release_id,)
        )
        files = await _drop_artifacts(transaction, release_id)
    if files:
        cleanup = ReleaseCleanup(AppID=app.id, ReleaseID=release_id, FileURIs=files)
        await enqueue(transaction, JobClass.RELEASE_CLEANUP, cleanup)
    else:
        transaction.emit(EventType.RELEASE_DELETION, release_id, ReleaseDeletion(release_deletion=outcome), app=app.id)
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
