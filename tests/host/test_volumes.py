"""Volume providers keep the same promises; the book of volumes refuses what would lose data."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from flynn.aio.broadcast import Overflowed
from flynn.aio.clock import SystemClock
from flynn.host.state import StateInUse, StateStore
from flynn.host.volumes import fuse, mounts, zfs
from flynn.host.volumes.book import VolumeBook
from flynn.host.volumes.commands import NoAnswer, NoDaemon, failure, run
from flynn.host.volumes.directory import DirectoryProvider
from flynn.host.volumes.fuse import Vitals
from flynn.host.volumes.patience import STUCK_LIMIT, PatientThreads
from flynn.host.volumes.provider import (
    BadStream,
    Condition,
    Unavailable,
    VolumeBusy,
    VolumeError,
    VolumeGone,
    VolumeProvider,
)
from flynn.host.volumes.zfs import ZfsProvider
from flynn.types.errors import Conflict, NotFound, ObjectExists, ServiceUnavailable, Unreachable, ValidationError
from flynn.types.volume import META_QUOTA, VolumeEvent, VolumeRequest

POOL = f"fhtv{os.getpid()}"
MIB = 1 << 20

with_zfs = [pytest.mark.root, pytest.mark.slow]


def no_zfs() -> bool:
    return not (Path("/dev/zfs").exists() or shutil.which("zfs-fuse"))


@pytest.fixture(params=["directory", pytest.param("zfs", marks=with_zfs)])
async def provider(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[VolumeProvider]:
    if request.param == "directory":
        provider: VolumeProvider = DirectoryProvider(tmp_path / "volumes")
        await provider.open(create=True)
        yield provider
        return
    if no_zfs():
        pytest.skip("no ZFS here")
    provider = ZfsProvider(POOL, tmp_path / "volumes")
    try:
        await provider.open(create=True)
        yield provider
    finally:
        await zfs.destroy_pool(POOL)


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[ZfsProvider]:
    if no_zfs():
        pytest.skip("no ZFS here")
    provider = ZfsProvider(POOL, tmp_path / "volumes")
    try:
        await provider.open(create=True)
        yield provider
    finally:
        await zfs.destroy_pool(POOL)


def cut(stream: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    """The first bytes of a stream, then its end, as if all were well."""

    async def begun() -> AsyncIterator[bytes]:
        left = limit
        async for chunk in stream:
            yield chunk[:left]
            left -= len(chunk[:left])
            if not left:
                return

    return begun()


class TestEveryProvider:
    async def test_a_volume_is_made_found_again_and_destroyed(self, provider: VolumeProvider) -> None:
        place = await provider.create("v1")
        path = await provider.mount(place)
        (path / "file").write_text("kept")
        await provider.open(create=False)
        assert await provider.create("v1", quota_bytes=64 * MIB) == place, "what a crash has left is adopted"
        assert (await provider.mount(place) / "file").read_text() == "kept"
        condition = await provider.check()
        assert 0 < condition.free_bytes <= condition.size_bytes
        assert not condition.trouble
        await provider.destroy(place)
        await provider.destroy(place)
        with pytest.raises(VolumeGone):
            await provider.mount(place)

    async def test_a_snapshot_keeps_the_content_of_its_moment_and_a_clone_goes_its_own_way(
        self, provider: VolumeProvider
    ) -> None:
        place = await provider.create("v1")
        path = await provider.mount(place)
        (path / "file").write_text("before")
        frozen = await provider.snapshot(place, str(uuid4()))
        (path / "file").write_text("after")
        assert (await provider.mount(frozen) / "file").read_text() == "before"
        clone = await provider.clone(frozen, "c1", quota_bytes=64 * MIB)
        (await provider.mount(clone) / "file").write_text("elsewhere")
        assert (await provider.mount(frozen) / "file").read_text() == "before"
        assert (path / "file").read_text() == "after"
        await provider.destroy(frozen)
        assert (await provider.mount(clone) / "file").read_text() == "elsewhere"
        await provider.destroy(clone)
        await provider.collect({"v1": place})
        await provider.destroy(place)

    async def test_what_is_sent_arrives_with_owners_and_modes_over_local_changes(
        self, provider: VolumeProvider
    ) -> None:
        source, target = await provider.create("source"), await provider.create("target")
        path = await provider.mount(source)
        (path / "big").write_bytes(os.urandom(MIB))
        (path / "big").chmod(0o640)
        (path / "link").symlink_to("big")
        (await provider.mount(target) / "local").write_text("to be overwritten")
        first = await provider.snapshot(source, str(uuid4()))
        moved, received = await provider.receive(target, str(uuid4()), provider.send(first, None))
        for there in (await provider.mount(moved), await provider.mount(received)):
            assert (there / "big").read_bytes() == (path / "big").read_bytes()
            assert (there / "big").stat().st_mode & 0o777 == 0o640
            assert (there / "link").readlink() == Path("big")
            assert not (there / "local").exists()

    @pytest.mark.parametrize("limit", [10, 5000, MIB // 2])
    async def test_a_stream_cut_short_is_refused_and_changes_nothing(
        self, provider: VolumeProvider, tmp_path: Path, limit: int
    ) -> None:
        source, target = await provider.create("source"), await provider.create("target")
        (await provider.mount(source) / "big").write_bytes(os.urandom(MIB))
        (await provider.mount(target) / "local").write_text("mine")
        first = await provider.snapshot(source, str(uuid4()))
        here = str(uuid4())
        with pytest.raises(BadStream):
            await provider.receive(target, here, cut(provider.send(first, None), limit))
        assert (await provider.mount(target) / "local").read_text() == "mine"
        assert not list((tmp_path / "volumes").rglob(f"*{here}*"))
        moved, _ = await provider.receive(target, here, provider.send(first, None))
        assert (await provider.mount(moved) / "big").exists()

    async def test_a_stream_of_another_kind_is_refused(self, provider: VolumeProvider) -> None:
        target = await provider.create("target")

        async def nonsense() -> AsyncIterator[bytes]:
            yield os.urandom(4096)

        with pytest.raises(BadStream, match="not a snapshot of the provider"):
            await provider.receive(target, str(uuid4()), nonsense())

    async def test_storage_that_held_volumes_is_not_made_anew(self, tmp_path: Path) -> None:
        with pytest.raises(VolumeGone, match="is missing"):
            await DirectoryProvider(tmp_path / "gone").open(create=False)


@pytest.mark.root
@pytest.mark.slow
class TestZfs:
    async def test_differences_are_sent_where_the_receiver_has_the_base(self, pool: ZfsProvider) -> None:
        source, target = await pool.create("source"), await pool.create("target", quota_bytes=64 * MIB)
        path = await pool.mount(source)
        (path / "big").write_bytes(os.urandom(MIB))
        one, two, three = (str(uuid4()) for _ in range(3))
        first = await pool.snapshot(source, one)
        # Receiver and sender share this pool, so what is received gets other names here than it would elsewhere.
        await pool.receive(target, one + "x", pool.send(first, None))
        (path / "small").write_text("x")
        second = await pool.snapshot(source, two)
        difference = b"".join([chunk async for chunk in pool.send(second, first)])
        assert len(difference) < MIB // 2
        # A whole stream again: the volume has a snapshot by now, so it is received beside it and takes its place.
        moved, shown = await pool.receive(target, three, pool.send(second, None))
        assert moved != target
        assert (await pool.mount(moved) / "small").read_text() == "x"
        assert (await run("zfs", "get", "-Hp", "-o", "value", "quota", moved)).strip() == str(64 * MIB)
        assert await pool.collect({"target": moved, three: shown, "source": source, one: first, two: second}) == []
        await pool.destroy(f"{POOL}/data/{one}x")
        assert target in await pool.collect({"target": moved, three: shown, "source": source, one: first, two: second})
        assert (await pool.mount(moved) / "small").read_text() == "x"

    async def test_a_pool_that_is_full_says_so_and_recovers(self, tmp_path: Path, store: StateStore) -> None:
        if no_zfs():
            pytest.skip("no ZFS here")
        if fuse.needed():
            await fuse.ensure_daemon(PatientThreads())
        file = tmp_path / "volumes" / "vdev" / f"{POOL}-zpool.vdev"
        file.parent.mkdir(parents=True)
        with file.open("wb") as vdev:
            vdev.truncate(128 * MIB)
        await run("zpool", "create", "-f", "-m", "none", POOL, str(file))
        try:
            provider = ZfsProvider(POOL, tmp_path / "volumes")
            volumes = VolumeBook(store, {"default": provider}, SystemClock(), set, lambda: str(uuid4()))
            await volumes.open()
            made = await volumes.create("default", VolumeRequest())
            path = await volumes.mounted(made.id)
            with pytest.raises(OSError, match="No space left"), (path / "big").open("wb", buffering=0) as big:
                while True:
                    big.write(os.urandom(MIB))

            async def until(trouble: bool) -> None:
                async with asyncio.timeout(60):
                    while bool(volumes.status()[0].trouble) is not trouble:
                        await volumes._look_at("default")
                        await asyncio.sleep(0.2)

            await until(trouble=True)
            with pytest.raises(ServiceUnavailable, match="the storage is full"):
                await volumes.create("default", VolumeRequest())
            (path / "big").unlink()
            await until(trouble=False)
            async with asyncio.timeout(60):  # what was deleted is free some transactions later
                while len(volumes.all()) < 2:
                    with contextlib.suppress(ServiceUnavailable):
                        await volumes.create("default", VolumeRequest())
                    await asyncio.sleep(0.2)
        finally:
            await zfs.destroy_pool(POOL)

    async def test_what_was_begun_and_never_recorded_is_collected(self, pool: ZfsProvider) -> None:
        place = await pool.create("v1")
        half, whole, theirs = str(uuid4()), str(uuid4()), "autosnap-daily"
        await run("zfs", "snapshot", f"{place}@{half}")
        await run("zfs", "snapshot", f"{place}@{theirs}")
        await pool.snapshot(place, whole)
        assert await pool.collect({}) == [], "without a record of a volume nothing is known to be a leftover"
        collected = await pool.collect({"v1": place})
        assert set(collected) == {f"{place}@{half}", f"{POOL}/data/{whole}", f"{place}@{whole}"}
        assert f"{place}@{theirs}" in await run("zfs", "list", "-H", "-t", "snapshot", "-o", "name")

    async def test_a_pool_is_imported_never_overwritten(self, pool: ZfsProvider, tmp_path: Path) -> None:
        place = await pool.create("v1", quota_bytes=20 * MIB)
        path = await pool.mount(place)
        (path / "file").write_text("kept")
        with pytest.raises(OSError, match=r"quota|space"):
            (path / "large").write_bytes(os.urandom(30 * MIB))
        await run("zpool", "export", "-f", POOL)
        with pytest.raises(Unavailable, match="not imported"):
            await pool.check()
        await pool.open(create=False)
        assert (await pool.mount(place) / "file").read_text() == "kept"
        await run("zpool", "export", "-f", POOL)
        file = tmp_path / "volumes" / "vdev" / f"{POOL}-zpool.vdev"
        good = tmp_path / "good"
        file.rename(good)
        with pytest.raises(Unavailable, match="is missing: there is no"):
            await pool.open(create=False)
        assert not file.exists()
        file.write_bytes(b"precious")
        with pytest.raises(Unavailable, match="cannot be imported"):
            await pool.open(create=True)
        assert file.read_bytes() == b"precious"
        good.rename(file)
        await pool.open(create=False)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("cannot open 'x': dataset does not exist", VolumeGone),
        ("cannot unmount 'x': Device or resource busy", VolumeBusy),
        ("cannot destroy 'x': filesystem has dependent clones", VolumeBusy),
        ("cannot create 'x': out of space", Unavailable),
        ("cannot receive: invalid stream (checksum mismatch)", BadStream),
        ("Please make sure that the zfs-fuse daemon is running.", VolumeError),
        ("make sure that the zfs-fuse daemon is running", NoDaemon),
        ("out of memory", VolumeError),
    ],
)
def test_what_zfs_says(text: str, error: type[VolumeError]) -> None:
    assert isinstance(failure(["zfs", "destroy"], text), error)


async def test_a_command_that_hangs_is_given_up() -> None:
    with pytest.raises(NoAnswer, match="sleep 60 took more than"):
        await run("sleep", "60", seconds=0.05)


class TestPatience:
    async def test_stuck_threads_are_counted_and_limited(self) -> None:
        threads, release = PatientThreads(), threading.Event()
        try:
            for _ in range(STUCK_LIMIT):
                with pytest.raises(Unavailable, match="did not answer"):
                    await threads.run(release.wait, seconds=0.01)
            with pytest.raises(Unavailable, match="hangs: 8 operations"):
                await threads.run(release.wait, seconds=0.01)
        finally:
            release.set()
        async with asyncio.timeout(5):
            while threads.stuck:
                await asyncio.sleep(0.01)
        assert await threads.run(str.upper, "works again") == "WORKS AGAIN"

    async def test_errors_come_through(self) -> None:
        with pytest.raises(FileNotFoundError):
            await PatientThreads().run(os.stat, "/does/not/exist")


FIRST = Vitals(pid=7, at=1000.0, cpu_seconds=50.0, waits_for_disk=False)


@pytest.mark.parametrize(
    ("now", "hung"),
    [
        pytest.param(Vitals(7, 1030.0, 50.0, False), False, id="a short silence is not yet the end"),
        pytest.param(Vitals(7, 1061.0, 50.1, False), True, id="silent and idle for a minute"),
        pytest.param(Vitals(7, 1061.0, 55.0, False), False, id="it works, only slowly"),
        pytest.param(Vitals(7, 1061.0, 50.1, True), False, id="it waits for a disk"),
        pytest.param(Vitals(7, 1400.0, 50.1, True), True, id="no disk takes that long"),
        pytest.param(Vitals(8, 1400.0, 50.1, False), False, id="another process by now"),
    ],
)
def test_when_zfs_fuse_counts_as_hung(now: Vitals, hung: bool) -> None:
    assert fuse.is_hung(FIRST, now) is hung


MOUNTINFO = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
50 22 0:61 / /var/lib/flynn/volumes/zfs/mnt/data/a\\040b rw shared:7 - fuse.zfs p/data/v1 rw
51 22 0:62 / /data rw - fuse.zfs p/data/v2 rw
"""


