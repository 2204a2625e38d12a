"""The server and the client against each other, over loopback, with and without TLS."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flynn.http.client import HttpClient, KeyAuth, Retry
from flynn.http.server import Api, EventStream, Raw, Request, Streaming, listen
from flynn.identity import ANYONE, Identity, PeerKind, access
from flynn.identity.authority import ClusterCA
from flynn.types.app import App
from flynn.types.errors import (
    BadSyntax,
    BodyTooBig,
    Forbidden,
    NotFound,
    Unauthorized,
    UnknownError,
    Unreachable,
    ValidationError,
)


def an_api() -> Api:
    api = Api("test", max_body_bytes=1000)

    async def echo(request: Request) -> App:
        return await request.body(App)

    async def whoami(request: Request) -> Raw:
        return Raw(str(request.peer), "text/plain")

    async def missing(request: Request) -> None:
        raise NotFound(f"no {request.path('id')}")

    async def broken(request: Request) -> None:
        raise RuntimeError("a bug with a secret")

    async def count(request: Request) -> EventStream:
        async def items() -> AsyncIterator[App]:
            for number in range(int(request.query("n"))):
                yield App(name=f"app-{number}")
            if request.query("fail"):
                raise NotFound("gone")

        return EventStream(items())

    async def store(request: Request) -> Streaming:
        async def chunks() -> AsyncIterator[bytes]:
            async for chunk in request.chunks():
                yield chunk

        return Streaming(chunks())

    async def shout(request: Request) -> None:
        name = (await request.body(App)).name
        async with await request.upgrade("flynn-test/0") as connection:
            connection.write(f"hello {name};".encode())
            while data := await connection.read():
                connection.write(data.upper())
                await connection.drain()

    api.route("PUT", "/echo", echo, allow=ANYONE)
    api.route("GET", "/whoami", whoami, allow=access("host", "operator", "app:controller"))
    api.route("GET", "/missing/{id}", missing, allow=ANYONE)
    api.route("GET", "/broken", broken, allow=ANYONE)
    api.route("GET", "/count", count, allow=ANYONE)
    api.route("PUT", "/store", store, allow=ANYONE)
    api.route("POST", "/shout", shout, allow=ANYONE)
    return api


@pytest.fixture
async def plain() -> AsyncIterator[HttpClient]:
    async with listen(an_api(), "127.0.0.1", 0) as (host, port), HttpClient(f"http://{host}:{port}") as client:
        yield client


async def test_a_value_survives_the_round_trip(plain: HttpClient) -> None:
    assert await plain.put("/echo", App(name="shop", meta={"a": "b"}), answer=App) == App(name="shop", meta={"a": "b"})


@pytest.mark.parametrize(
    ("body", "error", "text"),
    [
        (b"{", BadSyntax, "JSON"),
        (b"", BadSyntax, "empty"),
        (b'{"name": 1}', ValidationError, "name"),
        (b'{"meta": {"a": 1}}', ValidationError, "meta"),
        (b'{"name": "' + b"x" * 2000 + b'"}', BodyTooBig, "1000"),
    ],
)
async def test_bad_input_is_refused_with_the_reason(
    plain: HttpClient, body: bytes, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        await plain.upload("/echo", body, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("path", ["/echo", "/nowhere"])
async def test_a_refusal_before_the_end_of_the_body_closes_the_connection(path: str) -> None:
    async with listen(an_api(), "127.0.0.1", 0) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n"
        writer.write(head.encode() + b"{")
        answer = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
    assert b"Connection: close" in answer


async def test_text_after_the_first_value_is_ignored(plain: HttpClient) -> None:
    await plain.upload("/echo", b'{"name":"a"} tail', headers={"Content-Type": "application/json"})


async def test_the_content_type_is_needed(plain: HttpClient) -> None:
    with pytest.raises(ValidationError, match="Content-Type"):
        await plain.upload("/echo", b"{}", headers={"Content-Type": "text/plain"})


async def test_errors_arrive_as_the_class_that_was_raised(plain: HttpClient) -> None:
    with pytest.raises(NotFound, match="no x/y"):
        await plain.get("/missing/x%2Fy")


async def test_a_bug_is_a_500_that_tells_nothing_and_the_server_lives_on(plain: HttpClient) -> None:
    with pytest.raises(UnknownError, match="Something went wrong"):
        await plain.get("/broken")
    await plain.get("/ping")


@pytest.mark.parametrize(("method", "path"), [("GET", "/nowhere"), ("POST", "/echo"), ("HEAD", "/echo")])
async def test_unknown_paths_and_methods_are_both_404(plain: HttpClient, method: str, path: str) -> None:
    with pytest.raises(NotFound):
        await plain.call(method, path)


async def test_a_stream_of_events_ends_when_the_server_ends_it(plain: HttpClient) -> None:
    names = [app.name async for app in plain.events("/count", App, params={"n": "300"})]
    assert names == [f"app-{n}" for n in range(300)]


async def test_a_failing_stream_says_why(plain: HttpClient) -> None:
    seen = []
    with pytest.raises(Exception, match="gone"):
        async for app in plain.events("/count", App, params={"n": "2", "fail": "1"}):
            seen.append(app.name)
    assert seen == ["app-0", "app-1"]


async def test_the_bytes_of_a_stream() -> None:
    async with listen(an_api(), "127.0.0.1", 0) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET /count?n=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Type: text/event-stream; charset=utf-8" in head
    assert b'data: {"name":"app-0","meta":{}}\n\n' in body


async def test_bodies_stream_both_ways(plain: HttpClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b"x" * 100_000

    await plain.upload("/store", pieces())


async def test_an_upgraded_connection_is_raw(plain: HttpClient) -> None:
    for _ in range(2):
        async with await plain.upgrade("/shout", App(name="shop"), "flynn-test/0") as connection:
            assert await connection.readexactly(11) == b"hello shop;"
            connection.write(b"abc" * 1000)
            await connection.drain()
            assert await connection.readexactly(3000) == b"ABC" * 1000
    await plain.get("/ping")


async def test_a_refused_upgrade_is_an_ordinary_error(plain: HttpClient) -> None:
    with pytest.raises(ValidationError, match="name"):
        await plain.upgrade("/shout", {"name": 1}, "flynn-test/0")


@pytest.fixture
def authority() -> ClusterCA:
    return ClusterCA.create()


def identity(authority: ClusterCA, directory: Path, app: str) -> Identity:
    authority.issue_job(app, "web", app, ["127.0.0.1"]).write(directory / app)
    return Identity.load(directory / app)


async def test_peers_are_known_by_their_certificates(authority: ClusterCA, tmp_path: Path) -> None:
    server = identity(authority, tmp_path, "blobstore")
    controller, stranger = identity(authority, tmp_path, "controller"), identity(authority, tmp_path, "redis")
    async with listen(an_api(), "127.0.0.1", 0, tls=server) as (host, port):
        url = f"https://{host}:{port}"
        async with HttpClient(url, tls=controller) as client:
            assert await client.call("GET", "/whoami", answer=bytes) == b"app:controller:web"
            async with await client.upgrade("/shout", App(name="tls"), "flynn-test/0") as connection:
                assert await connection.readexactly(10) == b"hello tls;"
                connection.write(b"abc")
                assert await connection.readexactly(3) == b"ABC"
        async with HttpClient(url, tls=stranger) as client:
            with pytest.raises(Forbidden, match="app:redis:web may not"):
                await client.get("/whoami")
        async with HttpClient(f"https://blobstore.discoverd:{port}", tls=controller, connect_to=f"{host}:{port}") as c:
            await c.get("/ping")
        async with HttpClient(f"https://mongodb.discoverd:{port}", tls=controller, connect_to=f"{host}:{port}") as c:
            with pytest.raises(Unreachable):
                await c.get("/ping")


async def test_what_the_router_passes_on_is_not_the_routers_own(authority: ClusterCA, tmp_path: Path) -> None:
    server, router = identity(authority, tmp_path, "blobstore"), identity(authority, tmp_path, "router")
    api = an_api()

    async def inside(request: Request) -> None: ...

    api.route("GET", "/inside", inside, allow=access("app:*"))
    async with listen(api, "127.0.0.1", 0, tls=server) as (host, port):
        async with HttpClient(f"https://{host}:{port}", tls=router) as client:
            await client.get("/inside")
            with pytest.raises(Forbidden):
                await client.call("GET", "/inside", headers={"X-Forwarded-For": "203.0.113.9"})


async def test_without_a_certificate_only_open_endpoints_answer(authority: ClusterCA, tmp_path: Path) -> None:
    import ssl

    server = identity(authority, tmp_path, "blobstore")
    context = ssl.create_default_context(cafile=str(server.ca_path))
    async with listen(an_api(), "127.0.0.1", 0, tls=server, require_client=False) as (host, port):
        async with HttpClient(f"https://{host}:{port}", tls=context) as client:
            await client.get("/ping")
            with pytest.raises(Unauthorized):
                await client.get("/whoami")
    async with listen(an_api(), "127.0.0.1", 0, tls=server) as (host, port):
        async with HttpClient(f"https://{host}:{port}", tls=context) as client:
            with pytest.raises(Unreachable):
                await client.get("/ping")


async def test_the_admin_key_makes_an_operator() -> None:
    async with listen(an_api(), "127.0.0.1", 0, key="secret") as (host, port):
        async with HttpClient(f"http://{host}:{port}", auth=KeyAuth("secret")) as client:
            assert await client.call("GET", "/whoami", answer=bytes) == f"{PeerKind.OPERATOR}:key".encode()
        async with HttpClient(f"http://{host}:{port}", auth=KeyAuth("guess")) as client:
            with pytest.raises(Unauthorized):
                await client.get("/whoami")


async def test_a_client_that_goes_away_ends_its_stream() -> None:
    ended = asyncio.Event()
    api = Api("test")

    async def endless(request: Request) -> EventStream:
        async def items() -> AsyncIterator[App]:
            try:
                while True:
                    yield App(name="x")
                    await asyncio.sleep(3600)
            finally:
                ended.set()

        return EventStream(items())

    api.route("GET", "/endless", endless, allow=ANYONE)
    async with listen(api, "127.0.0.1", 0) as (host, port):
        async with HttpClient(f"http://{host}:{port}") as client:
            async for _ in client.events("/endless", App):
                break
        async with asyncio.timeout(5):
            await ended.wait()


async def test_a_refused_connection_is_retried_until_the_server_is_there() -> None:
    api = an_api()
    async with listen(api, "127.0.0.1", 0) as (host, port):
        pass
    client = HttpClient(f"http://{host}:{port}", retry=Retry())

    async def later() -> None:
        async with listen(api, host, port):
            await answered.wait()

    answered = asyncio.Event()
    async with client, asyncio.TaskGroup() as group:
        group.create_task(later())
        await client.get("/ping")
        answered.set()


async def test_nobody_there_is_unreachable() -> None:
    async with HttpClient("http://127.0.0.1:1") as client:
        with pytest.raises(Unreachable):
            await client.get("/ping")


def test_an_endpoint_without_a_rule_cannot_be_declared() -> None:
    with pytest.raises(ValueError, match="nobody"):
        access()


def test_the_table_of_access_can_be_walked() -> None:
    table = {(e.method, e.path): str(e.allow) for e in an_api().endpoints}
    assert table["GET", "/whoami"] == "app:controller host operator"
    assert table["GET", "/metrics"] == "app:* host operator"
