"""`flynn route`: how requests find an app."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flynn.cli.command import argument, flag, leaf, option, tree
from flynn.cli.context import Context, show
from flynn.cli.errors import CliError, UsageError
from flynn.cli.output import table

if TYPE_CHECKING:
    from flynn.types.route import Route

ROUTE = """
usage: flynn route
       flynn route add http [-s <service>] [-p <port>] [-c <tls-cert> -k <tls-key>] [--sticky] [--leader] [--no-leader] [--no-drain-backends] [--disable-keep-alives] <domain>
       flynn route add tcp [-s <service>] [-p <port>] [--leader] [--no-drain-backends]
       flynn route update <id> [-s <service>] [-c <tls-cert> -k <tls-key>] [--sticky] [--no-sticky] [--leader] [--no-leader] [--disable-keep-alives] [--enable-keep-alives]
       flynn route remove <id>

Manage routes for application.

Options:
    -s, --service <service>    service name to route domain to (defaults to APPNAME-web)
    -c, --tls-cert <tls-cert>  path to PEM encoded certificate for TLS, - for stdin (http only)
    -k, --tls-key <tls-key>    path to PEM encoded private key for TLS, - for stdin (http only)
    --sticky                   enable cookie-based sticky routing (http only)
    --no-sticky                disable cookie-based sticky routing (update http only)
    --leader                   enable leader-only routing mode
    --no-leader                disable leader-only routing mode
    -p, --port <port>          port to accept traffic on
    --no-drain-backends        don't wait for in-flight requests to complete before stopping backends
    --disable-keep-alives      disable keep-alives between the router and backends for the given route
    --enable-keep-alives       enable keep-alives between the router and backends for the given route (default for new routes)

Commands:
    With no arguments, shows a list of routes.

    add     adds a route to an app
    update  changes a route
    remove  removes a route

Examples:

    $ flynn route add http example.com
    http/5f1e7a0c-4c6e-4d35-a5a8-3d1d2dbf2e5b

    $ flynn route add tcp
    tcp/5b1d3f5e-2e0c-45f3-b1f0-5ea7a0c7c5f3 listening on port 3000
