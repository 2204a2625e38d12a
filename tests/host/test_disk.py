"""Room on the host's disk: who gets some, what is deleted when it runs low, and a daemon on a disk that is full."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from flynn.host.client import HostClient
from flynn.host.disk import BALLAST, drop_ballast_if_full, take_ballast
from flynn.host.jobs import room
from flynn.host.jobs.room import Disk
from flynn.host.logs.files import LogDirectory
from flynn.host.state import StateStore, save_setting
from flynn.host.volumes.provider import Unavailable
from flynn.host.volumes.spool import spooled
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.types.errors import ServiceUnavailable, ValidationError
from flynn.types.host import ContainerConfig, HostJob, JobStatus, Mountspec
from flynn.types.resources import Limit

from .machine import META, TestMachine, ended, eventually, sweep

MIB = 1 << 20
GIB = 1 << 30


def job(**fields: Any) -> HostJob:
    return HostJob(id="h-1", mountspecs=[Mountspec(id="l")], **fields)


def disk(free: int, reserve: int = 100) -> Disk:
    return Disk("/state", 1000 * MIB, free * MIB, reserve * MIB)


@pytest.mark.parametrize(
    ("wanted", "missing", "there", "why"),
    [
        pytest.param(job(), {}, disk(200), "", id="exactly what is left above the reserve"),
        pytest.param(
            job(), {}, disk(199),
            "no room for the job: it needs 100 MiB of temporary disk, and /state has 199 MiB free, of which 100 MiB are"
            " held in reserve", id="one less",
        ),
        pytest.param(
            job(), {"l": 30 * MIB}, disk(220),
            "no room for the job: it needs 100 MiB of temporary disk and 30 MiB for a layer to be fetched, and /state"
            " has 220 MiB free, of which 100 MiB are held in reserve", id="layers count",
        ),
        pytest.param(job(partition="system"), {}, disk(150), "", id="the platform may use half of the reserve"),
        pytest.param(
            job(partition="system"), {"a": MIB, "b": MIB}, disk(150),
            "no room for the job: it needs 100 MiB of temporary disk and 2 MiB for 2 layers to be fetched, and /state"
            " has 150 MiB free, of which 50 MiB are held in reserve", id="but not all",
        ),
    ],
)  # fmt: skip
def test_room_for_a_job(wanted: HostJob, missing: dict[str, int], there: Disk, why: str) -> None:
    assert room.refusal(wanted, 100 * MIB, missing, there) == why


@pytest.mark.parametrize(
    ("memory", "why"),
    [
        pytest.param(Limit(limit=GIB), "", id="all there is"),
        pytest.param(Limit(limit=2 * GIB), "cannot be 2048 MiB: this host has 1024 MiB", id="more than there is"),
        pytest.param(Limit(request=GIB, limit=9 * GIB), "", id="only what it requests counts"),
    ],
)
def test_more_memory_than_the_machine_has(memory: Limit, why: str) -> None:
    assert room.impossible(job(resources={"memory": memory}), GIB) == why


def test_the_default_reserve() -> None:
    assert (room.default_reserve(10 * GIB), room.default_reserve(1 << 50)) == (GIB // 2, 2 * GIB)


def test_a_disk_says_that_it_is_low() -> None:
    assert disk(100).trouble == ""
    assert disk(99).trouble == "/state has 99 MiB free, less than its reserve of 100 MiB: no new jobs"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MiB."""
    image, place = tmp_path / "disk", tmp_path / "small"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.check_call(["mkfs.ext4", "-q", "-m0", image])
    subprocess.check_call(["mount", "-o", "loop", image, place])
    try:
        yield place
    finally:
        subprocess.check_call(["umount", "-l", place])


def fill(directory: Path) -> Path:
    """Write until not a byte is left; returns the file to delete for room."""
    filler = directory / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (MIB, 4096, 1):
            try:
                while True:
                    file.write(os.urandom(size))
            except OSError:
                os.fsync(file.fileno())
                continue
    assert os.statvfs(directory).f_bavail == 0
    return filler


