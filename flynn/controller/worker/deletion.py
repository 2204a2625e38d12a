"""Deleting an app with all that belongs to it. spec/controller-worker section 4.

First everything is scaled to nothing, so that jobs stop while the rest goes; the row of the app itself goes last. Each
step finds what is left by looking, so an interrupted deletion goes on where it stood.
"""

from __future__ import annotations

from flynn.blobstore import client as blobstore
from flynn.controller.database import Transaction
from flynn.controller.neighbours import Neighbours
from flynn.controller.provisioning import Provisioner
from flynn.controller.store.apps import app_in
from flynn.controller.store.formations import delete_formation_in
from flynn.controller.store.queue import QueuedJob
from flynn.controller.store.removal import delete_release_in
from flynn.controller.store.routes import delete_route_in, lock_routes, parent_of
from flynn.controller.stores import Stores
from flynn.controller.wire import AppDeletion, DeletedApp
from flynn.controller.worker.cleanup import delete_file
from flynn.types.app import App
from flynn.types.codec import convert, replace
from flynn.types.errors import ApiError, NotFound
from flynn.types.event import EventType
from flynn.types.provider import Resource
from flynn.types.release import Release
from flynn.types.route import Route

REPOSITORY_FILES = ("/repos/{app}.tar", "/{app}-cache.tgz")


class AppDeletionProcedure:
    """The procedure behind queue jobs of class `app_deletion`."""

    def __init__(self, stores: Stores, neighbours: Neighbours, *, blobstore: str = blobstore.URL) -> None:
        self._stores = stores
        self._neighbours = neighbours
        self._blobstore = blobstore
        self._provisioner = Provisioner(neighbours)

    async def __call__(self, job: QueuedJob) -> None:
        """Delete an app and tell what went with it, also when it could not be finished."""
        try:
            app = await self._stores.apps.get(convert(job.args, App).id)
        except NotFound:
            return
        outcome = DeletedApp(app=app.id)
        failure: ApiError | None = None
        try:
            outcome = replace(outcome, deleted_routes=await self._delete_routes(app) or None)
            await self._stop(app)
            outcome = replace(outcome, deleted_releases=await self._delete_releases(app) or None)
            outcome = replace(outcome, deleted_resources=await self._delete_resources(app) or None)
            for name in REPOSITORY_FILES:
                await delete_file(self._neighbours, self._blobstore + name.format(app=app.id))
        except ApiError as error:
            failure = error
        async with self._stores.database.transaction() as transaction:
            if failure is None:
                await _forget(transaction, app)
            event = AppDeletion(app_deletion=outcome, error=failure.message if failure else "")
            transaction.emit(EventType.APP_DELETION, app.id, event, app=app.id)
        if failure is not None:
            raise failure

    async def _delete_routes(self, app: App) -> list[Route]:
        """Delete paths before the domains they hang on."""
        routes = await self._stores.routes.all(parent_of(app.id))
        async with self._stores.database.transaction() as transaction:
            await lock_routes(transaction)
            for route in sorted(routes, key=lambda route: len(route.path), reverse=True):
                await delete_route_in(transaction, route)
        return routes

    async def _stop(self, app: App) -> None:
        """Scale every release to nothing and leave the app without a current one, which makes that deletable."""
        formations = await self._stores.formations.all(app.id)
        async with self._stores.database.transaction() as transaction:
            await app_in(transaction, app.id, lock=True)
            for formation in formations:
                await delete_formation_in(transaction, app, formation.release)
            await transaction.execute("UPDATE apps SET release_id = NULL WHERE app_id = %s", (app.id,))
            await transaction.execute(
                "UPDATE deployments SET status = 'failed', finished_at = now(), error = 'the app was deleted'"
                " WHERE app_id = %s AND finished_at IS NULL",
                (app.id,),
            )

    async def _delete_releases(self, app: App) -> list[Release]:
        releases = await self._stores.releases.all(app.id)
        for release in releases:
            async with self._stores.database.transaction() as transaction:
                await app_in(transaction, app.id, lock=True)
                await delete_release_in(transaction, app, release.id)
        return releases

    async def _delete_resources(self, app: App) -> list[Resource]:
        """Remove what no other app uses; shared resources only lose the link."""
        deleted = []
        for resource in await self._stores.resources.all(app_id=app.id):
            if resource.apps != [app.id]:
                continue
            await self._provisioner.deprovision(await self._stores.resources.provider(resource.provider), resource)
            await self._stores.resources.forget(resource)
            deleted.append(resource)
        return deleted


async def _forget(transaction: Transaction, app: App) -> None:
    await transaction.execute(
        "UPDATE apps SET deleted_at = now(), updated_at = now() WHERE app_id = %s AND deleted_at IS NULL", (app.id,)
    )
    await transaction.execute("DELETE FROM app_resources WHERE app_id = %s", (app.id,))
