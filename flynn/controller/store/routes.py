"""Routes and their certificates; the router follows them by the `route` and `route_deletion` events.

All changes of routes take one lock: the rules span rows (a path needs its domain, routes of a service agree on
draining), and routes change rarely.
"""

from __future__ import annotations

from psycopg import errors

from flynn.controller.certificates import certificate_of, fingerprint
from flynn.controller.database import Database, Transaction
from flynn.controller.ids import new_id, sought
from flynn.controller.validation import ROUTE_TYPES, one_of, required
from flynn.types.codec import replace
from flynn.types.errors import Conflict, NotFound, ValidationError
from flynn.types.event import EventType
from flynn.types.route import APP_PARENT, Certificate, Route

HTTP_COLUMNS = """
    'http' AS type, r.id, r.parent_ref, r.service, r.port, r.leader, r.created_at, r.updated_at, r.domain, r.sticky,
    r.path, r.drain_backends, r.disable_keep_alives,
    (SELECT to_jsonb(row) FROM (
        SELECT c.id, c.cert, c.key, c.created_at, c.updated_at FROM route_certificates rc
        JOIN certificates c ON c.id = rc.certificate_id WHERE rc.http_route_id = r.id LIMIT 1
    ) row) AS certificate
"""
TCP_COLUMNS = (
    "'tcp' AS type, r.id, r.parent_ref, r.service, r.port, r.leader, r.created_at, r.updated_at, r.drain_backends"
)
ROUTE_LOCK = 0x726F7574

RESERVED_PORTS = (80, 443)
TCP_PORTS = range(3000, 3501)  # what the router listens on for tcp routes that did not ask for a port
MAX_PORT = 65534
MAX_DOMAIN_LENGTH = 255