@pytest.mark.root
class TestFullDisk:
    async def test_the_state_is_still_written(self, small: Path) -> None:
        store = StateStore(small / "host.db")
        try:
            await store.commit(save_setting("a", "x" * 1000), durable=True)
            filler = fill(small)
            for number in range(300):  # each some pages, so that the log comes round several times
                await store.commit(save_setting("a", f"{number}" * 1000), durable=True)
            assert store.setting("a", str) == "299" * 1000
            filler.unlink()
            await store.hold_room()
        finally:
            store.close()

    async def test_a_daemon_can_start_thanks_to_the_ballast(self, small: Path) -> None:
        StateStore(small / "host.db").close()
        take_ballast(small)
        assert (small / BALLAST).stat().st_blocks * 512 >= MIB // 2
        assert not drop_ballast_if_full(small), "there is room"
        fill(small)
        assert drop_ballast_if_full(small)
        store = StateStore(small / "host.db")
        try:
            await store.commit(save_setting("a", "b"), durable=True)
            assert store.setting("a", str) == "b"
        finally:
            store.close()

    async def test_what_is_received_does_not_eat_the_reserve(self, small: Path) -> None:
        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield bytes(MIB)

        with pytest.raises(Unavailable, match="no room to receive it"):
            async with spooled(endless(), small):
                pass
        found = os.statvfs(small)
        assert found.f_bavail * found.f_frsize > 32 * MIB, "and nothing is left"

    def test_a_log_has_no_half_records(self, small: Path) -> None:
        log = LogDirectory(small).app("a")
        log.append(b"first\n")
        filler = fill(small)
        with pytest.raises(OSError, match="No space"):
            while True:
                log.append(b"x" * 5000 + b"\n")
        filler.unlink()
        log.append(b"last\n")
        lines = log.path.read_bytes().split(b"\n")
        assert (lines[0], lines[-2], {len(line) for line in lines[1:-2]} <= {5000}) == (b"first", b"last", True)
        log.close()


def test_logs_of_apps_that_are_gone_are_forgotten_after_a_month(tmp_path: Path) -> None:
    logs = LogDirectory(tmp_path)
    here, gone, quiet = (str(uuid.uuid4()) for _ in range(3))
    for app in (here, gone, quiet):
        logs.app(app).append(b"x\n")
    now = (tmp_path / f"{here}.log").stat().st_mtime
    os.utime(tmp_path / f"{quiet}.log", (now + 10 * 86400, now + 10 * 86400))
    assert logs.collect({here}, now + 31 * 86400) == [gone]
    assert logs.apps() == sorted([here, quiet])
    logs.app(gone).append(b"back\n")
    assert (tmp_path / f"{gone}.log").read_bytes() == b"back\n"
    logs.close()


@pytest.fixture
def node(image: Mountspec, tmp_path: Path) -> Iterator[TestMachine]:
    """A node whose state, layers, write layers and logs lie on a disk of 160 MiB."""
    sweep()
    machine = TestMachine(tmp_path / "node", image, number=3)
    machine.state.mkdir(parents=True)
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(160 * MIB)
    subprocess.check_call(["mkfs.ext4", "-q", "-m0", tmp_path / "disk"])
    subprocess.check_call(["mount", "-o", "loop", tmp_path / "disk", machine.state])
    try:
        machine.plug_in()
        yield machine
    finally:
        machine.remove()


@pytest.fixture
async def host(node: TestMachine) -> AsyncIterator[HostClient]:
    async with node.client() as client:
        yield client


FLAGS = ("--disk-reserve", "32M", "--log-dir")


