"""The HTTP surface, over real TLS with real certificates."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flynn.aio.clock import SystemClock
from flynn.blobstore.api import blobstore_api
from flynn.blobstore.client import Blobstore, sign
from flynn.blobstore.volume import VolumeBackend
from flynn.http.client import HttpClient
from flynn.http.server import listen
from flynn.identity import Identity
from flynn.identity.authority import ClusterCA
from flynn.types.errors import (
    ApiError,
    Conflict,
    Forbidden,
    NotFound,
    PreconditionFailed,
    Unauthorized,
    Unreachable,
    ValidationError,
)

KEY = "signing-key"


@dataclass
class Store:
    url: str
    ca: ClusterCA
    directory: Path

    def identity(self, app: str) -> Identity:
        self.ca.issue_job(app, "web", "", []).write(self.directory / app)
        return Identity.load(self.directory / app)

    def stranger(self) -> ssl.SSLContext:
        """Trusts the store, but has no certificate."""
        return ssl.create_default_context(cadata=self.ca.pem.decode())


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    ca = ClusterCA.create()
    ca.issue_job("blobstore", "web", "blobstore", []).write(tmp_path / "own")
    api = blobstore_api(VolumeBackend(tmp_path / "data"), signing_key=KEY, clock=SystemClock())
    own = Identity.load(tmp_path / "own")
    async with listen(api, "127.0.0.1", 0, tls=own, require_client=False) as (_, port):
        yield Store(f"https://127.0.0.1:{port}", ca, tmp_path)


@pytest.fixture
async def http(store: Store) -> AsyncIterator[HttpClient]:
    async with HttpClient(store.url, tls=store.identity("gitreceive")) as client:
        yield client


@pytest.fixture
def blobs(http: HttpClient) -> Blobstore:
    return Blobstore(http)


async def raw(store: Store, request: str) -> bytes:
    """Send bytes as an insider and return everything that comes back."""
    context = store.identity("controller").client_context()
    _, port = store.url.rsplit(":", 1)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port), ssl=context, server_hostname="127.0.0.1")
    writer.write(request.replace("\n", "\r\n").encode())
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    return answer


async def test_a_blob_goes_round(blobs: Blobstore) -> None:
    put = await blobs.put("/a/b c.txt", b"0123456789", content_type="text/plain")
    info = await blobs.find("/a/b c.txt")
    assert info is not None
    assert (info.size, info.content_type, info.etag, info.sha512_256) == (10, "text/plain", put.etag, put.sha512_256)
    assert await blobs.read("/a/b c.txt") == b"0123456789"
    assert await blobs.children("/") == ["/a/"]
    await blobs.delete("/a")
    assert await blobs.find("/a/b c.txt") is None
    with pytest.raises(NotFound):
        await blobs.read("/a/b c.txt")


async def test_large_blobs_stream_both_ways_for_several_clients_at_once(blobs: Blobstore) -> None:
    async def megabytes(n: int) -> AsyncIterator[bytes]:
        for i in range(11):
            yield bytes([n, i]) * (512 * 1024)

    async def one(n: int) -> None:
        await blobs.put(f"/large/{n}", megabytes(n))
        async with blobs.open(f"/large/{n}") as (info, chunks):
            content = b"".join([chunk async for chunk in chunks])
        assert info.size == len(content) == 11 << 20
        assert content == b"".join([chunk async for chunk in megabytes(n)])

    async with asyncio.TaskGroup() as group:
        for n in range(3):
            group.create_task(one(n))


async def test_conditional_writes(blobs: Blobstore) -> None:
    first = await blobs.put("/a", b"1", only_create=True)
    with pytest.raises(PreconditionFailed):
        await blobs.put("/a", b"2", only_create=True)
    await blobs.put("/a", b"2", if_match=first.etag)
    with pytest.raises(PreconditionFailed):
        await blobs.put("/a", b"3", if_match=first.etag)
    assert await blobs.read("/a") == b"2"


async def test_copying_and_appending(blobs: Blobstore, http: HttpClient) -> None:
    await blobs.put("/a", b"foo")
    await http.upload("/a", b"bar", headers={"Blobstore-Offset": "3"})
    await blobs.copy("/a", "/b")
    assert await blobs.read("/b") == b"foobar"
    with pytest.raises(Conflict):
        await http.upload("/a", b"x", headers={"Blobstore-Offset": "3"})
    with pytest.raises(ValidationError):
        await http.upload("/a", b"x", headers={"Blobstore-Offset": "x"})
    with pytest.raises(NotFound):
        await blobs.copy("/missing", "/c")
    with pytest.raises(NotFound):
        await http.upload("/missing", b"x", headers={"Blobstore-Offset": "3"})


@pytest.mark.parametrize(
    ("request_headers", "status", "expected"),
    [
        pytest.param("Range: bytes=2-4", "206", ["Content-Range: bytes 2-4/10", "\r\n\r\n234"], id="one span"),
        pytest.param("Range: bytes=-3", "206", ["Content-Range: bytes 7-9/10", "\r\n\r\n789"], id="suffix"),
        pytest.param(
            "Range: bytes=0-0,9-9",
            "206",
            ["multipart/byteranges", "bytes 0-0/10\r\n\r\n0", "\r\n\r\n9\r\n--"],
            id="two",
        ),
        pytest.param("Range: bytes=10-", "416", ["Content-Range: bytes */10", "Content-Length: 0"], id="outside"),
        pytest.param("If-Match: x", "412", ["precondition_failed"], id="precondition"),
    ],
)
async def test_ranges_on_the_wire(
    store: Store, blobs: Blobstore, request_headers: str, status: str, expected: list[str]
) -> None:
    await blobs.put("/a", b"0123456789", content_type="text/plain")
    answer = (await raw(store, f"GET /a HTTP/1.1\nHost: b\nConnection: close\n{request_headers}\n\n")).decode()
    assert answer.startswith(f"HTTP/1.1 {status} ")
    for text in expected:
        assert text in answer


async def test_head_tells_the_length_and_sends_nothing(store: Store, blobs: Blobstore) -> None:
    info = await blobs.put("/a", b"0123456789", content_type="text/plain")
    head, _, body = (await raw(store, "HEAD /a HTTP/1.1\nHost: b\nConnection: close\n\n")).partition(b"\r\n\r\n")
    assert b"Content-Length: 10\r\n" in head
    assert info.etag.encode() in head
    assert body == b""
    answer = await raw(store, f"GET /a HTTP/1.1\nHost: b\nConnection: close\nIf-None-Match: {info.etag}\n\n")
    assert answer.startswith(b"HTTP/1.1 304 ")


async def test_a_short_body_leaves_the_old_blob(store: Store, blobs: Blobstore) -> None:
    await blobs.put("/a", b"old")
    context = store.identity("controller").client_context()
    port = int(store.url.rsplit(":", 1)[1])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="127.0.0.1")
    writer.write(b"PUT /a HTTP/1.1\r\nHost: b\r\nContent-Length: 100\r\n\r\nhalf")
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.transport.abort()
    await asyncio.sleep(0.1)
    assert await blobs.read("/a") == b"old"


async def test_the_root_answers_health_checks_and_unclean_paths_are_redirected(store: Store) -> None:
    assert (await raw(store, "GET / HTTP/1.1\nHost: b\nConnection: close\n\n")).startswith(b"HTTP/1.1 200 ")
    assert (await raw(store, "HEAD / HTTP/1.1\nHost: b\nConnection: close\n\n")).startswith(b"HTTP/1.1 200 ")
    answer = await raw(store, "GET /a//b/ HTTP/1.1\nHost: b\nConnection: close\n\n")
    assert answer.startswith(b"HTTP/1.1 301 ") and b"Location: /a/b\r\n" in answer
    assert (await raw(store, "POST /a HTTP/1.1\nHost: b\nConnection: close\n\n")).startswith(b"HTTP/1.1 405 ")


async def test_strangers_and_other_apps_get_nothing(store: Store) -> None:
    async with HttpClient(store.url, tls=store.stranger()) as stranger:
        for method in ("GET", "PUT", "DELETE"):
            with pytest.raises(Unauthorized):
                await stranger.call(method, "/a")
        with pytest.raises(Unauthorized):
            await stranger.get("/", answer=list[str])
    async with HttpClient(store.url, tls=store.identity("router")) as router:
        with pytest.raises(Forbidden):
            await router.get("/a")
    foreign = ClusterCA.create()
    foreign.issue_job("controller", "web", "", []).write(store.directory / "foreign")
    context = ssl.create_default_context(cadata=store.ca.pem.decode())
    context.load_cert_chain(store.directory / "foreign" / "cert.pem", store.directory / "foreign" / "key.pem")
    async with HttpClient(store.url, tls=context) as impostor:
        with pytest.raises(Unreachable):
            await impostor.get("/a")


async def test_a_signed_url_allows_what_was_signed(store: Store, blobs: Blobstore) -> None:
    await blobs.put("/secret", b"secret")
    await blobs.put("/cache", b"cached")
    now = datetime.now(UTC)

    def signed(method: str, name: str, within: timedelta = timedelta(minutes=1)) -> str:
        return sign(KEY, method, name, within=within, now=now, url="")

    async with HttpClient(store.url, tls=store.stranger()) as stranger:
        assert await stranger.call("GET", signed("GET", "/cache"), answer=bytes) == b"cached"
        await stranger.upload(signed("PUT", "/up load"), b"slug")
        assert await blobs.read("/up load") == b"slug"

        async def refused(method: str, url: str, **headers: str) -> None:
            with pytest.raises(Forbidden):
                await stranger.upload(url, b"x", method=method, headers=headers)

        await refused("GET", signed("GET", "/cache").replace("/cache", "/secret"))
        await refused("PUT", signed("GET", "/cache"))
        await refused("GET", signed("GET", "/cache", timedelta(seconds=-1)))
        await refused("DELETE", signed("PUT", "/cache"))
        await refused("PUT", signed("PUT", "/x"), **{"Blobstore-Copy-From": "/secret"})
        await refused("PUT", signed("PUT", "/cache"), **{"Blobstore-Offset": "6"})
        with pytest.raises(ApiError):
            await stranger.get("/?dir=/&" + signed("GET", "/").partition("?")[2])