class RouteStore:
    """Routes in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self, parent_ref: str = "") -> list[Route]:
        """Return the routes of one owner or of all, newest first, with certificates and private keys."""
        condition, params = ("AND r.parent_ref = %s", (parent_ref,)) if parent_ref else ("", ())
        http = await self._database.all(
            Route, f"SELECT {HTTP_COLUMNS} FROM http_routes r WHERE r.deleted_at IS NULL {condition}", params
        )
        tcp = await self._database.all(
            Route, f"SELECT {TCP_COLUMNS} FROM tcp_routes r WHERE r.deleted_at IS NULL {condition}", params
        )
        return sorted([*http, *tcp], key=lambda route: (route.created_at, route.id), reverse=True)

    async def get(self, parent_ref: str, route_type: str, route_id: str) -> Route:
        """Return one route of an owner. Raises `NotFound`."""
        return await _owned(self._database, parent_ref, route_type, route_id)

    async def create(self, route: Route) -> Route:
        """Create a route.

        Raises:
            Conflict: duplicate, or a reserved port.
            ValidationError: it breaks a rule; the detail is the route as it was understood.
        """
        one_of("type", route.type, ROUTE_TYPES)
        async with self._database.transaction() as transaction:
            return await create_route_in(transaction, route)

    async def update(self, parent_ref: str, route_type: str, route_id: str, route: Route) -> Route:
        """Change a route of an owner; who sends no `parent_ref` leaves it as it is."""
        async with self._database.transaction() as transaction:
            await _lock(transaction)
            old = await _owned(transaction, parent_ref, route_type, route_id)
            changed = replace(
                route,
                id=old.id,
                type=old.type,
                parent_ref=route.parent_ref or old.parent_ref,
                drain_backends=old.drain_backends,
            )
            if old.type == "http":
                return await _update_http(transaction, old, changed)
            return await _update_tcp(transaction, changed)

    async def delete(self, parent_ref: str, route_type: str, route_id: str) -> None:
        """Remove a route of an owner. Raises `ValidationError` while path routes depend on it."""
        async with self._database.transaction() as transaction:
            await _lock(transaction)
            route = await _owned(transaction, parent_ref, route_type, route_id)
            await delete_route_in(transaction, route)


async def create_route_in(transaction: Transaction, route: Route) -> Route:
    """Create a route; see `RouteStore.create`."""
    await _lock(transaction)
    if route.type == "tcp":
        return await _create_tcp(transaction, route)
    return await _create_http(transaction, route)


async def delete_route_in(transaction: Transaction, route: Route) -> None:
    """Remove a route; the caller holds the route lock or deletes all routes of an app."""
    if route.type == "http" and route.path == "/" and await _has_dependents(transaction, route):
        raise ValidationError("", "Route has dependent routes")
    table = "http_routes" if route.type == "http" else "tcp_routes"
    await transaction.execute(f"UPDATE {table} SET deleted_at = now() WHERE id = %s", (route.id,))
    if route.type == "http":
        await transaction.execute("DELETE FROM route_certificates WHERE http_route_id = %s", (route.id,))
    _emit(transaction, EventType.ROUTE_DELETION, route)


def _emit(transaction: Transaction, kind: EventType, route: Route) -> None:
    """Tell of a route. Private keys stay out of the event log: the router, who needs them, lists the routes."""
    told = route
    if route.certificate is not None:
        told = replace(route, certificate=replace(route.certificate, key=""))
    transaction.emit(kind, route.id, told, app=route.app_id)


async def lock_routes(transaction: Transaction) -> None:
    """Hold off other changes of routes until the end of the transaction."""
    await _lock(transaction)


async def _lock(transaction: Transaction) -> None:
    await transaction.execute("SELECT pg_advisory_xact_lock(%s)", (ROUTE_LOCK,))


async def _create_http(transaction: Transaction, route: Route) -> Route:
    route = replace(route, path=normalized_path(route))
    certificate = certificate_of(route)
    await _check_http(transaction, route)
    try:
        created = await transaction.one(
            Route,
            "INSERT INTO http_routes AS r"
            " (id, parent_ref, service, domain, port, path, sticky, leader, drain_backends, disable_keep_alives)"
            f" VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s) RETURNING {HTTP_COLUMNS}",
            (
                new_id(),
                route.parent_ref,
                route.service,
                route.domain,
                route.port,
                route.path,
                route.sticky,
                route.leader,
                route.drain_backends,
                route.disable_keep_alives,
            ),
        )
    except errors.UniqueViolation as error:
        raise Conflict("Duplicate route", _shown(route)) from error
    assert created is not None
    if certificate is not None:
        created = replace(created, certificate=await _attach(transaction, created.id, certificate))
    _emit(transaction, EventType.ROUTE, created)
    return created


def normalized_path(route: Route) -> str:
    """Return the path with its slash at the end. Raises `ValidationError` if it has none at the beginning."""
    path = route.path or "/"
    if not path.startswith("/") or any(character.isspace() or character in "?#" for character in path):
        raise ValidationError("", "Invalid route", _shown(route))
    return path if path.endswith("/") else path + "/"


async def _check_http(transaction: Transaction, route: Route) -> None:
    required("service", route.service)
    required("domain", route.domain)
    if len(route.domain) > MAX_DOMAIN_LENGTH or any(
        character.isspace() or character == "/" for character in route.domain
    ):
        raise ValidationError("domain", "must be a host name")
    if route.port:
        raise ValidationError("", "Invalid route", _shown(route))
    if route.path != "/" and not await transaction.value(
        "SELECT 1 FROM http_routes WHERE domain = %s AND path = '/' AND deleted_at IS NULL", (route.domain,)
    ):
        raise ValidationError("", "Invalid route", _shown(route))
    if await transaction.value(
        "SELECT 1 FROM http_routes WHERE service = %s AND drain_backends <> %s AND deleted_at IS NULL",
        (route.service, route.drain_backends),
    ):
        raise ValidationError("", "Invalid route", _shown(route))


async def _create_tcp(transaction: Transaction, route: Route) -> Route:
    required("service", route.service)
    if route.port in RESERVED_PORTS:
        raise Conflict("Port reserved for HTTP/HTTPS traffic", _shown(route))
    if not 0 <= route.port <= MAX_PORT:
        raise ValidationError("port", f"must be between 1 and {MAX_PORT}")
    route = route if route.port else replace(route, port=await _free_port(transaction, route))
    try:
        created = await transaction.one(
            Route,
            "INSERT INTO tcp_routes AS r (id, parent_ref, service, port, leader, drain_backends)"
            f" VALUES (%s, %s, %s, %s, %s, %s) RETURNING {TCP_COLUMNS}",
            (new_id(), route.parent_ref, route.service, route.port, route.leader, route.drain_backends),
        )
    except errors.UniqueViolation as error:
        raise Conflict("Duplicate route", _shown(route)) from error
    assert created is not None
    _emit(transaction, EventType.ROUTE, created)
    return created


async def _free_port(transaction: Transaction, route: Route) -> int:
    taken = set(await transaction.all(int, "SELECT port FROM tcp_routes WHERE deleted_at IS NULL"))
    for port in TCP_PORTS:
        if port not in taken:
            return port
    raise Conflict(f"no port from {TCP_PORTS.start} to {TCP_PORTS.stop - 1} is free", _shown(route))


async def _update_http(transaction: Transaction, old: Route, route: Route) -> Route:
    if route.domain != old.domain:
        raise NotFound("a route cannot move to another domain")
    required("service", route.service)
    certificate = certificate_of(route)
    path = normalized_path(route) if route.path else old.path
    if old.path == "/" and path != "/" and await _has_dependents(transaction, old):
        raise ValidationError("", "Route has dependent routes")
    try:
        updated = await transaction.one(
            Route,
            "UPDATE http_routes AS r SET parent_ref = %s, service = %s, port = %s, leader = %s, sticky = %s, path = %s,"
            f" disable_keep_alives = %s, updated_at = now() WHERE id = %s RETURNING {HTTP_COLUMNS}",
            (
                route.parent_ref,
                route.service,
                old.port,
                route.leader,
                route.sticky,
                path,
                route.disable_keep_alives,
                old.id,
            ),
        )
    except errors.UniqueViolation as error:
        raise Conflict("Duplicate route", _shown(route)) from error
    assert updated is not None
    if certificate is not None:
        updated = replace(updated, certificate=await _attach(transaction, old.id, certificate))
    _emit(transaction, EventType.ROUTE, updated)
    return updated


async def _update_tcp(transaction: Transaction, route: Route) -> Route:
    required("service", route.service)
    if route.port in RESERVED_PORTS:
        raise Conflict("Port reserved for HTTP/HTTPS traffic", _shown(route))
    if not 1 <= route.port <= MAX_PORT:
        raise ValidationError("port", f"must be between 1 and {MAX_PORT}")
    try:
        updated = await transaction.one(
            Route,
            "UPDATE tcp_routes AS r SET parent_ref = %s, service = %s, port = %s, leader = %s, updated_at = now()"
            f" WHERE id = %s RETURNING {TCP_COLUMNS}",
            (route.parent_ref, route.service, route.port, route.leader, route.id),
        )
    except errors.UniqueViolation as error:
        raise Conflict("Duplicate route", _shown(route)) from error
    assert updated is not None
    _emit(transaction, EventType.ROUTE, updated)
    return updated


async def _attach(transaction: Transaction, route_id: str, certificate: Certificate) -> Certificate:
    """Store a certificate once per text and make it the route's only one."""
    stored = await transaction.one(
        Certificate,
        """
        INSERT INTO certificates (cert, key, cert_sha256) VALUES (%s, %s, %s)
        ON CONFLICT (cert_sha256) WHERE deleted_at IS NULL DO UPDATE SET key = EXCLUDED.key, updated_at = now()
        RETURNING id, cert, key, created_at, updated_at
        """,
        (certificate.cert, certificate.key, fingerprint(certificate)),
    )
    assert stored is not None
    await transaction.execute("DELETE FROM route_certificates WHERE http_route_id = %s", (route_id,))
    await transaction.execute(
        "INSERT INTO route_certificates (http_route_id, certificate_id) VALUES (%s, %s)", (route_id, stored.id)
    )
    return stored


async def _has_dependents(transaction: Transaction, route: Route) -> bool:
    query = "SELECT 1 FROM http_routes WHERE domain = %s AND path <> '/' AND deleted_at IS NULL"
    return await transaction.value(query, (route.domain,)) is not None


async def _owned(transaction: Transaction | Database, parent_ref: str, route_type: str, route_id: str) -> Route:
    if route_type not in ROUTE_TYPES:
        raise NotFound(f"there are no routes of type {route_type!r}")
    columns, table = (HTTP_COLUMNS, "http_routes") if route_type == "http" else (TCP_COLUMNS, "tcp_routes")
    route = await transaction.one(
        Route,
        f"SELECT {columns} FROM {table} r WHERE r.id = %s AND r.deleted_at IS NULL AND r.parent_ref = %s",
        (sought("route", route_id), parent_ref),
    )
    if route is None:
        raise NotFound(f"route {route_id} not found")
    return route


def _shown(route: Route) -> Route:
    """Return the route as an error may repeat it: without keys."""
    return replace(route, certificate=None, tls_cert="", tls_key="")


def parent_of(app_id: str) -> str:
    """Return how a route names the app it belongs to."""
    return APP_PARENT + app_id
