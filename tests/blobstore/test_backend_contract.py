"""What every back end promises (`flynn.blobstore.backend`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flynn.blobstore import names
from flynn.blobstore.backend import Backend, Blob
from flynn.blobstore.conditions import Span
from flynn.blobstore.volume import VolumeBackend
from flynn.types.errors import Conflict, NotFound, PreconditionFailed, ValidationError


@pytest.fixture(params=["volume"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    assert request.param == "volume"
    return VolumeBackend(tmp_path)


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def content(backend: Backend, name: str) -> bytes:
    async with backend.open(name) as opened:
        if not opened.blob.size:
            return b""
        return b"".join([piece async for piece in opened.read(Span(0, opened.blob.size - 1))])


async def test_a_blob_comes_back_with_its_hashes(backend: Backend) -> None:
    blob = await backend.put("/foo.txt", chunks(b"01234", b"56789"), content_type="text/plain")
    assert blob.etag == '"u5bC/EDS1UYX1vJ2/r5XH2I6ja3wtzSFUpmw4Qf9oyz2tp8toys2RF1zaQuTy9D3v8IOD38oVT0qRCjyO3FukA=="'
    assert blob.sha512_256 == "d48b2aa4a50d1c3e324a1a762d3b2165244661ef80e004dd3669a77e02c489d8"
    assert await backend.find("/foo.txt") == blob
    assert await content(backend, "/foo.txt") == b"0123456789"


async def test_an_empty_blob_is_a_blob(backend: Backend) -> None:
    blob = await backend.put("/empty", chunks())
    assert blob.etag.startswith('"z4PhNX7vuL3xVChQ1m2AB9Yg')
    assert await content(backend, "/empty") == b""


async def test_replacing_shows_the_new_version_and_leaves_readers_the_old_one(backend: Backend) -> None:
    await backend.put("/a", chunks(b"old"))
    async with backend.open("/a") as reader:
        await backend.put("/a", chunks(b"newer"))
        assert b"".join([piece async for piece in reader.read(Span(0, 2))]) == b"old"
    assert await content(backend, "/a") == b"newer"


async def test_a_failing_upload_leaves_the_old_version(backend: Backend) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionResetError

    await backend.put("/a", chunks(b"old"))
    with pytest.raises(ConnectionResetError):
        await backend.put("/a", broken())
    assert await content(backend, "/a") == b"old"
    with pytest.raises(ConnectionResetError):
        await backend.put("/b", broken())
    assert await backend.find("/b") is None


async def test_a_cancelled_upload_leaves_the_old_version(backend: Backend) -> None:
    started = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1 << 20)
            started.set()
            await asyncio.sleep(0.01)

    await backend.put("/a", chunks(b"old"))
    upload = asyncio.ensure_future(backend.put("/a", endless()))
    await started.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert await content(backend, "/a") == b"old"


async def test_a_guard_sees_the_old_version_and_can_refuse(backend: Backend) -> None:
    def refuse(old: Blob | None) -> None:
        if old is not None:
            raise PreconditionFailed("there is one")

    await backend.put("/a", chunks(b"1"), guard=refuse)
    with pytest.raises(PreconditionFailed):
        await backend.put("/a", chunks(b"2"), guard=refuse)
    assert await content(backend, "/a") == b"1"


async def test_of_two_uploads_that_may_only_create_one_wins(backend: Backend) -> None:
    def only_create(old: Blob | None) -> None:
        if old is not None:
            raise PreconditionFailed("there is one")

    results = await asyncio.gather(
        *(backend.put("/a", chunks(bytes([n]) * 100), guard=only_create) for n in range(5)), return_exceptions=True
    )
    assert sum(isinstance(result, Blob) for result in results) == 1
    assert sum(isinstance(result, PreconditionFailed) for result in results) == 4


async def test_appending(backend: Backend) -> None:
    await backend.put("/a", chunks(b"foo"), content_type="text/x")
    await backend.append("/a", chunks(b"bar"), offset=3)
    blob = await backend.append("/a", chunks(b"baz"), offset=6)
    assert await content(backend, "/a") == b"foobarbaz"
    assert blob.content_type == "text/x"
    assert blob.etag == (await backend.put("/b", chunks(b"foobarbaz"))).etag
    with pytest.raises(Conflict):
        await backend.append("/a", chunks(b"x"), offset=3)
    with pytest.raises(NotFound):
        await backend.append("/missing", chunks(b"x"), offset=3)


async def test_copying_replaces_and_outlives_its_source(backend: Backend) -> None:
    source = await backend.put("/a", chunks(b"foo"), content_type="t")
    await backend.put("/b", chunks(b"old"))
    copied = await backend.copy("/a", "/b")
    assert (copied.sha512, copied.content_type) == (source.sha512, "t")
    await backend.delete("/a")
    assert await content(backend, "/b") == b"foo"
    with pytest.raises(NotFound):
        await backend.copy("/a", "/c")


async def test_deleting_takes_what_is_below_and_nothing_beside(backend: Backend) -> None:
    for name in ("/dir/foo", "/dir/foo.txt", "/dir/foo/x", "/dir/axb", "/dir/a.b", "/dirt"):
        await backend.put(name, chunks(b"x"))
    await backend.delete("/dir/foo")
    assert await backend.children("/dir") == ["/dir/a.b", "/dir/axb", "/dir/foo.txt"]
    await backend.delete("/dir/a.b")
    assert await backend.children("/dir") == ["/dir/axb", "/dir/foo.txt"]
    await backend.delete("/dir")
    assert await backend.children("/") == ["/dirt"]
    await backend.delete("/never/was")


async def test_listing_shows_direct_children(backend: Backend) -> None:
    for name in ("/bar.txt", "/dir1/a", "/dir1/b/c", "/dir2/x", "/dir2"):
        await backend.put(name, chunks(b"x"))
    assert await backend.children("/") == ["/bar.txt", "/dir1/", "/dir2", "/dir2/"]
    assert await backend.children("/dir1") == ["/dir1/a", "/dir1/b/"]
    assert await backend.children("/bar.txt") == []
    assert await backend.children("/unknown") == []


async def test_odd_names(backend: Backend) -> None:
    odd = ["/a,blob", "/a,blob/b", "/%2F", "/é ü", "/.hidden/..x", "/a\nb", "/(", "/a%_"]
    for name in odd:
        await backend.put(name, chunks(name.encode()))
    for name in odd:
        assert await content(backend, name) == name.encode()
    assert "/.hidden/" in await backend.children("/")


async def test_a_span_of_a_blob(backend: Backend) -> None:
    await backend.put("/a", chunks(b"0123456789"))
    async with backend.open("/a") as opened:
        assert b"".join([piece async for piece in opened.read(Span(2, 4))]) == b"234"


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [("/a//b/", "/a/b"), ("/a/./b", "/a/b"), ("/a/../b", "/b"), ("/../..", "/"), ("//", "/"), ("/a", "/a")],
)
def test_names_are_cleaned(given: str, cleaned: str) -> None:
    assert names.clean(given) == cleaned


@pytest.mark.parametrize("name", ["/" + "a" * 241, "/a\0b", "/a" * 1001])
def test_names_that_cannot_be_stored(name: str) -> None:
    with pytest.raises(ValidationError):
        names.check(name)


async def test_volume_a_restart_keeps_blobs_and_sweeps_leftovers(tmp_path: Path) -> None:
    await VolumeBackend(tmp_path).put("/a", chunks(b"kept"))
    leftover = tmp_path / "objects" / "ff" / ("f" * 32)
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"half an upload")
    (tmp_path / "names" / "b,blob.new").write_bytes(b"{")
    again = VolumeBackend(tmp_path)
    await again.put("/c", chunks(b"written before the sweep"))
    assert await again.children("/") == ["/a", "/c"]
    assert await again.sweep() == 1
    assert not leftover.exists()
    assert await content(again, "/a") == b"kept"
    assert await content(again, "/c") == b"written before the sweep"
