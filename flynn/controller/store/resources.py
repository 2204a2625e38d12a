"""Providers and the resources they have made: databases, mostly."""

from __future__ import annotations

from collections.abc import Iterable

from psycopg import errors

from flynn.controller import validation
from flynn.controller.database import Database, Transaction, jsonb
from flynn.controller.ids import given, is_uuid, new_id, sought
from flynn.controller.store.apps import app_in
from flynn.types.codec import replace
from flynn.types.errors import NotFound, ObjectExists, ValidationError
from flynn.types.event import EventType
from flynn.types.provider import Provider, Resource

PROVIDER_COLUMNS = "provider_id AS id, url, name, created_at, updated_at"
COLUMNS = """
    r.resource_id AS id, r.provider_id AS provider, r.external_id, r.env, r.created_at,
    (SELECT jsonb_agg(ar.app_id ORDER BY ar.created_at) FROM app_resources ar WHERE ar.resource_id = r.resource_id)
        AS apps
"""
NEWEST_FIRST = "ORDER BY r.created_at DESC, r.resource_id"


class ResourceStore:
    """Providers and resources in the database; talking to the providers is someone else's part."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_provider(self, provider: Provider) -> Provider:
        """Register a provider. Raises `ObjectExists` for a name or URL that is taken."""
        validation.required("name", provider.name.strip())
        validation.required("url", provider.url.strip())
        validation.uri("url", provider.url)
        async with self._database.transaction() as transaction:
            try:
                created = await transaction.one(
                    Provider,
                    f"INSERT INTO providers (provider_id, name, url) VALUES (%s, %s, %s) RETURNING {PROVIDER_COLUMNS}",
                    (given("id", provider.id) if provider.id else new_id(), provider.name, provider.url),
                )
            except errors.UniqueViolation as error:
                raise ObjectExists(f'a provider "{provider.name}" or one at {provider.url} already exists') from error
            assert created is not None
            transaction.emit(EventType.PROVIDER, created.id, created)
        return created

    async def provider(self, ref: str) -> Provider:
        """Return a provider by id or name. Raises `NotFound`."""
        condition = "provider_id = %s OR name = %s" if is_uuid(ref) else "name = %s"
        provider = await self._database.one(
            Provider,
            f"SELECT {PROVIDER_COLUMNS} FROM providers WHERE deleted_at IS NULL AND ({condition}) LIMIT 1",
            (ref, ref) if is_uuid(ref) else (ref,),
        )
        if provider is None:
            raise NotFound(f'provider "{ref}" not found')
        return provider

    async def providers(self) -> list[Provider]:
        """Return all providers, newest first."""
        return await self._database.all(
            Provider, f"SELECT {PROVIDER_COLUMNS} FROM providers WHERE deleted_at IS NULL ORDER BY created_at DESC"
        )

    async def app_ids(self, refs: Iterable[str]) -> list[str]:
        """Resolve app names and ids. Raises `ValidationError` for one that does not exist."""
        ids = []
        for ref in refs:
            try:
                ids.append((await app_in(self._database, ref)).id)
            except NotFound as error:
                raise ValidationError("apps", f'names no app: "{ref}"') from error
        return ids

    async def record(self, resource: Resource) -> Resource:
        """Store a resource that exists at its provider. Raises `ObjectExists`."""
        validation.required("external_id", resource.external_id)
        apps = await self.app_ids(resource.apps)
        resource_id = given("id", resource.id) if resource.id else new_id()
        async with self._database.transaction() as transaction:
            try:
                await transaction.execute(
                    "INSERT INTO resources (resource_id, provider_id, external_id, env) VALUES (%s, %s, %s, %s)",
                    (resource_id, resource.provider, resource.external_id, jsonb(resource.env or None)),
                )
            except errors.UniqueViolation as error:
                raise ObjectExists(f'resource "{resource.external_id}" of this provider already exists') from error
            for app_id in apps:
                await _link(transaction, resource_id, app_id)
            stored = await _resource_in(transaction, resource_id)
            _emit_for_apps(transaction, EventType.RESOURCE, stored)
        return stored

    async def resource(self, resource_id: str) -> Resource:
        """Return a live resource. Raises `NotFound`."""
        return await _resource_in(self._database, sought("resource", resource_id))

    async def all(self, *, provider_id: str = "", app_id: str = "") -> list[Resource]:
        """Return live resources, newest first."""
        conditions, values = ["r.deleted_at IS NULL"], []
        if provider_id:
            conditions.append("r.provider_id = %s")
            values.append(provider_id)
        if app_id:
            conditions.append(
                "EXISTS (SELECT 1 FROM app_resources l WHERE l.resource_id = r.resource_id AND l.app_id = %s)"
            )
            values.append(app_id)
        query = f"SELECT {COLUMNS} FROM resources r WHERE {' AND '.join(conditions)} {NEWEST_FIRST}"
        return await self._database.all(Resource, query, values)

    async def forget(self, resource: Resource) -> Resource:
        """Drop a resource that is gone at its provider; returns it as it was."""
        async with self._database.transaction() as transaction:
            await transaction.execute(
                "UPDATE resources SET deleted_at = now() WHERE resource_id = %s AND deleted_at IS NULL", (resource.id,)
            )
            await transaction.execute("DELETE FROM app_resources WHERE resource_id = %s", (resource.id,))
            _emit_for_apps(transaction, EventType.RESOURCE_DELETION, resource)
        return resource

    async def link(self, resource_id: str, app_ref: str) -> Resource:
        """Link a resource to one more app."""
        async with self._database.transaction() as transaction:
            app = await app_in(transaction, app_ref)
            resource = await _resource_in(transaction, sought("resource", resource_id))
            await _link(transaction, resource.id, app.id)
            linked = await _resource_in(transaction, resource.id)
            transaction.emit(EventType.RESOURCE, linked.id, linked, app=app.id)
        return linked

    async def unlink(self, resource_id: str, app_ref: str) -> Resource:
        """Remove the link between one resource and one app. Raises `NotFound` if there is none."""
        async with self._database.transaction() as transaction:
            app = await app_in(transaction, app_ref)
            resource = await _resource_in(transaction, sought("resource", resource_id))
            removed = await transaction.execute(
                "DELETE FROM app_resources WHERE resource_id = %s AND app_id = %s", (resource.id, app.id)
            )
            if not removed:
                raise NotFound(f"app {app.name} does not use the resource")
            left = replace(resource, apps=[app_id for app_id in resource.apps if app_id != app.id])
            transaction.emit(EventType.RESOURCE_APP_DELETION, left.id, left, app=app.id)
        return left


async def _resource_in(transaction: Transaction | Database, resource_id: str) -> Resource:
    resource = await transaction.one(
        Resource,
        f"SELECT {COLUMNS} FROM resources r WHERE r.resource_id = %s AND r.deleted_at IS NULL",
        (resource_id,),
    )
    if resource is None:
        raise NotFound(f"resource {resource_id} not found")
    return resource


async def _link(transaction: Transaction, resource_id: str, app_id: str) -> None:
    await transaction.execute(
        "INSERT INTO app_resources (resource_id, app_id) VALUES (%s, %s) ON CONFLICT DO NOTHING", (resource_id, app_id)
    )


def _emit_for_apps(transaction: Transaction, kind: EventType, resource: Resource) -> None:
    for app_id in resource.apps or [""]:
        transaction.emit(kind, resource.id, resource, app=app_id)