@pytest.mark.root
@pytest.mark.slow
async def test_a_host_on_a_disk_that_fills_up(node: TestMachine, host: HostClient, image: Mountspec) -> None:
    """Refuses jobs by saying why, keeps the running ones and its word, and recovers by itself."""

    def wanted(script: str, disk_mib: int = 8, **fields: Any) -> HostJob:
        resources = {"temp_disk": Limit(limit=disk_mib * MIB)}
        config = ContainerConfig(args=["sh", "-c", script], **fields)
        name = f"node1-{uuid.uuid4()}"
        return HostJob(id=name, mountspecs=[image], metadata=META, config=config, resources=resources)

    async def answers() -> bool:
        await node.configure(host)
        return True

    node.start(*FLAGS, str(node.state / "log"))
    await eventually(answers, seconds=60)
    with pytest.raises(ServiceUnavailable, match="it needs 1024 MiB of temporary disk"):
        await host.add_job(wanted("true", disk_mib=1024))
    with pytest.raises(ValidationError, match=r"resources\.memory cannot be"):
        huge = wanted("true")
        await host.add_job(HostJob(**{f: getattr(huge, f) for f in huge.__struct_fields__ if f != "resources"},
                                   resources={"memory": Limit(limit=1 << 50)}))  # fmt: skip

    ticking = wanted("while :; do echo tick; sleep 0.1; done")
    waiting = wanted("trap 'exit 7' USR1; while :; do sleep 0.1; done")
    for one in (ticking, waiting):
        await host.add_job(one)

        async def running(job_id: str = one.id) -> bool:
            return (await host.job(job_id)).status == JobStatus.RUNNING

        await eventually(running, seconds=60)

    # What nobody needs goes first.
    unused, mapped = node.state / "layers" / "unused.squashfs", node.state / "layers" / f"{image.id}.squashfs"
    unused.write_bytes(os.urandom(20 * MIB))
    part = node.state / "part"
    there = os.statvfs(node.state)
    part.write_bytes(b"x" * (there.f_bavail * there.f_frsize - 30 * MIB))

    async def collected() -> bool:
        return not unused.exists() and not (await host.status()).disk.trouble  # type: ignore[union-attr]

    await eventually(collected, seconds=60)
    assert mapped.exists()

    fill(node.state)

    async def told() -> bool:
        disk = (await host.status()).disk
        return disk is not None and "no new jobs" in disk.trouble

    await eventually(told, seconds=60)
    identity = Identity.load(node.state / "identity")
    async with HttpClient(f"https://{node.ip}:1113", tls=identity) as http:
        with pytest.raises(Exception, match="no new jobs"):
            await http.get("/.well-known/status")
        figures = await http.get("/metrics", answer=bytes)
    assert b"\nflynn_host_disk_low 1\n" in figures
    with pytest.raises(ServiceUnavailable, match=r"no room for the job: .* 0 MiB free, of which 32 MiB"):
        await host.add_job(wanted("true"))
    await host.set_tags({"told": "on-a-full-disk"})
    await host.signal_job(waiting.id, signal.SIGUSR1)
    assert await ended(host, waiting.id, seconds=60) == JobStatus.CRASHED
    assert (await host.job(waiting.id)).exit_status == 7
    for number in (signal.SIGKILL, signal.SIGTERM):  # the second way the log of the state file is gone, too
        node.end(number)
        node.start(*FLAGS, str(node.state / "log"))

        async def found() -> bool:
            return (await host.job(ticking.id)).status == JobStatus.RUNNING

        await eventually(found, seconds=60)
        assert (await host.job(waiting.id)).exit_status == 7
        assert (await host.status()).tags == {"told": "on-a-full-disk"}

    (node.state / "filler").unlink()

    async def recovered() -> bool:
        return not (await host.status()).disk.trouble  # type: ignore[union-attr]

    await eventually(recovered, seconds=60)
    part.unlink()
    later = wanted("echo later")
    await host.add_job(later)
    assert await ended(host, later.id, seconds=60) == JobStatus.DONE
    await host.stop_job(ticking.id)
    await asyncio.sleep(0)
