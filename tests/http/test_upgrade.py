"""Taking a connection over: what the client sends when, and what the server still holds afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from flynn.http import server
from flynn.http.server import Api, Request, listen
from flynn.identity.access import ANYONE
from flynn.types.errors import Conflict

HEAD = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n"
UPGRADE = b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: echo\r\n"


@pytest.fixture
async def address() -> AsyncIterator[tuple[str, int]]:
    """A server that echoes five bytes to whoever upgrades, unless the body says no."""

    async def echo(request: Request) -> None:
        if await request.raw() == b"no":
            raise Conflict("not now")
        async with await request.upgrade("echo") as connection:
            connection.write(await connection.readexactly(5))
            await connection.drain()

    async def plain(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.raw())}

    api = Api("test")
    api.route("POST", "/echo", echo, allow=ANYONE)
    api.route("POST", "/plain", plain, allow=ANYONE)
    async with listen(api, "127.0.0.1", 0) as bound:
        yield bound


async def dialogue(address: tuple[str, int], *pieces: bytes) -> bytes:
    """Everything the server says to these pieces, sent one after the other."""
    reader, writer = await asyncio.open_connection(*address)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.02)
    writer.write_eof()
    async with asyncio.timeout(10):
        said = await reader.read()
    writer.close()
    return said


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param((UPGRADE + b"Content-Length: 2\r\n\r\n{}12345",), id="all at once"),
        pytest.param((UPGRADE + b"Content-Length: 2\r\n\r\n", b"{}", b"12345"), id="piece by piece"),
        pytest.param((UPGRADE + b"Content-Length: 2\r\n\r\n{", b"}12", b"345"), id="cut in the middle of the body"),
        pytest.param((UPGRADE + b"\r\n12345",), id="no body"),
        pytest.param(
            (UPGRADE + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", b"12345"), id="chunked body"
        ),
        pytest.param(
            (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", b"12345"), id="nothing announced"
        ),
    ],
)
async def test_what_is_sent_behind_the_request_arrives(address: tuple[str, int], pieces: tuple[bytes, ...]) -> None:
    assert await dialogue(address, *pieces) == HEAD + b"12345"


async def test_an_upgrade_may_follow_other_requests(address: tuple[str, int]) -> None:
    plain = b"POST /plain HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    said = await dialogue(address, plain, plain, UPGRADE + b"\r\n12345")
    assert said.count(b'{"bytes":3}') == 2
    assert said.endswith(HEAD + b"12345")


async def test_what_follows_a_refused_upgrade_is_a_request(address: tuple[str, int]) -> None:
    plain = b"POST /plain HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc"
    said = await dialogue(address, UPGRADE + b"Content-Length: 2\r\n\r\nno" + plain)
    assert said.startswith(b"HTTP/1.1 409 ")
    assert said.endswith(b'{"bytes":3}')


async def test_a_body_that_looks_like_an_upgrade_is_a_body(address: tuple[str, int]) -> None:
    body = UPGRADE + b"\r\n12345"
    head = b"POST /plain HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert (await dialogue(address, head, body)).endswith(b'{"bytes":%d}' % len(body))


async def test_nothing_is_left_of_a_connection_that_was_taken_over(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library counts connections, and would count these for ever: nobody tells it of their end."""
    servers: list[Any] = []
    make = server._Runner._make_server

    async def remembered(runner: Any) -> Any:
        servers.append(await make(runner))
        return servers[-1]

    monkeypatch.setattr(server._Runner, "_make_server", remembered)

    async def take(request: Request) -> None:
        async with await request.upgrade("x"):
            pass

    api = Api("test")
    api.route("POST", "/take", take, allow=ANYONE)
    async with listen(api, "127.0.0.1", 0) as bound:
        for _ in range(10):
            assert await dialogue(bound, b"POST /take HTTP/1.1\r\nHost: x\r\nUpgrade: x\r\n\r\n")
        async with asyncio.timeout(10):
            while servers[0].connections:
                await asyncio.sleep(0.01)
