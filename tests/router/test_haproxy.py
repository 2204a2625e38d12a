"""Our configuration in a real HAProxy: what is routed where, what backends and clients see, what a change disturbs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import re
import ssl
import warnings
from collections.abc import Awaitable, Callable

import pytest

from flynn.router.haproxy import Invalid
from flynn.router.render import render
from flynn.router.table import match
from flynn.types.codec import replace
from flynn.types.route import Certificate, Route
from tests.router.conftest import Backend, Head, Reply, Router, free_port, make_pair

pytestmark = pytest.mark.slow

Make = Callable[..., Awaitable[Backend]]
_ids = itertools.count()


def http(domain: str, service: str, path: str = "/", **rest: object) -> Route:
    return Route(type="http", id=f"r{next(_ids)}", domain=domain, service=service, path=path, **rest)  # type: ignore[arg-type]


async def test_requests_go_where_the_table_says(router: Router, backend: Make) -> None:
    names = ("exact", "sub", "deep", "wild", "wilder", "all")
    router.routes = [
        http("Shop.test", "exact"),
        http("shop.test", "sub", "/2/"),
        http("shop.test", "deep", "/a/c/d/"),
        http("*.shop.test", "wild"),
        http("*.test", "wilder"),
        http("*", "all"),
    ]
    for name in names:
        await router.serve(name, await backend(name))
    hosts = ["shop.test", "SHOP.test:80", "shop.test.", "x.shop.test", "a.b.c.d.e.shop.test", "other.test", "test"]
    hosts += ["nowhere.example", "1.2.3.4"]
    paths = ["/", "/2", "/2/", "/22", "/2/x", "//2///y", "/%32/z", "/a/c/d", "/a/c/d/e", "/a/c", "/A/c/d", "/2?/a/c/d"]
    for host, path in itertools.product(hosts, paths):
        plain = path.replace("%32", "2").partition("?")[0]
        expected = match(router.state, host, plain)
        reply = await router.ask(host, path)
        assert (reply.status, reply.body.decode()) == (200, expected.pool.service if expected else ""), (host, path)


async def test_a_new_domain_of_a_known_service_needs_no_reload(router: Router, backend: Make) -> None:
    router.routes = [http("a.test", "web")]
    await router.serve("web", await backend("one"))
    router.routes += [http("b.test", "web"), http("*.c.test", "web")]
    await router.apply()
    for host, status in {"b.test": 200, "x.y.c.test": 200, "c.test": 200, "d.test": 404}.items():
        for _ in range(8):  # on each of its threads
            assert (await router.ask(host)).status == status, host
    router.routes = router.routes[:1]
    await router.apply()
    for host in ("b.test", "x.y.c.test"):
        assert (await router.ask(host)).status == 404
    assert router.haproxy.reloads == 1


async def test_an_additional_port_has_routes_of_its_own(router: Router, backend: Make) -> None:
    port = router.settings.additional_http_ports[0]
    router.routes = [http("a.test", "main"), http("a.test", "extra", port=port)]
    await router.serve("main", await backend("main"))
    await router.serve("extra", await backend("extra"))
    assert (await router.ask("a.test")).body == b"main"
    assert (await router.ask("a.test", port=port)).body == b"extra"


async def test_answers_of_the_router_itself(router: Router) -> None:
    router.routes = [http("empty.test", "nobody")]
    await router.apply()
    unknown = await router.ask("unknown.test")
    assert (unknown.status, unknown.body) == (404, b"Not Found\n")
    assert unknown.headers["content-type"] == "text/plain; charset=utf-8"
    empty = await router.ask("empty.test")
    assert (empty.status, empty.body) == (503, b"Service Unavailable\n")
    assert empty.headers["content-type"] == "text/plain; charset=utf-8"
    options = await router.ask("unknown.test", "*", method="OPTIONS")
    assert (options.status, options.headers["content-length"]) == (200, "0")
    reader, writer = await asyncio.open_connection("127.0.0.1", router.settings.http_port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    assert (await Reply.read(reader)).status == 400
    writer.close()


async def test_headers_for_the_backend(router: Router, backend: Make) -> None:
    one = await backend("one")
    router.routes = [http("a.test", "web")]
    await router.serve("web", one)
    await router.ask("A.test:80", "/x?a=%28+b", headers="Proxy-Authorization: Basic x\r\nTE: trailers\r\n")
    head = one.heads[-1]
    port = str(router.settings.http_port)
    assert head.target == "/x?a=%28+b"
    assert head.headers["host"] == "A.test:80"
    assert head.headers["x-forwarded-for"] == "127.0.0.1"
    assert head.headers["x-forwarded-proto"] == "http"
    assert head.headers["x-forwarded-port"] == port
    assert re.fullmatch(r"\d{13}", head.headers["x-request-start"])
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", head.headers["x-request-id"])
    assert head.headers["proxy-authorization"] == "Basic x"
    assert {"te", "user-agent", "accept-encoding", "via"}.isdisjoint(head.headers)

    await router.ask(
        "a.test",
        headers="X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\n"
        "X-Forwarded-Port: 443\r\nX-Request-Start: 1\r\n",
    )
    head = one.heads[-1]
    assert head.headers["x-forwarded-for"] == "1.2.3.4, 127.0.0.1"
    assert head.headers["x-forwarded-proto"] == "https, http"
    assert head.headers["x-forwarded-port"] == f"443, {port}"
    assert len(head.headers["x-request-start"]) == 13


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a" * 19, False),
        ("a" * 20, True),
        ("-/+=AZaz09" * 20, True),
        ("a" * 201, False),
        ("a" * 20 + "*", False),
    ],
)
async def test_request_ids_of_clients_are_kept_when_sane(router: Router, backend: Make, given: str, kept: bool) -> None:
    one = await backend("one")
    router.routes = [http("a.test", "web")]
    await router.serve("web", one)
    await router.ask("a.test", headers=f"X-Request-Id: {given}\r\n")
    assert (one.heads[-1].headers["x-request-id"] == given) is kept


@pytest.mark.parametrize(
    ("connection", "removed"),
    [
        ("", set()),
        ("Connection: keep-alive\r\n", set()),
        ("Connection: close\r\n", set()),
        ("Connection: X-Foo\r\n", {"x-foo"}),
        ("Connection: close, ,X-Foo , host\r\nConnection: x-bar\r\n", {"x-foo", "x-bar"}),
        ("Connection: upGrade, X-Foo\r\nUpgrade: my-protocol\r\n", set()),
    ],
)
async def test_headers_named_in_connection_end_here(
    router: Router, backend: Make, connection: str, removed: set[str]
) -> None:
    one = await backend("one")
    router.routes = [http("a.test", "web")]
    await router.serve("web", one)
    reply = await router.ask("a.test", headers=f"X-Foo: 1\r\nX-Bar: 2\r\nX-Baz: 3\r\n{connection}")
    assert reply.status == 200
    head = one.heads[-1]
    assert {"x-foo", "x-bar", "x-baz", "host", "x-forwarded-for"} - head.headers.keys() == removed
    assert ("connection" in head.headers) is ("pgrade" in connection)


async def test_an_empty_post_keeps_its_length(router: Router, backend: Make) -> None:
    one = await backend("one")
    router.routes = [http("a.test", "web")]
    await router.serve("web", one)
    await router.ask("a.test", method="POST", headers="Content-Length: 0\r\n")
    assert one.heads[-1].headers["content-length"] == "0"
    assert "transfer-encoding" not in one.heads[-1].headers


# Backends


async def test_backends_come_and_go_without_a_failed_request_or_a_reload(router: Router, backend: Make) -> None:
    backends = [await backend(name) for name in "abc"]
    router.routes = [http("a.test", "web")]
    await router.serve("web", backends[0])
    reloads = router.haproxy.reloads
    stop = asyncio.Event()
    seen: set[bytes] = set()
    asked = 0

    async def client() -> None:
        nonlocal asked
        reader, writer = await asyncio.open_connection("127.0.0.1", router.settings.http_port)
        while not stop.is_set():
            writer.write(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
            reply = await Reply.read(reader)
            assert reply.status == 200
            seen.add(reply.body)
            asked += 1
        writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(client())
        for round_ in range(12):
            present = [backends[round_ % 3], backends[(round_ + 1) % 3]] if round_ % 2 else [backends[round_ % 3]]
            await router.serve("web", *present)
            await router.haproxy.reap()
            await asyncio.sleep(0.03)
        stop.set()
    assert seen == {b"a", b"b", b"c"}
    assert asked > 100
    assert router.haproxy.reloads == reloads


async def test_a_reload_fails_no_request(router: Router, backend: Make) -> None:
    one = await backend("one")
    router.routes = [http("a.test", "web")]
    await router.serve("web", one)
    stop = asyncio.Event()
    asked = 0

    async def client() -> None:
        nonlocal asked
        while not stop.is_set():
            assert (await router.ask("a.test")).status == 200
            asked += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(client())
        for number in range(4):
            router.routes.append(http(f"new{number}.test", f"new{number}"))
            await router.serve(f"new{number}", one)
            assert (await router.ask(f"new{number}.test")).status == 200
        stop.set()
    assert asked > 50
    assert router.haproxy.reloads >= 5


async def test_a_leaving_backend_finishes_its_request_and_is_deleted_then(router: Router, backend: Make) -> None:
    release = asyncio.Event()

    async def slow(backend: Backend, head: Head, reader: object, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
        await release.wait()
        writer.write(b"cd")
        return True

    old, new = await backend("old", slow), await backend("new")
    router.routes = [http("a.test", "web")]
    await router.serve("web", old)
    request = asyncio.ensure_future(router.ask("a.test"))
    while not old.heads:
        await asyncio.sleep(0.01)
    await router.serve("web", new)
    assert (await router.ask("a.test")).body == b"new"
    await router.haproxy.reap()
    ref = ("http:web", f"127.0.0.1:{old.port}")
    assert (await router.haproxy.stats())[ref].in_flight == 1
    release.set()
    assert (await request).body == b"abcd"
    await old.stop()  # an idle connection to it would keep the entry a little longer
    async with asyncio.timeout(10):
        while ref in await router.haproxy.stats():
            await router.haproxy.reap()
            await asyncio.sleep(0.05)
    assert not router.haproxy.retiring


async def test_a_backend_that_returns_before_it_was_deleted_is_used_again(router: Router, backend: Make) -> None:
    one, two = await backend("one"), await backend("two")
    router.routes = [http("a.test", "web")]
    await router.serve("web", one)
    await router.serve("web", two)
    await router.serve("web", one)
    reloads = router.haproxy.reloads
    assert (await router.ask("a.test")).body == b"one"
    assert reloads == 1


async def test_a_dead_backend_is_skipped_also_for_posts(router: Router, backend: Make) -> None:
    dead, alive = await backend("dead"), await backend("alive")
    router.routes = [http("a.test", "web")]
    await router.serve("web", dead, alive)
    await dead.stop()
    for method in ("GET", "POST") * 6:
        reply = await router.ask("a.test", method=method, body=b"x" * 10 if method == "POST" else b"")
        assert reply.body == b"alive"


async def test_a_post_is_never_sent_twice(router: Router, backend: Make) -> None:
    async def hang_up(backend: Backend, head: Head, reader: object, writer: object) -> bool:
        return False

    one, two = await backend("one", hang_up), await backend("two", hang_up)
    router.routes = [http("a.test", "web")]
    await router.serve("web", one, two)
    reply = await router.ask("a.test", method="POST", body=b"once")
    assert (reply.status, reply.body) == (503, b"Service Unavailable\n")
    assert len(one.heads) + len(two.heads) == 1


async def test_a_leader_route_follows_the_leader(router: Router, backend: Make) -> None:
    one, two = await backend("one"), await backend("two")
    router.routes = [http("a.test", "db", leader=True)]
    await router.serve("db", one, two, leader=one)
    assert {(await router.ask("a.test")).body for _ in range(6)} == {b"one"}
    await router.serve("db", one, two, leader=two)
    assert {(await router.ask("a.test")).body for _ in range(6)} == {b"two"}
    await router.serve("db", one, two)
    assert (await router.ask("a.test")).status == 503


async def test_sticky_sessions_keep_their_backend_while_it_is_there(router: Router, backend: Make) -> None:
    one, two = await backend("one"), await backend("two")
    router.routes = [http("a.test", "web", sticky=True)]
    await router.serve("web", one)
    cookie = (await router.ask("a.test")).headers["set-cookie"]
    value = cookie.partition(";")[0]
    assert cookie == f"{value}; Path=/; HttpOnly; SameSite=Lax"
    await router.serve("web", one, two)
    for _ in range(10):
        reply = await router.ask("a.test", headers=f"Cookie: {value}\r\n")
        assert reply.body == b"one"
        assert "set-cookie" not in reply.headers
    await one.stop()  # still registered
    reply = await router.ask("a.test", headers=f"Cookie: {value}\r\n", method="POST", body=b"x")
    assert reply.body == b"two"
    assert reply.headers["set-cookie"].partition(";")[0] not in ("", value)
    await router.serve("web", two)
    assert (await router.ask("a.test", headers=f"Cookie: {value}\r\n")).headers["set-cookie"]
    assert (await router.ask("a.test", headers="Cookie: _backend=nonsense\r\n")).body == b"two"


async def test_keep_alive_can_be_turned_off_for_a_route(router: Router, backend: Make) -> None:
    one = await backend("one")
    router.routes = [http("a.test", "web", disable_keep_alives=True)]
    await router.serve("web", one)
    reader, writer = await asyncio.open_connection("127.0.0.1", router.settings.http_port)
    for _ in range(3):
        writer.write(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
        assert (await Reply.read(reader)).status == 200
    writer.close()
    assert one.connections == 3
    assert one.heads[-1].headers["connection"] == "close"


async def test_bytes_reach_the_client_as_they_come(router: Router, backend: Make) -> None:
    step = asyncio.Event()

    async def stream(backend: Backend, head: Head, reader: object, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await step.wait()
        writer.write(b"1\r\nx\r\n")
        await asyncio.sleep(3600)
        return True

    router.routes = [http("a.test", "web")]
    await router.serve("web", await backend("one", stream))
    reader, writer = await asyncio.open_connection("127.0.0.1", router.settings.http_port)
    writer.write(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
    async with asyncio.timeout(1):
        assert b"200" in await reader.readuntil(b"\r\n\r\n")
        step.set()
        assert b"x" in await reader.readuntil(b"x\r\n")
    writer.close()


async def test_a_truncated_answer_is_not_passed_off_as_complete(router: Router, backend: Make) -> None:
    async def cut(backend: Backend, head: Head, reader: object, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        return False

    router.routes = [http("a.test", "web")]
    await router.serve("web", await backend("one", cut))
    reader, writer = await asyncio.open_connection("127.0.0.1", router.settings.http_port)
    writer.write(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
    assert not (await reader.read(-1)).endswith(b"0\r\n\r\n")
    writer.close()


async def test_a_backend_notices_that_its_client_left(router: Router, backend: Make) -> None:
    gone = asyncio.Event()

    async def wait(backend: Backend, head: Head, reader: asyncio.StreamReader, writer: object) -> bool:
        with contextlib.suppress(ConnectionError):
            assert await reader.read(1) == b""
        gone.set()
        return False

    one = await backend("one", wait)
    router.routes = [http("a.test", "web")]
    await router.serve("web", one)
    _, writer = await asyncio.open_connection("127.0.0.1", router.settings.http_port)
    writer.write(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
    while not one.heads:
        await asyncio.sleep(0.01)
    writer.close()
    async with asyncio.timeout(10):
        await gone.wait()


# Upgrades


@pytest.mark.parametrize("protocol", ["websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "my-protocol/7"])
async def test_an_upgrade_is_a_tunnel_also_on_a_used_connection(router: Router, backend: Make, protocol: str) -> None:
    async def accept(backend: Backend, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if "upgrade" not in head.headers:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            return True
        lines = f"Connection: Upgrade\r\nUpgrade: {head.headers['upgrade']}\r\n\r\nhello"
        writer.write(f"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: x\r\n{lines}".encode())
        while data := await reader.read(100):
            writer.write(data.upper())
        return False

    router.routes = [http("a.test", "web")]
    await router.serve("web", await backend("one", accept))
    reader, writer = await asyncio.open_connection("127.0.0.1", router.settings.http_port)
    writer.write(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
    assert (await Reply.read(reader)).status == 200
    head = f"GET /ws HTTP/1.1\r\nHost: a.test\r\nConnection: keep-alive, UpGrade\r\nUpgrade: {protocol}\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(5):
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(5) == b"hello"
        writer.write(b"ping")
        assert await reader.readexactly(4) == b"PING"
    writer.close()


# TLS


def client_context(*protocols: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


async def shown(router: Router, name: str | None, *protocols: str) -> tuple[str, str | None]:
    """The certificate (PEM) and the protocol a client with this SNI gets."""
    context = client_context(*protocols)
    _, writer = await asyncio.open_connection(
        "127.0.0.1", router.settings.https_port, ssl=context, server_hostname=name or ""
    )
    found = writer.get_extra_info("ssl_object")
    pem = ssl.DER_cert_to_PEM_cert(found.getpeercert(True))
    writer.close()
    return pem.strip(), found.selected_alpn_protocol()


async def test_certificates_by_server_name(router: Router, backend: Make) -> None:
    pairs = {name: make_pair(name) for name in ("own", "wild", "new")}
    default = router.settings.default_pair
    assert default is not None

    def certified(name: str) -> Certificate:
        return Certificate(cert=pairs[name][0], key=pairs[name][1])

    router.routes = [
        http("own.test", "web", certificate=certified("own")),
        http("own.test", "web", "/sub/", certificate=certified("new")),
        http("*.wild.test", "web", certificate=certified("wild")),
        http("plain.wild.test", "web"),
        http("none.test", "web"),
    ]
    await router.serve("web", await backend("one"))
    for name, expected in {
        "own.test": pairs["own"][0],
        "x.wild.test": pairs["wild"][0],
        "wild.test": pairs["wild"][0],
        "plain.wild.test": default.pem,
        "none.test": default.pem,
        "unknown.test": default.pem,
        None: default.pem,
    }.items():
        pem, _ = await shown(router, name)
        assert pem in expected, name
    assert (await shown(router, "own.test", "h2", "http/1.1"))[1] == "h2"
    assert (await shown(router, "own.test", "http/1.1"))[1] == "http/1.1"

    # A replaced and an added certificate take effect on the next handshake, without a reload.
    reloads = router.haproxy.reloads
    router.routes[0] = replace(router.routes[0], certificate=certified("new"))
    router.routes[4] = replace(router.routes[4], certificate=certified("own"))
    await router.apply()
    assert (await shown(router, "own.test"))[0] in pairs["new"][0]
    assert (await shown(router, "none.test"))[0] in pairs["own"][0]
    router.routes[4] = replace(router.routes[4], certificate=None)
    await router.apply()
    assert (await shown(router, "none.test"))[0] in default.pem
    assert router.haproxy.reloads == reloads


async def test_git_is_not_offered_http2(router: Router, backend: Make) -> None:
    """HAProxy 2.6 ends a stream in good order when a backend dies between two chunks; git waits for the rest."""
    cert, key = make_pair("git")
    one = await backend("one")
    router.routes = [http("app.test", "web", certificate=Certificate(cert=cert, key=key))]
    await router.serve("web", one)
    await router.serve("gitreceive", one)
    reloads = router.haproxy.reloads
    router.routes.append(http("git.test", "gitreceive", certificate=Certificate(cert=cert, key=key)))
    await router.apply()  # at run time
    for _ in range(2):
        assert (await shown(router, "git.test", "h2", "http/1.1"))[1] == "http/1.1"
        assert (await shown(router, "app.test", "h2", "http/1.1"))[1] == "h2"
        router.routes.append(http("third.test", "other"))
        await router.serve("other", one)  # a reload
    assert router.haproxy.reloads > reloads


async def test_old_tls_is_refused(router: Router) -> None:
    await router.apply()
    context = client_context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", router.settings.https_port, ssl=context, server_hostname="a.test")


async def test_http2(router: Router, backend: Make) -> None:
    one = await backend("one")
    router.routes = [http("a.test", "web")]
    await router.serve("web", one)
    port = router.settings.https_port
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sk", "--http2", "--resolve", f"a.test:{port}:127.0.0.1", "-w", "|%{http_version}|%{http_code}|"),
        *(f"https://a.test:{port}/1", f"https://a.test:{port}/2"),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert output.decode() == "one|2|200|one|2|200|"
    assert one.heads[-1].headers["x-forwarded-proto"] == "https"


async def test_the_proxy_protocol_tells_the_client(router: Router, backend: Make) -> None:
    one = await backend("one")
    router.settings = dataclasses.replace(router.settings, proxy_protocol=True)
    router.routes = [http("a.test", "web")]
    await router.serve("web", one)
    for line, served in ((b"PROXY TCP4 192.0.2.77 192.0.2.1 4711 80\r\n", True), (b"PROXY TCP4 nonsense\r\n", False)):
        for port, tls in ((router.settings.http_port, None), (router.settings.https_port, client_context())):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(line)
            if tls is not None and served:
                await writer.start_tls(tls, server_hostname="a.test")
            writer.write(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
            if served:
                assert (await Reply.read(reader)).status == 200
                assert one.heads[-1].headers["x-forwarded-for"] == "192.0.2.77"
            else:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read(-1) == b""
            writer.close()


async def test_the_operators_own_page_for_503(router: Router) -> None:
    router.settings = dataclasses.replace(router.settings, unavailable_page=b"<h1>Back soon</h1>")
    router.routes = [http("a.test", "web")]
    await router.apply()
    reply = await router.ask("a.test")
    assert (reply.status, reply.body) == (503, b"<h1>Back soon</h1>")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"


# Mistakes


async def test_an_invalid_configuration_changes_nothing(router: Router, backend: Make) -> None:
    router.routes = [http("a.test", "web")]
    await router.serve("web", await backend("one"))
    broken = dataclasses.replace(router.settings, listen_ip="not an address")
    with pytest.raises(Invalid):
        await router.haproxy.apply(render(router.state, broken))
    assert (await router.ask("a.test")).body == b"one"
    router.routes.append(http("b.test", "web"))
    await router.apply()
    assert (await router.ask("b.test")).body == b"one"


# TCP


async def test_tcp_routes(router: Router, backend: Make) -> None:
    port = free_port()
    router.routes = [Route(type="tcp", id="t", port=port, service="db")]
    await router.apply()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await reader.read(1) == b""  # nobody there: closed at once
    writer.close()

    received = bytearray()

    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.read(-1))  # the client's half-close arrives
        writer.write(bytes(received).upper())
        writer.close()

    server = await asyncio.start_server(shout, "127.0.0.1", 0)
    one = Backend("one", port=server.sockets[0].getsockname()[1])
    await router.serve("db", one)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello")
    writer.write_eof()
    assert await reader.read(-1) == b"HELLO"
    writer.close()
    router.routes = []
    await router.apply()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    server.close()
