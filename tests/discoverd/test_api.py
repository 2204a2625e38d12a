"""Status codes, bodies and stream bytes, as old clients expect them."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from flynn.identity import ANYONE
from tests.discoverd.harness import Place, member

ID = "cb6ddf019e39bc41371b307e22939e3d"
INSTANCE = {"id": ID, "addr": "127.0.0.1:80", "proto": "tcp"}


@dataclass
class Wire:
    """Speaks HTTP by hand, so that nothing between the test and the bytes can be kind to the server."""

    place: Place

    async def send(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        reader, writer = await self.open(method, path, body, connection="close", **headers)
        head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        status, *lines = head.decode().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines)
        return int(status.split()[1]), fields, rest

    async def open(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = {"host": self.place.http_address, "content-type": "application/json", **sent}
        reader, writer = await asyncio.open_connection(
            self.place.address, 1111, ssl=self.place.identity.client_context()
        )
        lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        writer.write(f"{method} {path} HTTP/1.1\r\n{lines}content-length: {len(raw)}\r\n\r\n".encode() + raw)
        return reader, writer


@pytest.fixture
async def wire(place: Place) -> AsyncIterator[Wire]:
    async with member(place):
        yield Wire(place)


def code(body: bytes) -> str:
    return str(json.loads(body)["code"])


async def test_the_life_of_a_service(wire: Wire) -> None:
    assert (await wire.send("PUT", "/services/web", {"leader_type": "oldest"}))[::2] == (200, b"")
    status, _, body = await wire.send("PUT", "/services/web", {})
    assert (status, code(body)) == (409, "object_exists")
    assert (await wire.send("PUT", f"/services/web/instances/{ID}", INSTANCE))[::2] == (200, b"")
    status, headers, body = await wire.send("GET", "/services/web/instances")
    [instance] = json.loads(body)
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert instance == {**INSTANCE, "index": instance["index"]}
    assert json.loads((await wire.send("GET", "/services/web/leader"))[2]) == instance
    assert (await wire.send("DELETE", f"/services/web/instances/{ID}"))[::2] == (200, b"")
    assert (await wire.send("DELETE", f"/services/web/instances/{ID}"))[::2] == (200, b"")
    assert (await wire.send("DELETE", "/services/web"))[::2] == (200, b"")
    status, _, body = await wire.send("DELETE", "/services/web")
    assert (status, code(body)) == (404, "object_not_found")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "expected"),
    [
        ("GET", "/services/no/instances", None, 404, "object_not_found"),
        ("GET", "/services/web/instances", None, 404, "object_not_found"),  # exists, but nobody is there
        ("GET", "/services/no/leader", None, 404, "object_not_found"),
        ("GET", "/services/web/leader", None, 404, "object_not_found"),
        ("GET", "/services/web/meta", None, 404, "object_not_found"),
        ("PUT", "/services/Web", {}, 400, "validation_error"),
        ("PUT", "/services/new", {"leader_type": "manually"}, 400, "validation_error"),
        ("PUT", "/services/new", b"{", 400, "syntax_error"),
        ("PUT", "/services/new", None, 400, "syntax_error"),
        ("PUT", f"/services/no/instances/{ID}", INSTANCE, 404, "object_not_found"),
        ("PUT", "/services/web/instances/x", {**INSTANCE, "id": "x"}, 400, "validation_error"),
        ("PUT", "/services/web/instances/x", {**INSTANCE, "proto": "TCP"}, 400, "validation_error"),
        ("PUT", "/services/web/instances/x", {**INSTANCE, "addr": "nowhere"}, 400, "validation_error"),
        ("PUT", "/services/web/instances/x", {"id": ID}, 400, "validation_error"),
        ("DELETE", f"/services/web/instances/{ID}", None, 404, "object_not_found"),
        ("PUT", "/services/no/meta", {"data": 1, "index": 0}, 404, "object_not_found"),
        ("PUT", "/services/web/meta", {"data": 1, "index": 9}, 412, "precondition_failed"),
        ("PUT", "/services/web/meta", {"data": 10**30, "index": 0}, 400, "validation_error"),
        ("PUT", "/services/web/meta", {"data": 1, "index": 10**30}, 400, "validation_error"),
        ("PUT", "/services/web/meta", b'{"data":%s' % (b"[" * 100000), 400, "syntax_error"),
        ("PUT", "/services/web/meta", b'{"data":"\\ud800"}', 400, "syntax_error"),
        ("PUT", "/services/web/meta", b" " * (5 << 20), 400, "request_body_too_big"),
        ("PUT", "/services/web/leader", {"id": ID}, 400, "validation_error"),
        ("PUT", "/services/no/leader", {"id": ID}, 400, "validation_error"),
        ("PUT", "/raft/peers/nonsense", None, 400, "validation_error"),
    ],
)
async def test_refusals(wire: Wire, method: str, path: str, body: object, status: int, expected: str) -> None:
    await wire.send("PUT", "/services/web", {})
    got, headers, answer = await wire.send(method, path, body)
    assert (got, headers["Content-Type"], code(answer)) == (status, "application/json", expected)
    assert json.loads(answer)["retry"] is False


async def test_small_kindnesses_of_the_original(wire: Wire) -> None:
    assert (await wire.send("PUT", "/services/web", b"null"))[0] == 200
    assert (await wire.send("PUT", "/services/web/instances/ignored", INSTANCE, content_type="text/plain"))[0] == 200
    assert (await wire.send("PUT", "/services/web/instances/x", {**INSTANCE, "index": 77, "unknown": 1}))[0] == 200
    assert (await wire.send("PUT", "/services/new", {}, content_type="text/plain"))[0] == 400


async def test_who_was_heard_when_and_what_there_is(wire: Wire) -> None:
    await wire.send("PUT", "/services/web", {"leader_type": ""})
    await wire.send("PUT", f"/services/web/instances/{ID}", INSTANCE)
    heard = json.loads((await wire.send("GET", "/debug/heartbeats"))[2])
    assert 0 <= heard["web"][ID] < 5
    assert json.loads((await wire.send("GET", "/services"))[2]) == {
        "web": {"leader_type": "", "instances": 1, "leader": ID}
    }


async def test_unknown_paths_and_methods_are_plain_404s(wire: Wire) -> None:
    for method, path in (("GET", "/nope"), ("POST", "/services/web"), ("PATCH", "/services/web/leader")):
        status, headers, body = await wire.send(method, path)
        assert (status, body) == (404, b"404 page not found\n")
        assert headers["Content-Type"].startswith("text/plain")


async def test_metadata_echoes_the_leader_only_to_its_writer(wire: Wire) -> None:
    await wire.send("PUT", "/services/db", {"leader_type": "manual"})
    await wire.send("PUT", f"/services/db/instances/{ID}", INSTANCE)
    _, _, body = await wire.send("PUT", "/services/db/meta", {"data": {"a": [1]}, "index": 0, "leader_id": ID})
    written = json.loads(body)
    assert written == {"data": {"a": [1]}, "index": written["index"], "leader_id": ID}
    _, _, body = await wire.send("GET", "/services/db/meta")
    assert body == b'{"data":{"a":[1]},"index":%d}' % written["index"]


async def test_every_answer_carries_peers_and_index(wire: Wire) -> None:
    _, headers, _ = await wire.send("GET", "/services/no/meta")
    assert headers["Discoverd-Peers"] == headers["Discoverd-Current-Peers"] == wire.place.http_address
    assert int(headers["Discoverd-Index"]) == int(headers["Discoverd-Current-Index"]) > 0


async def test_raft_is_visible(wire: Wire) -> None:
    assert json.loads((await wire.send("GET", "/raft/leader"))[2]) == {"host": wire.place.http_address}
    assert json.loads((await wire.send("GET", "/raft/peers"))[2]) == [wire.place.http_address]
    status, _, body = await wire.send("PUT", f"/raft/peers/http://{wire.place.http_address}")
    assert status == 200 and json.loads(body)["last_index"] > 0
    status, _, body = await wire.send("GET", "/.well-known/status")
    assert (status, json.loads(body)["data"]["detail"]["role"]) == (200, "leader")


async def test_streams_are_byte_exact(wire: Wire) -> None:
    await wire.send("PUT", "/services/web", {})
    reader, writer = await wire.open("GET", "/services/web")
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"Content-Type: text/event-stream; charset=utf-8\r\n" in head
    assert await read_event(reader) == b'data: {"service":"web","kind":"current"}\n\n'
    await wire.send("PUT", f"/services/web/instances/{ID}", {**INSTANCE, "meta": {"k": "v"}})
    instance = b'{"id":"%s","addr":"127.0.0.1:80","proto":"tcp","meta":{"k":"v"},"index":' % ID.encode()
    up = await read_event(reader)
    assert up.startswith(b'data: {"service":"web","kind":"up","instance":' + instance)
    assert up.endswith(b"}}\n\n")
    assert await read_event(reader) == up.replace(b'"up"', b'"leader"')
    await wire.send("DELETE", f"/services/web/instances/{ID}")
    assert await read_event(reader) == up.replace(b'"up"', b'"down"')
    assert await read_event(reader) == b'data: {"service":"web","kind":"leader"}\n\n'
    writer.close()


async def test_narrow_streams_have_no_current(wire: Wire) -> None:
    await wire.send("PUT", "/services/web", {})
    await wire.send("PUT", f"/services/web/instances/{ID}", INSTANCE)
    for path, kinds in (("instances", [b"up", b"down"]), ("leader", [b"leader", b"leader"])):
        await wire.send("PUT", f"/services/web/instances/{ID}", INSTANCE)
        reader, writer = await wire.open("GET", f"/services/web/{path}", accept="text/event-stream")
        await reader.readuntil(b"\r\n\r\n")
        first = await read_event(reader)
        await wire.send("DELETE", f"/services/web/instances/{ID}")
        second = await read_event(reader)
        assert [
            f'"kind":"{kind.decode()}"'.encode() in event for kind, event in zip(kinds, (first, second), strict=True)
        ]
        writer.close()


async def read_event(reader: asyncio.StreamReader) -> bytes:
    """One event of a chunked body."""
    async with asyncio.timeout(5):
        size = int(await reader.readline(), 16)
        chunk = await reader.readexactly(size)
        await reader.readexactly(2)
    # Events that come together may share a chunk; these tests read one at a time, so cut and hand back the rest.
    event, _, rest = chunk.partition(b"\n\n")
    if rest:
        reader._buffer[:0] = b"%x\r\n" % len(rest) + rest + b"\r\n"  # type: ignore[attr-defined]
    return event + b"\n\n"


async def test_without_a_certificate_there_is_no_conversation(wire: Wire) -> None:
    context = ssl.create_default_context(cafile=str(wire.place.identity.ca_path))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        reader, writer = await asyncio.open_connection(wire.place.address, 1111, ssl=context)
        try:
            writer.write(b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n")
            if not await reader.read(100):
                raise ConnectionResetError
        finally:
            writer.close()


async def test_nothing_but_ping_and_status_is_open(place: Place) -> None:
    from flynn.discoverd.api import DiscoverdApi

    api = DiscoverdApi(None, place.http_address, place.identity, lambda: None).build()  # type: ignore[arg-type]  # only the table is read
    assert {endpoint.path for endpoint in api.endpoints if endpoint.allow == ANYONE} == {"/ping", "/.well-known/status"}