"""  # noqa: E501  # usage lines are contract

CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n?", re.DOTALL)
PRIVATE_KEY = re.compile(rb"-----BEGIN ((?:RSA |EC )?PRIVATE KEY)-----.*?-----END \1-----\n?", re.DOTALL)


async def listing(context: Context) -> None:
    async with context.controller() as controller:
        routes = await controller.app_routes(context.app)
    rows = [["ROUTE", "SERVICE", "ID", "STICKY", "LEADER", "PATH"]]
    for route in routes:
        rows.append(
            [
                address(route),
                route.service,
                f"{route.type}/{route.id}",
                _word(route.sticky),
                _word(route.leader),
                route.path,
            ]
        )
    show(table(rows), end="")


def address(route: Route) -> str:
    if route.type == "tcp":
        return f"tcp:{route.port}"
    scheme = "https" if route.certificate is not None or route.tls_cert else "http"
    return f"{scheme}:{route.domain}:{route.port}" if route.port else f"{scheme}:{route.domain}"


def _word(value: bool) -> str:
    return "true" if value else "false"


def certificate(cert: str | None, key: str | None) -> tuple[str, str]:
    """Certificate and key as PEM, from files or both from standard input; empty strings if none are given."""
    if not cert and not key:
        return "", ""
    if not cert or not key:
        raise CliError("Both the TLS certificate AND private key need to be specified")
    piped = sys.stdin.buffer.read() if "-" in (cert, key) else b""
    return _pem("cert", cert, piped, CERTIFICATE), _pem("key", key, piped, PRIVATE_KEY)


def _pem(what: str, path: str, piped: bytes, block: re.Pattern[bytes]) -> str:
    if path == "-":
        found = b"".join(match[0] for match in block.finditer(piped))
        if not found:
            raise CliError(f"Failed to read TLS {what}: No PEM blocks found in stdin")
        return found.decode()
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"Failed to read TLS {what}: {error}") from error


async def add_http(
    context: Context,
    service: str | None,
    port: int,
    tls_cert: str | None,
    tls_key: str | None,
    sticky: bool,
    leader: bool,
    no_leader: bool,
    no_drain_backends: bool,
    disable_keep_alives: bool,
    domain: str,
) -> None:
    from flynn.types.route import Route

    cert, key = certificate(tls_cert, tls_key)
    host, slash, path = domain.partition("/")
    route = Route(
        type="http",
        service=service or f"{context.app}-web",
        port=port,
        leader=leader and not no_leader,
        domain=host,
        path=slash + path,
        tls_cert=cert,
        tls_key=key,
        sticky=sticky,
        drain_backends=not no_drain_backends,
        disable_keep_alives=disable_keep_alives,
    )
    async with context.controller() as controller:
        created = await controller.create_route(context.app, route)
    show(f"{created.type}/{created.id}")


async def add_tcp(context: Context, service: str | None, port: int, leader: bool, no_drain_backends: bool) -> None:
    from flynn.types.route import Route

    route = Route(
        type="tcp",
        service=service or f"{context.app}-web",
        port=port,
        leader=leader,
        drain_backends=not no_drain_backends,
    )
    async with context.controller() as controller:
        created = await controller.create_route(context.app, route)
    show(f"{created.type}/{created.id} listening on port {created.port}")


async def update(
    context: Context,
    id: str,
    service: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    sticky: bool,
    no_sticky: bool,
    leader: bool,
    no_leader: bool,
    disable_keep_alives: bool,
    enable_keep_alives: bool,
) -> None:
    from flynn.types.codec import replace

    if (sticky and no_sticky) or (leader and no_leader) or (disable_keep_alives and enable_keep_alives):
        raise UsageError(NODES["route"].usage_block)
    kind, uuid = _split(id)
    cert, key = certificate(tls_cert, tls_key)
    async with context.controller() as controller:
        route = await controller.route(context.app, kind, uuid)
        # Without a certificate in the body the server keeps the one it has.
        route = replace(route, certificate=None, tls_cert=cert, tls_key=key, service=service or route.service)
        if sticky or no_sticky:
            route = replace(route, sticky=sticky)
        if leader or no_leader:
            route = replace(route, leader=leader)
        if disable_keep_alives or enable_keep_alives:
            route = replace(route, disable_keep_alives=disable_keep_alives)
        updated = await controller.update_route(context.app, route)
    if kind == "tcp":
        show(f"{kind}/{updated.id} listening on port {updated.port}")
    else:
        show(f"updated {kind}/{updated.id}")


async def remove(context: Context, id: str) -> None:
    kind, uuid = _split(id)
    async with context.controller() as controller:
        await controller.delete_route(context.app, kind, uuid)
    show(f"Route {id} removed.")


def _split(id: str) -> tuple[str, str]:
    kind, _, uuid = id.partition("/")
    if kind not in ("http", "tcp"):
        raise CliError(f"Route type {kind} not supported.")
    return kind, uuid


_SERVICE = option("-s", "--service")
_PORT = option("-p", "--port", type=int, default=0)
_TLS = (option("-c", "--tls-cert"), option("-k", "--tls-key"))
_ID = argument("id")

NODES = {
    "route": tree(
        ROUTE,
        leaf(ROUTE, listing),
        add=tree(
            ROUTE,
            http=leaf(
                ROUTE,
                add_http,
                _SERVICE,
                _PORT,
                *_TLS,
                flag("--sticky"),
                flag("--leader"),
                flag("--no-leader"),
                flag("--no-drain-backends"),
                flag("--disable-keep-alives"),
                argument("domain"),
            ),
            tcp=leaf(ROUTE, add_tcp, _SERVICE, _PORT, flag("--leader"), flag("--no-drain-backends")),
        ),
        update=leaf(
            ROUTE,
            update,
            _ID,
            _SERVICE,
            *_TLS,
            flag("--sticky"),
            flag("--no-sticky"),
            flag("--leader"),
            flag("--no-leader"),
            flag("--disable-keep-alives"),
            flag("--enable-keep-alives"),
        ),
        remove=leaf(ROUTE, remove, _ID),
    )
}
