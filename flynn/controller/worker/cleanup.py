"""Removing what is left over: files of deleted releases, and old releases of an app."""

from __future__ import annotations

import logging

from flynn.controller.deploy.garbage import releases_to_delete, slugs_to_keep
from flynn.controller.neighbours import Neighbours
from flynn.controller.store.queue import QueuedJob
from flynn.controller.store.removal import ReleaseCleanup
from flynn.controller.stores import Stores
from flynn.controller.wire import (
    AppGarbageCollection,
    DeletedRelease,
    GarbageCollected,
    ReleaseDeletion,
)
from flynn.types.app import App
from flynn.types.codec import convert
from flynn.types.errors import ApiError, NotFound, ValidationError
from flynn.types.event import EventType

log = logging.getLogger(__name__)

WEB_SCHEMES = ("http://", "https://")


class FileCleanup:
    """The procedure behind queue jobs of class `release_cleanup`."""

    def __init__(self, stores: Stores, neighbours: Neighbours) -> None:
        self._stores = stores
        self._neighbours = neighbours

    async def __call__(self, job: QueuedJob) -> None:
        """Delete the files of a release and tell; what is gone already counts as deleted."""
        wanted = convert(job.args, ReleaseCleanup)
        deleted: list[str] = []
        failure: ApiError | None = None
        try:
            for uri in wanted.FileURIs:
                await delete_file(self._neighbours, uri)
                deleted.append(uri)
        except ApiError as error:
            failure = error
        async with self._stores.database.transaction() as transaction:
            outcome = DeletedRelease(app=wanted.AppID, release=wanted.ReleaseID, deleted_files=deleted or None)
            event = ReleaseDeletion(release_deletion=outcome, error=failure.message if failure else "")
            transaction.emit(EventType.RELEASE_DELETION, wanted.ReleaseID, event, app=wanted.AppID)
        if failure is not None:
            raise failure


async def delete_file(neighbours: Neighbours, uri: str) -> None:
    """Delete one file where it is stored. What is not behind a web address is nobody's to delete from here."""
    if not uri.startswith(WEB_SCHEMES):
        return
    async with neighbours.at(uri) as (client, path):
        try:
            await client.delete(path)
        except NotFound:
            return


class GarbageCollection:
    """The procedure behind queue jobs of class `app_garbage_collection`."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    async def __call__(self, job: QueuedJob) -> None:
        """Delete an app's superfluous releases and tell. An app that is gone has none; a bad setting is told once."""
        wanted = convert(job.args, GarbageCollected)
        try:
            app = await self._stores.apps.get(wanted.app_id)
        except NotFound:
            return
        deleted: list[str] = []
        error = ""
        try:
            for release_id in await self._doomed(app):
                if await self._delete(app, release_id):
                    deleted.append(release_id)
        except ValidationError as refusal:
            error = refusal.message
        async with self._stores.database.transaction() as transaction:
            outcome = GarbageCollected(app_id=app.id, deleted_releases=deleted or None)
            event = AppGarbageCollection(app_garbage_collection=outcome, error=error)
            transaction.emit(EventType.APP_GARBAGE_COLLECTION, app.id, event, app=app.id)

    async def _doomed(self, app: App) -> list[str]:
        keep = slugs_to_keep(app.meta)
        if keep is None:
            return []
        releases = await self._stores.releases.all(app.id)
        slugs = sorted({release.artifacts[1] for release in releases if len(release.artifacts) > 1})
        artifacts = {artifact.id: artifact for artifact in await self._stores.artifacts.by_ids(slugs)}
        formations = await self._stores.formations.all(app.id)
        needed = {formation.release for formation in formations if any((formation.processes or {}).values())}
        return releases_to_delete(releases, artifacts, needed | {app.release}, keep)

    async def _delete(self, app: App, release_id: str) -> bool:
        try:
            await self._stores.removal.delete(app.id, release_id)
        except (NotFound, ValidationError) as error:
            log.info("release kept", extra={"release": release_id, "because": error.message})
            return False
        return True
