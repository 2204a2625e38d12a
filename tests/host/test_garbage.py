"""What may be destroyed, and the commands that do it."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flynn.aio.clock import SystemClock
from flynn.host.cli.volumes import garbage
from flynn.host.state import StateStore
from flynn.host.volumes.book import VolumeBook
from flynn.host.volumes.directory import DirectoryProvider
from flynn.types.host import ActiveJob, ContainerConfig, HostJob, JobStatus, VolumeBinding
from flynn.types.volume import VolumeInfo, VolumeRequest

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def volume(id: str, age: int = 0, **meta: str) -> VolumeInfo:
    named = {f"flynn-controller.{key}": value for key, value in meta.items()}
    return VolumeInfo(id=id, type="data", meta=named, created_at=NOW - timedelta(hours=age))


def user(volume_id: str, status: JobStatus) -> ActiveJob:
    config = ContainerConfig(volumes=[VolumeBinding(volume=volume_id)])
    return ActiveJob(job=HostJob(id="h-1", config=config), status=status)


@pytest.mark.parametrize(
    ("everything", "deleted", "kept"),
    [
        pytest.param(False, ["fresh", "once", "plain"], ["data"], id="an app's data is not garbage"),
        pytest.param(True, ["fresh", "once", "plain", "data"], [], id="unless it is said to be"),
    ],
)
def test_what_is_garbage(everything: bool, deleted: list[str], kept: list[str]) -> None:
    volumes = [
        volume("plain", 3),
        volume("data", 4, app="a", delete_on_stop="false"),
        volume("once", 2, app="a", delete_on_stop="true"),
        volume("fresh", 1),
        volume("running"),
        volume("starting"),
        volume("left", 5, app="a"),
    ]
    jobs = [
        user("running", JobStatus.RUNNING),
        user("starting", JobStatus.STARTING),
        user("plain", JobStatus.DONE),
        user("left", JobStatus.RUNNING),
    ]
    unused, spared = garbage(volumes, jobs, everything)
    assert ([info.id for info in unused], [info.id for info in spared]) == (deleted, kept)


def tool(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flynn.host.main", "destroy-volumes", "--state-dir", str(directory)]
    return subprocess.run(
        [*command, "--vol-provider", "directory", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


async def filled(directory: Path) -> dict[str, VolumeInfo]:
    store = StateStore(directory / "host.db")
    try:
        ids = iter(("v1", "s1", "c1"))
        provider = DirectoryProvider(directory / "volumes" / "directory")
        book = VolumeBook(store, {"default": provider}, SystemClock(), set, lambda: next(ids))
        await book.open()
        await book.create("default", VolumeRequest())
        await book.snapshot("v1")
        await book.clone("s1", VolumeRequest())
        (directory / "layers").mkdir()
        (directory / "layers" / "l1.squashfs").write_text("x")
        (directory / "scratch" / "left").mkdir(parents=True)
        return {info.id: info for info in book.all()}
    finally:
        store.close()


def volumes_of(directory: Path) -> set[str]:
    return {path.name for path in (directory / "volumes" / "directory").iterdir()}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
class TestDestroyVolumes:
    def test_a_host_that_never_was(self, tmp_path: Path) -> None:
        done = tool(tmp_path)
        assert (done.returncode, done.stdout) == (0, "already clean\n")

    async def test_data_stays_unless_included(self, tmp_path: Path) -> None:
        await filled(tmp_path)
        done = tool(tmp_path, "--keep-system-images")
        assert (done.returncode, done.stdout) == (0, "")
        assert (tmp_path / "layers" / "l1.squashfs").exists()
        done = tool(tmp_path)
        assert (done.returncode, done.stdout) == (0, "Deleted squashfs volume l1\n")
        assert not list((tmp_path / "scratch").iterdir())
        assert volumes_of(tmp_path) == {"v1", "s1", "c1"}
        done = tool(tmp_path, "--include-data")
        assert done.returncode == 0, done.stderr
        assert set(done.stdout.splitlines()) == {f"Deleted data volume {name}" for name in ("v1", "s1", "c1")}
        assert volumes_of(tmp_path) == set()

    async def test_a_daemon_that_runs(self, tmp_path: Path) -> None:
        store = StateStore(tmp_path / "host.db")
        try:
            done = tool(tmp_path, "--include-data")
        finally:
            store.close()
        assert done.returncode == 4
        assert "in use by another flynn-host daemon" in done.stderr

    async def test_storage_that_is_lost_is_told_and_can_be_forgotten(self, tmp_path: Path) -> None:
        await filled(tmp_path)
        (tmp_path / "volumes").rename(tmp_path / "lost")
        done = tool(tmp_path, "--include-data")
        assert done.returncode == 6
        assert "could not delete volume v1" in done.stderr
        assert "is missing" in done.stderr
        done = tool(tmp_path, "--forget")
        assert (done.returncode, len(done.stdout.splitlines())) == (0, 3)
        store = StateStore(tmp_path / "host.db")
        try:
            assert store.volumes() == []
        finally:
            store.close()

    async def test_a_state_file_that_cannot_be_used(self, tmp_path: Path) -> None:
        (tmp_path / "host.db").write_bytes(b"not a database, but long enough to be read as one" * 100)
        done = tool(tmp_path)
        assert done.returncode == 5
