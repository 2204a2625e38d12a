"""Volume providers keep the same promises; the book of volumes refuses what would lose data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flynn.aio.clock import SystemClock
from flynn.host.state import StateInUse, StateStore
from flynn.host.volumes import fuse, zfs
from flynn.host.volumes.book import VolumeBook
from flynn.host.volumes.commands import failure, run
from flynn.host.volumes.directory import DirectoryProvider
from flynn.host.volumes.provider import Unsupported, VolumeBusy, VolumeError, VolumeGone, VolumeProvider
from flynn.host.volumes.zfs import ZfsProvider
from flynn.types.errors import Conflict, NotFound, ObjectExists, ValidationError
from flynn.types.volume import VolumeEvent, VolumeRequest

POOL = f"fhtv{os.getpid()}"


@pytest.fixture(
    params=["directory", pytest.param("zfs", marks=[pytest.mark.root, pytest.mark.slow])],
)
async def provider(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[VolumeProvider]:
    if request.param == "directory":
        yield DirectoryProvider(tmp_path / "volumes")
        return
    if not (Path("/dev/zfs").exists() or shutil.which("zfs-fuse")):
        pytest.skip("no ZFS here")
    yield ZfsProvider(POOL, tmp_path / "volumes")
    await zfs.destroy_pool(POOL)


async def test_a_volume_is_made_found_again_and_destroyed(provider: VolumeProvider) -> None:
    await provider.open()
    place = await provider.create("v1")
    path = await provider.mount(place)
    (path / "file").write_text("kept")
    await provider.open()
    assert await provider.create("v1") == place, "what a crash has left is adopted"
    assert (await provider.mount(place) / "file").read_text() == "kept"
    await provider.destroy(place)
    await provider.destroy(place)
    with pytest.raises(VolumeGone):
        await provider.mount(place)


async def test_a_snapshot_keeps_the_content_of_its_moment(provider: VolumeProvider) -> None:
    await provider.open()
    place = await provider.create("v1")
    path = await provider.mount(place)
    (path / "file").write_text("before")
    frozen = await provider.snapshot(place, "s1")
    (path / "file").write_text("after")
    assert (await provider.mount(frozen) / "file").read_text() == "before"
    await provider.destroy(frozen)
    await provider.destroy(place)


@pytest.mark.root
@pytest.mark.slow
async def test_zfs_sends_differences_and_receives_over_local_changes(tmp_path: Path) -> None:
    if not (Path("/dev/zfs").exists() or shutil.which("zfs-fuse")):
        pytest.skip("no ZFS here")
    provider = ZfsProvider(POOL, tmp_path / "volumes")
    try:
        await provider.open()
        source, target = await provider.create("source"), await provider.create("target")
        path = await provider.mount(source)
        (path / "big").write_bytes(os.urandom(1 << 20))
        first = await provider.snapshot(source, "s1")
        received = await provider.receive(target, "r1", provider.send(first, None))
        assert (await provider.mount(target) / "big").stat().st_size == 1 << 20
        assert (await provider.mount(received) / "big").stat().st_size == 1 << 20
        (path / "small").write_text("x")
        second = await provider.snapshot(source, "s2")
        difference = b"".join([chunk async for chunk in provider.send(second, first)])
        assert len(difference) < 1 << 19
        with pytest.raises(VolumeError, match="can only send a snapshot"):
            await anext(provider.send(source, None))
    finally:
        await zfs.destroy_pool(POOL)


@pytest.mark.root
@pytest.mark.slow
async def test_a_pool_is_imported_never_overwritten(tmp_path: Path) -> None:
    if not (Path("/dev/zfs").exists() or shutil.which("zfs-fuse")):
        pytest.skip("no ZFS here")
    provider = ZfsProvider(POOL, tmp_path / "volumes")
    try:
        await provider.open()
        place = await provider.create("v1", quota_bytes=20 << 20)
        path = await provider.mount(place)
        (path / "file").write_text("kept")
        with pytest.raises(OSError, match=r"quota|space"):
            (path / "large").write_bytes(os.urandom(30 << 20))
        await run("zpool", "export", "-f", POOL)
        await provider.open()
        assert (await provider.mount(place) / "file").read_text() == "kept"
        await run("zpool", "export", "-f", POOL)
        file = tmp_path / "volumes" / "vdev" / f"{POOL}-zpool.vdev"
        file.write_bytes(b"precious")
        with pytest.raises(VolumeError):
            await provider.open()
        assert file.read_bytes() == b"precious"
    finally:
        await zfs.destroy_pool(POOL)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("cannot open 'x': dataset does not exist", VolumeGone),
        ("cannot unmount 'x': Device or resource busy", VolumeBusy),
        ("cannot destroy 'x': filesystem has dependent clones", VolumeBusy),
        ("out of memory", VolumeError),
    ],
)
def test_what_zfs_says(text: str, error: type[VolumeError]) -> None:
    assert type(failure(["zfs", "destroy"], text)) is error


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StateStore]:
    store = StateStore(tmp_path / "host.db")
    yield store
    store.close()


def book(store: StateStore, path: Path, in_use: set[str]) -> VolumeBook:
    provider = DirectoryProvider(path)
    return VolumeBook(store, {"default": provider}, SystemClock(), lambda: in_use, lambda: "new")


async def test_the_book_of_volumes(store: StateStore, tmp_path: Path) -> None:
    used: set[str] = set()
    volumes = book(store, tmp_path / "v", used)
    await volumes.open()
    async with volumes.events.subscribe() as events:
        made = await volumes.create("default", VolumeRequest(meta={"a": "b"}))
        assert (made.id, made.type, made.meta) == ("new", "data", {"a": "b"})
        assert await anext(events) == VolumeEvent(type="create", volume=made)
        with pytest.raises(ObjectExists):
            await volumes.create("default", VolumeRequest(id="new"))
        with pytest.raises(NotFound, match='no volume provider with id "x"'):
            await volumes.create("x", VolumeRequest())
        for bad in ("../x", "-r", "a@b"):
            with pytest.raises(ValidationError):
                await volumes.create("default", VolumeRequest(id=bad))
        used.add("new")
        with pytest.raises(Conflict):
            await volumes.destroy("new")
        used.clear()
        again = book(store, tmp_path / "v", used)
        await again.open()
        assert again.all() == [made]
        await volumes.destroy("new")
        assert (await anext(events)).type == "destroy"
    with pytest.raises(NotFound, match='no volume with id "new"'):
        volumes.get("new")
    with pytest.raises(Unsupported):
        await anext(DirectoryProvider(tmp_path).send("x", None))


async def test_two_daemons_cannot_share_a_state_directory(store: StateStore, tmp_path: Path) -> None:
    with pytest.raises(StateInUse):
        StateStore(tmp_path / "host.db")


@pytest.mark.root
@pytest.mark.slow
def test_what_was_synced_survives_the_death_of_zfs_fuse(tmp_path: Path) -> None:
    if Path("/dev/zfs").exists() or not Path(fuse.DAEMON).exists():
        pytest.skip("no zfs-fuse here")
    script = Path(__file__).with_name("zfs_fuse_death.py")
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "kept\n"), done.stderr
