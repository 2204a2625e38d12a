"""flynn-host as `make install` leaves it, as a unit of a real systemd: what the unit file promises."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flynn.host.client import HostClient
from flynn.types.host import ActiveJob, HostCommand, JobStatus, Mountspec
from tests.publisher import Publisher

from .booted import BootedMachine, ingredients, release_wheels
from .machine import eventually
from .test_daemon_jobs import job, output

pytestmark = [pytest.mark.root, pytest.mark.slow]

BAD = """#!/bin/sh
[ -n "$FLYNN_HOST_TRIAL" ] || export FLYNN_CONFIG_DIR=/nowhere
exec /usr/local/bin/flynn-host "$@"
"""
VERSION = "v20260801.0"
COUNTER = "i=0; while true; do i=$((i+1)); echo line $i; sleep 0.05; done"


@pytest.fixture(scope="module")
def booted(image: Mountspec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootedMachine]:
    if shutil.which("systemd-nspawn") is None:
        pytest.skip("no systemd-nspawn here")
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        pytest.skip("on pure cgroup v2 the booted machine would need a subtree of its own, with controllers")
    machine = BootedMachine(tmp_path_factory.mktemp("booted") / "node", image, number=3)
    with machine.running(ingredients()):
        yield machine


async def test_the_unit_file_is_in_order(booted: BootedMachine) -> None:
    assert booted.inside("systemd-analyze", "verify", "flynn-host.service") == ""


async def test_a_job_outlives_whatever_happens_to_the_unit(booted: BootedMachine) -> None:
    """One long story, because each part begins where the one before has ended."""
    # `start` returns when the host serves: Type=notify.
    booted.inside("systemctl", "start", "flynn-host")
    async with booted.client() as host:
        status = await host.status()
    assert booted.unit("MainPID") == str(status.pid) and booted.unit("SubState") == "running"

    wanted = job(booted.image_inside, COUNTER)
    async with booted.client() as host:
        await booted.configure(host)
        await host.add_job(wanted)
        await eventually(lambda: _prints(host, wanted.id, "line 5\n"), 30)
        first = await host.job(wanted.id)

    # Killed: systemd starts it again.
    booted.inside("kill", "-9", booted.unit("MainPID"))
    await eventually(lambda: _is(booted, "NRestarts", "1"), 30)
    await eventually(lambda: _is(booted, "SubState", "running"), 60)
    await _goes_on(booted, first)

    # Restarted by hand.
    before = booted.unit("MainPID")
    booted.inside("systemctl", "restart", "flynn-host")
    assert booted.unit("MainPID") != before
    await _goes_on(booted, first)

    # Updated in place: to systemd it is the same service all the time.
    before = booted.unit("MainPID"), booted.unit("NRestarts"), booted.unit("ActiveEnterTimestampMonotonic")
    async with booted.client() as host:
        await host.update(HostCommand())
        await eventually(lambda: _updated(host), 60)
        assert (update := (await host.status()).update) is not None and update.error == ""
    await eventually(lambda: _is(booted, "SubState", "running"), 30)
    assert (booted.unit("MainPID"), booted.unit("NRestarts")) == before[:2]
    assert booted.unit("ActiveState") == "active"
    await _goes_on(booted, first)

    # Updated to something that fails after its trial: the service is the old one still.
    bad = booted.root / "usr/local/bin/bad"
    bad.write_text(BAD)
    bad.chmod(0o755)
    async with booted.client() as host:
        await host.update(HostCommand(path="/usr/local/bin/bad"))
        await eventually(lambda: _refused(host), 60)
    await eventually(lambda: _is(booted, "SubState", "running"), 30)
    assert (booted.unit("MainPID"), booted.unit("NRestarts")) == before[:2]
    await _goes_on(booted, first)

    # Stopped: the daemon is gone, the job is not.
    booted.inside("systemctl", "stop", "flynn-host")
    assert (booted.unit("ActiveState"), booted.unit("Result")) == ("inactive", "success")
    assert Path(f"/proc/{booted.leader}/root/proc/{first.pid}/comm").read_text().strip() == "flynn-init"
    assert "flynn-zygote" not in booted.inside("ps", "-eo", "comm")
    booted.inside("systemctl", "start", "flynn-host")
    await _goes_on(booted, first)
    async with booted.client() as host:
        lines = (await output(host, wanted.id)).splitlines()
        assert lines == [f"line {number}" for number in range(1, len(lines) + 1)]
        await host.stop_job(wanted.id)
        assert (await host.job(wanted.id)).status is JobStatus.DONE
    booted.inside("systemctl", "stop", "flynn-host")
    assert booted.unit("Result") == "success"


async def test_a_release_takes_the_place_of_what_was_installed(
    booted: BootedMachine, layer_file: Path, tmp_path: Path
) -> None:
    """By the operator's command, with the real wheels; afterwards systemd starts the new program."""
    publisher = Publisher(tmp_path)
    publisher.image("shell", [publisher.layer("shell", layer_file.read_bytes())])
    wheels = await asyncio.to_thread(release_wheels, ingredients(), tmp_path / "wheels")
    publisher.release(VERSION, wheels=wheels)
    shutil.copytree(publisher.out, booted.root / "var/repository")
    shutil.copy(publisher.root, booted.config / "tuf-root.json")

    booted.inside("systemctl", "start", "flynn-host")
    wanted = job(booted.image_inside, COUNTER)
    async with booted.client() as host:
        await booted.configure(host)
        await host.add_job(wanted)
        await eventually(lambda: _prints(host, wanted.id, "line 5\n"), 30)
        first = await host.job(wanted.id)
    pid = booted.unit("MainPID")
    said = await asyncio.to_thread(booted.inside, "flynn-host", "update", "--hosts-only", "-r", "/var/repository")
    assert f"node1: updated from dev to {VERSION}, 1 jobs go on" in said
    program = f"/opt/flynn/versions/{VERSION}/bin/flynn-host"
    assert booted.inside("readlink", "/usr/local/bin/flynn-host").strip() == program
    assert booted.inside("flynn-host", "version").strip() == VERSION
    assert booted.unit("MainPID") == pid
    await _goes_on(booted, first)
    booted.inside("systemctl", "restart", "flynn-host")
    async with booted.client() as host:
        assert (await host.status()).version == VERSION
    await _goes_on(booted, first)
    async with booted.client() as host:
        await host.stop_job(wanted.id)


async def _goes_on(booted: BootedMachine, first: ActiveJob) -> None:
    """The job runs in the container it has always had, and what it prints is still logged."""
    async with booted.client() as host:
        found = await host.job(first.job.id)
        assert (found.status, found.pid, found.started_at) == (JobStatus.RUNNING, first.pid, first.started_at)
        lines = len((await output(host, first.job.id)).splitlines())
        await eventually(lambda: _prints(host, first.job.id, f"line {lines + 3}\n"), 30)


async def _prints(host: HostClient, job_id: str, text: str) -> bool:
    if (await host.job(job_id)).status is JobStatus.STARTING:
        return False
    return text in await output(host, job_id)


async def _is(booted: BootedMachine, name: str, value: str) -> bool:
    return await asyncio.to_thread(booted.unit, name) == value


async def _updated(host: HostClient) -> bool:
    return (await host.status()).update is not None


async def _refused(host: HostClient) -> bool:
    update = (await host.status()).update
    return update is not None and update.error != ""