def test_the_mounts_of_a_container_whose_file_system_has_died() -> None:
    parsed = mounts.parse(MOUNTINFO)
    assert mounts.at("/var/lib/flynn/volumes/zfs/mnt/data/a b", parsed) == parsed[1]
    assert mounts.at("/nowhere", parsed) is None
    assert mounts.orphaned(parsed, parsed) == []
    assert mounts.orphaned(parsed, parsed[:2]) == [parsed[2]]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StateStore]:
    store = StateStore(tmp_path / "host.db")
    yield store
    store.close()


class TestBook:
    used: set[str]

    @pytest.fixture
    def book(self, store: StateStore, tmp_path: Path) -> Iterator[Callable[[], VolumeBook]]:
        self.used = set()

        def make(provider: VolumeProvider | None = None) -> VolumeBook:
            made = provider or DirectoryProvider(tmp_path / "v")
            return VolumeBook(store, {"default": made}, SystemClock(), lambda: self.used, lambda: str(uuid4()))

        yield make

    async def test_one_whose_data_went_with_a_daemon_that_died_is_forgotten(
        self, book: Callable[[], VolumeBook], tmp_path: Path
    ) -> None:
        class Zfs(DirectoryProvider):
            """As ZFS does, says that there is nothing to destroy."""

            async def destroy(self, place: str) -> None:
                if not (tmp_path / "v" / place).exists():
                    raise VolumeGone(f"{place}: dataset does not exist")
                await super().destroy(place)

        provider = Zfs(tmp_path / "v")
        volumes = book(provider)
        await volumes.open()
        made = await volumes.create("default", VolumeRequest())
        await provider.destroy(made.id)  # and then the daemon died
        await volumes.destroy(made.id)
        assert volumes.all() == []

    async def test_creation_and_destruction(self, book: Callable[[], VolumeBook]) -> None:
        volumes = book()
        await volumes.open()
        async with volumes.events.subscribe() as events:
            made = await volumes.create("default", VolumeRequest(meta={"a": "b"}))
            assert (made.type, made.meta) == ("data", {"a": "b"})
            assert await anext(events) == VolumeEvent(type="create", volume=made)
            with pytest.raises(ObjectExists):
                await volumes.create("default", VolumeRequest(id=made.id))
            with pytest.raises(NotFound, match='no volume provider with id "x"'):
                await volumes.create("x", VolumeRequest())
            for bad in ("../x", "-r", "a@b"):
                with pytest.raises(ValidationError):
                    await volumes.create("default", VolumeRequest(id=bad))
            for quota in ("much", "-1", "12"):
                with pytest.raises(ValidationError, match=META_QUOTA):
                    await volumes.create("default", VolumeRequest(meta={META_QUOTA: quota}))
            self.used.add(made.id)
            with pytest.raises(Conflict):
                await volumes.destroy(made.id)
            self.used.clear()
            again = book()
            await again.open()
            assert again.all() == [made]
            await volumes.destroy(made.id)
            assert (await anext(events)).type == "destroy"
        with pytest.raises(NotFound, match=f'no volume with id "{made.id}"'):
            volumes.get(made.id)

    async def test_a_reader_that_stands_still_keeps_nobody(self, book: Callable[[], VolumeBook]) -> None:
        volumes = book()
        await volumes.open()
        async with volumes.events.subscribe(3) as stuck, volumes.events.subscribe() as quick:
            made = [await volumes.create("default", VolumeRequest()) for _ in range(5)]
            assert [(await anext(quick)).volume for _ in made] == made
            assert [(await anext(stuck)).volume for _ in range(3)] == made[:3]
            with pytest.raises(Overflowed):
                await anext(stuck)

    async def test_snapshots_and_clones(self, book: Callable[[], VolumeBook]) -> None:
        volumes = book()
        await volumes.open()
        made = await volumes.create("default", VolumeRequest(meta={"app": "x"}))
        for refused in (volumes.clone(made.id, VolumeRequest()),):
            with pytest.raises(ValidationError, match="only a snapshot can be cloned"):
                await refused
        with pytest.raises(ValidationError, match="only a snapshot can be sent"):
            await anext(volumes.send(made.id, []))
        frozen = await volumes.snapshot(made.id)
        assert frozen.created_at >= made.created_at
        assert volumes.snapshots_of(made.id) == [frozen.id]
        assert volumes.read_only(frozen.id)
        clone = await volumes.clone(frozen.id, VolumeRequest(meta={"b": "c"}))
        assert (frozen.meta["app"], clone.meta) == ("x", {"b": "c", "flynn.clone-of": frozen.id})
        assert not volumes.read_only(clone.id)

    async def test_a_transfer_that_breaks_off_leaves_the_volume_as_it_was(
        self, book: Callable[[], VolumeBook], tmp_path: Path
    ) -> None:
        volumes = book()
        await volumes.open()
        source, target = [await volumes.create("default", VolumeRequest()) for _ in range(2)]
        (await volumes.mounted(source.id) / "x").write_bytes(os.urandom(MIB))
        frozen = await volumes.snapshot(source.id)

        async def breaking_off() -> AsyncIterator[bytes]:
            async for chunk in cut(volumes.send(frozen.id, []), 1000):
                yield chunk
            raise Unreachable("connection lost")

        before = sorted(path.name for path in (tmp_path / "v").iterdir())
        with pytest.raises(Unreachable):
            await volumes.receive(target.id, "s", breaking_off())
        assert sorted(path.name for path in (tmp_path / "v").iterdir()) == before
        with pytest.raises(NotFound):
            volumes.get("s")
        await volumes.receive(target.id, "s", volumes.send(frozen.id, []))
        assert (await volumes.mounted(target.id) / "x").stat().st_size == MIB

    async def test_what_a_job_leaves_is_destroyed_once_it_can_be(
        self, book: Callable[[], VolumeBook], store: StateStore
    ) -> None:
        volumes = book()
        await volumes.open()
        made = await volumes.create("default", VolumeRequest())
        self.used.add(made.id)
        await volumes.discard(made.id)
        assert volumes.get(made.id) == made
        later = book()
        await later.open()
        self.used.clear()
        looked = asyncio.Event()

        async def looked_at() -> None:
            looked.set()

        async with asyncio.timeout(10), later.events.subscribe() as events:
            tending = asyncio.ensure_future(later.tend(looked_at))
            try:
                assert (await anext(events)).type == "destroy"
                while store.setting("doomed volumes", list[str]) != []:
                    await asyncio.sleep(0.01)
            finally:
                tending.cancel()
        assert looked.is_set()

    async def test_storage_that_is_missing_is_told_and_found_again(
        self, book: Callable[[], VolumeBook], store: StateStore, tmp_path: Path
    ) -> None:
        volumes = book()
        await volumes.open()
        made = await volumes.create("default", VolumeRequest())
        (tmp_path / "v").rename(tmp_path / "elsewhere")
        later = book()
        await later.open()  # the host starts all the same
        assert "is missing" in later.status()[0].trouble
        with pytest.raises(ServiceUnavailable, match="is missing"):
            await later.create("default", VolumeRequest())
        with pytest.raises(Unavailable):
            await later.mounted(made.id)
        (tmp_path / "elsewhere").rename(tmp_path / "v")
        later._shelves["default"].failed_at = 0  # some seconds later
        await later._look_at("default")
        assert later.status()[0].trouble == ""
        assert (await later.mounted(made.id)).is_dir()

    async def test_a_full_pool_takes_no_more_volumes(self, book: Callable[..., VolumeBook], tmp_path: Path) -> None:
        class Full(DirectoryProvider):
            async def check(self) -> Condition:
                return Condition(size_bytes=1000 * MIB, free_bytes=3 * MIB)

        volumes = book(Full(tmp_path / "v"))
        await volumes.open()
        await volumes._look_at("default")
        with pytest.raises(ServiceUnavailable, match="no new volumes: the storage is full: 3 of 1000 MiB are free"):
            await volumes.create("default", VolumeRequest())
        assert "full" in volumes.status()[0].trouble


async def test_two_daemons_cannot_share_a_state_directory(store: StateStore, tmp_path: Path) -> None:
    with pytest.raises(StateInUse):
        StateStore(tmp_path / "host.db")


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_what_was_synced_survives_the_death_of_zfs_fuse(tmp_path: Path, how: str) -> None:
    if Path("/dev/zfs").exists() or not Path(fuse.DAEMON).exists():
        pytest.skip("no zfs-fuse here")
    script = Path(__file__).with_name("zfs_fuse_death.py")
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, str(script), str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "kept\n"), done.stderr


@pytest.mark.root
@pytest.mark.slow
def test_a_job_whose_zfs_fuse_dies_is_ended_and_the_next_finds_its_data(tmp_path: Path, layer_file: Path) -> None:
    if Path("/dev/zfs").exists() or not Path(fuse.DAEMON).exists():
        pytest.skip("no zfs-fuse here")
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.host.zfs_fuse_host"]
    done = subprocess.run(
        [*command, str(tmp_path), str(layer_file)], capture_output=True, text=True, timeout=240, check=False
    )
    said = "the file system of its volume at /data has died\n0 available\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr
