"""Apps, and which release is an app's current one."""

from __future__ import annotations

from psycopg import errors

from flynn.controller import validation
from flynn.controller.database import Database, Transaction, jsonb
from flynn.controller.ids import is_uuid, new_id
from flynn.controller.names import app_name
from flynn.controller.store.queue import JobClass, enqueue
from flynn.controller.store.releases import release_in
from flynn.controller.store.routes import create_route_in
from flynn.controller.wire import AppRelease, AppUpdate, GarbageCollected
from flynn.types.app import App, Strategy
from flynn.types.codec import replace
from flynn.types.errors import ApiError, Conflict, NotFound, ObjectExists, ValidationError
from flynn.types.event import EventType
from flynn.types.release import Release
from flynn.types.route import APP_PARENT, Route

COLUMNS = "app_id AS id, name, meta, strategy, release_id AS release, deploy_timeout, created_at, updated_at"

DEFAULT_DEPLOY_TIMEOUT = 120  # seconds
GC_META = "gc.max_inactive_slug_releases"
DEFAULT_GC = "10"


async def app_in(transaction: Transaction | Database, ref: str, *, lock: bool = False) -> App:
    """Return a live app by id or name; an id wins over a name that looks like one. Raises `NotFound`.

    With `lock` the row is held until the end of the transaction: whatever changes an app's scale or release takes this
    lock first, so that such changes happen one after the other.
    """
    suffix = " FOR NO KEY UPDATE" if lock else ""
    live = f"SELECT {COLUMNS} FROM apps WHERE deleted_at IS NULL"
    if is_uuid(ref):
        query = f"{live} AND (app_id = %s OR name = %s) ORDER BY app_id = %s DESC LIMIT 1{suffix}"
        app = await transaction.one(App, query, (ref, ref, ref))
    else:
        app = await transaction.one(App, f"{live} AND name = %s{suffix}", (ref,))
    if app is None:
        raise NotFound(f'app "{ref}" not found')
    return app


async def set_release_in(transaction: Transaction, app: App, release: Release) -> None:
    """Make `release` the current one of an app whose row is locked."""
    previous = await release_in(transaction, app.release) if app.release else None
    await transaction.execute(
        "UPDATE apps SET release_id = %s, updated_at = now() WHERE app_id = %s", (release.id, app.id)
    )
    transaction.emit(EventType.APP_RELEASE, release.id, AppRelease(prev_release=previous, release=release), app=app.id)


class AppStore:
    """Apps in the database. `default_domain` empty means that apps get no route of their own accord."""

    def __init__(self, database: Database, *, default_domain: str, name_seed: bytes) -> None:
        self._database = database
        self._default_domain = default_domain
        self._name_seed = name_seed

    async def create(self, app: App) -> App:
        """Create an app with its default route. Raises `ObjectExists` for a name or id that is taken."""
        if app.name:
            validation.app_name(app.name)
        app = replace(
            app,
            id=app.id or new_id(),
            meta={GC_META: DEFAULT_GC, **app.meta},
            strategy=app.strategy or Strategy.ALL_AT_ONCE,
            deploy_timeout=app.deploy_timeout or DEFAULT_DEPLOY_TIMEOUT,
        )
        validation.strategy(app.strategy)
        validation.deploy_timeout(app.deploy_timeout)
        async with self._database.transaction() as transaction:
            created = await self._insert(transaction, app if app.name else await self._named(transaction, app))
            transaction.emit(EventType.APP, created.id, created, app=created.id, op="create")
            await self._add_default_route(transaction, created)
        return created

    async def _named(self, transaction: Transaction, app: App) -> App:
        while True:
            name = app_name(await transaction.value("SELECT nextval('name_ids')"), self._name_seed)
            query = "SELECT 1 FROM apps WHERE name = %s AND deleted_at IS NULL"
            if await transaction.value(query, (name,)) is None:
                return replace(app, name=name)

    async def _insert(self, transaction: Transaction, app: App) -> App:
        try:
            created = await transaction.one(
                App,
                "INSERT INTO apps (app_id, name, meta, strategy, deploy_timeout) VALUES (%s, %s, %s, %s, %s)"
                f" RETURNING {COLUMNS}",
                (app.id, app.name, jsonb(app.meta), app.strategy, app.deploy_timeout),
            )
        except errors.UniqueViolation as error:
            if error.diag.constraint_name == "apps_name_live":
                raise ObjectExists(f'application "{app.name}" already exists') from error
            raise ObjectExists(f'application with id "{app.id}" already exists') from error
        assert created is not None
        return created

    async def _add_default_route(self, transaction: Transaction, app: App) -> None:
        if app.system or not self._default_domain:
            return
        route = Route(
            type="http",
            parent_ref=APP_PARENT + app.id,
            domain=f"{app.name}.{self._default_domain}",
            service=f"{app.name}-web",
            drain_backends=True,
        )
        try:
            async with transaction.savepoint():
                await create_route_in(transaction, route)
        except ApiError:
            # The domain belongs to a route of another app: no reason to refuse the app.
            return

    async def get(self, ref: str) -> App:
        """Return a live app by id or name. Raises `NotFound`."""
        return await app_in(self._database, ref)

    async def existed(self, app_id: str) -> bool:
        """Tell whether there is or was an app of that id."""
        return await self._database.one(dict, "SELECT 1 AS found FROM apps WHERE app_id = %s", (app_id,)) is not None

    async def all(self) -> list[App]:
        """Return all live apps, newest first."""
        return await self._database.all(
            App, f"SELECT {COLUMNS} FROM apps WHERE deleted_at IS NULL ORDER BY created_at DESC, app_id"
        )

    async def update(self, ref: str, update: AppUpdate) -> App:
        """Apply what is not None in `update`."""
        if update.strategy is not None:
            validation.strategy(update.strategy)
        if update.deploy_timeout is not None:
            validation.deploy_timeout(update.deploy_timeout)
        async with self._database.transaction() as transaction:
            app = await app_in(transaction, ref, lock=True)
            updated = await transaction.one(
                App,
                "UPDATE apps SET meta = %s, strategy = %s, deploy_timeout = %s, updated_at = now() WHERE app_id = %s"
                f" RETURNING {COLUMNS}",
                (
                    jsonb(app.meta if update.meta is None else update.meta),
                    update.strategy or app.strategy,
                    update.deploy_timeout or app.deploy_timeout,
                    app.id,
                ),
            )
            assert updated is not None
            transaction.emit(EventType.APP, updated.id, updated, app=updated.id, op="update")
        return updated

    async def set_release(self, ref: str, release_id: str) -> Release:
        """Make a release the current one, without scaling anything."""
        async with self._database.transaction() as transaction:
            app = await app_in(transaction, ref, lock=True)
            release = await release_in(transaction, release_id) if is_uuid(release_id) else None
            if release is None:
                raise ValidationError("", f"could not find release with ID {release_id}")
            await set_release_in(transaction, app, release)
        return release

    async def request_deletion(self, ref: str) -> None:
        """Queue the deletion of an app."""
        async with self._database.transaction() as transaction:
            app = await app_in(transaction, ref)
            if app.critical:
                raise Conflict(f"refusing to delete {app.name}: the platform cannot be without it")
            await enqueue(transaction, JobClass.APP_DELETION, app)

    async def request_garbage_collection(self, ref: str) -> None:
        """Queue the removal of old inactive releases of an app."""
        async with self._database.transaction() as transaction:
            app = await app_in(transaction, ref)
            await enqueue(transaction, JobClass.APP_GARBAGE_COLLECTION, GarbageCollected(app_id=app.id))
