"""Routes and certificates over HTTP."""

from __future__ import annotations

import msgspec
import pytest

from flynn.controller.client import Controller
from flynn.identity.authority import ClusterCA
from flynn.types.app import App
from flynn.types.errors import Conflict, NotFound, ValidationError
from flynn.types.route import Certificate, Route

from .conftest import World


def http(domain: str = "shop.example.com", **changes: object) -> Route:
    defaults = {"type": "http", "domain": domain, "service": "shop-web", "drain_backends": True}
    return Route(**{**defaults, **changes})  # type: ignore[arg-type]


def tcp(port: int = 0, **changes: object) -> Route:
    return Route(**{"type": "tcp", "port": port, "service": "shop-tcp", **changes})  # type: ignore[arg-type]


@pytest.fixture
async def app(controller: Controller) -> App:
    return await controller.create_app(App(name="shop", meta={"flynn-system-app": "true"}))


async def test_an_http_route(controller: Controller, app: App) -> None:
    route = await controller.create_route("shop", http())
    assert (route.path, route.parent_ref) == ("/", f"controller/apps/{app.id}")
    assert await controller.route("shop", "http", route.id) == route
    assert await controller.routes() == [route] == await controller.app_routes("shop")
    with pytest.raises(Conflict, match="Duplicate route"):
        await controller.create_route("shop", http())
    await controller.delete_route("shop", "http", route.id)
    assert await controller.routes() == []
    assert [event.object_type for event in await controller.events(object_id=route.id)] == ["route_deletion", "route"]


async def test_paths_hang_on_their_domain(controller: Controller, app: App) -> None:
    with pytest.raises(ValidationError, match="Invalid route"):
        await controller.create_route("shop", http(path="/api"))
    root = await controller.create_route("shop", http())
    path = await controller.create_route("shop", http(path="/api"))
    assert path.path == "/api/"
    with pytest.raises(ValidationError, match="Route has dependent routes"):
        await controller.delete_route("shop", "http", root.id)
    await controller.delete_route("shop", "http", path.id)
    await controller.delete_route("shop", "http", root.id)


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (http(path="api"), "Invalid route"),
        (http(port=8080), "Invalid route"),
        (http(domain=""), "domain"),
        (http(domain="a b"), "domain"),
        (http(domain="a" * 256), "domain"),
        (http(service=""), "service"),
        (tcp(65535), "port"),
        (tcp(service=""), "service"),
        (Route(type="udp", service="x"), "type Enum error"),
        (Route(service="x"), "type"),
        (http(tls_cert="no", tls_key="pair"), "Certificate invalid"),
    ],
    ids=repr,
)
async def test_bad_routes(controller: Controller, app: App, route: Route, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as refused:
        await controller.create_route("shop", route)
    assert not refused.value.retry


async def test_routes_of_a_service_agree_on_draining(controller: Controller, app: App) -> None:
    await controller.create_route("shop", http())
    with pytest.raises(ValidationError, match="Invalid route"):
        await controller.create_route("shop", http("other.example.com", drain_backends=False))


async def test_tcp_ports(controller: Controller, app: App) -> None:
    first, second = [await controller.create_route("shop", tcp()) for _ in range(2)]
    assert (first.port, second.port) == (3000, 3001)
    await controller.delete_route("shop", "tcp", first.id)
    assert (await controller.create_route("shop", tcp())).port == 3000, "a port that is free again is used again"
    for reserved in (80, 443):
        with pytest.raises(Conflict, match="Port reserved for HTTP/HTTPS traffic"):
            await controller.create_route("shop", tcp(reserved))
    with pytest.raises(Conflict, match="Duplicate route"):
        await controller.create_route("shop", tcp(3001))


async def test_an_update_keeps_what_it_must(controller: Controller, app: App) -> None:
    route = await controller.create_route("shop", http())
    changed = await controller.update_route(
        "shop", Route(type="http", id=route.id, domain=route.domain, service="other-web", sticky=True)
    )
    assert (changed.service, changed.sticky, changed.parent_ref, changed.drain_backends) == (
        "other-web",
        True,
        route.parent_ref,
        True,
    )
    await controller.create_app(App(name="other"))
    with pytest.raises(NotFound):
        await controller.update_route("other", changed)
    with pytest.raises(NotFound):
        await controller.update_route("shop", msgspec.structs.replace(changed, domain="x.y"))  # type: ignore[type-var]


async def test_certificates(controller: Controller, app: App) -> None:
    authority = ClusterCA.create()
    pair, other = (authority.issue_site(["shop.example.com"]) for _ in range(2))
    cert, key = pair.cert.decode(), pair.key.decode()
    route = await controller.create_route("shop", http(certificate=Certificate(cert=f"\n {cert}\n\n", key=f"{key}\n ")))
    assert route.certificate is not None
    assert (route.certificate.cert, route.certificate.key) == (cert.strip(), key.strip())
    legacy = await controller.create_route("shop", http("b.example.com", tls_cert=cert, tls_key=key))
    assert legacy.certificate is not None and legacy.certificate.id == route.certificate.id, "stored once"
    assert {r.certificate.key for r in await controller.routes() if r.certificate} == {key.strip()}
    with pytest.raises(ValidationError, match="private key does not match public key"):
        await controller.create_route("shop", http("c.example.com", tls_cert=cert, tls_key=other.key.decode()))
    renewed = await controller.update_route(
        "shop",
        http(id=route.id, certificate=Certificate(cert=other.cert.decode(), key=other.key.decode())),
    )
    assert renewed.certificate is not None and renewed.certificate.id != route.certificate.id


async def test_pages_of_other_origins(world: World) -> None:
    async with world.http(key=None) as http:
        async with http._request("OPTIONS", "/apps", {"Origin": "https://x.test"}, None, None, 5) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == "https://x.test"
            assert "Access-Control-Allow-Credentials" not in answer.headers
        origin = {"Origin": "https://dashboard.cluster.test"}
        async with http._request("OPTIONS", "/apps", origin, None, None, 5) as answer:
            assert answer.headers["Access-Control-Allow-Credentials"] == "true"


async def test_private_keys_stay_out_of_the_event_log(controller: Controller, app: App) -> None:
    pair = ClusterCA.create().issue_site(["shop.example.com"])
    await controller.create_route("shop", http(tls_cert=pair.cert.decode(), tls_key=pair.key.decode()))
    [event] = await controller.events(object_types=["route"])
    assert "CERTIFICATE" in event.data["certificate"]["cert"]
    assert "PRIVATE KEY" not in str(event.data)
