"""The daemon dies, the machine dies: what must still be true afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from flynn.host.client import HostClient
from flynn.types.codec import replace
from flynn.types.errors import ApiError, Conflict
from flynn.types.host import AttachReq, HostCommand, JobStatus, Mountspec, VolumeBinding
from flynn.types.volume import VolumeRequest

from .machine import TestMachine, ended, eventually
from .test_daemon_jobs import job, output

pytestmark = [pytest.mark.root, pytest.mark.slow]

COUNTER = "i=0; while true; do i=$((i+1)); echo line $i; sleep 0.02; done"


@pytest.fixture(params=["directory", "zfs"])
def node(image: Mountspec, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[TestMachine]:
    """A fresh node for each test, once with each kind of volumes."""
    if request.param == "zfs" and not (Path("/dev/zfs").exists() or shutil.which("zfs-fuse")):
        pytest.skip("no ZFS here")
    node = TestMachine(tmp_path / "node", image, number=2, provider=request.param)
    node.directory.mkdir()
    try:
        node.plug_in()
        node.start()
        yield node
    finally:
        node.remove()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
async def test_a_daemon_that_dies_loses_neither_jobs_nor_lines(
    node: TestMachine, image: Mountspec, number: int
) -> None:
    wanted = job(image, COUNTER)
    async with node.client() as host:
        await node.configure(host)
        await host.add_job(wanted)
        await eventually(lambda: _prints(host, wanted.id, "line 5\n"))
        before = await host.job(wanted.id)
    await asyncio.to_thread(node.end, number)
    await asyncio.sleep(0.3)
    await asyncio.to_thread(node.start)
    async with node.client() as host:
        after = await host.job(wanted.id)
        assert (after.status, after.pid, after.internal_ip) == (JobStatus.RUNNING, before.pid, before.internal_ip)
        lines = (await output(host, wanted.id)).splitlines()
        await eventually(lambda: _prints(host, wanted.id, f"line {len(lines) + 10}\n"))
        lines = (await output(host, wanted.id)).splitlines()
        assert lines == [f"line {number}" for number in range(1, len(lines) + 1)]
        # The network configuration is known again without anybody telling.
        second = job(image, "true")
        await host.add_job(second)
        assert await ended(host, second.id) is JobStatus.DONE
        assert (await host.job(second.id)).internal_ip != before.internal_ip
        await host.stop_job(wanted.id)
        assert (await host.job(wanted.id)).status is JobStatus.DONE


async def test_a_job_that_ended_meanwhile_is_reported_with_its_exit_status(node: TestMachine, image: Mountspec) -> None:
    wanted = job(image, "echo before; sleep 1; echo after; exit 7")
    async with node.client() as host:
        await node.configure(host)
        await host.add_job(wanted)
        await eventually(lambda: _prints(host, wanted.id, "before"))
    await asyncio.to_thread(node.end, signal.SIGKILL)
    await asyncio.sleep(1.5)
    await asyncio.to_thread(node.start)
    async with node.client() as host:
        assert await ended(host, wanted.id) is JobStatus.CRASHED
        assert (await host.job(wanted.id)).exit_status == 7
        assert await output(host, wanted.id) == "before\nafter\n"


async def test_after_a_power_cut_the_platforms_jobs_come_back_with_their_volumes(
    node: TestMachine, image: Mountspec
) -> None:
    async with node.client() as host:
        await node.configure(host)
        volume = await host.create_volume(VolumeRequest())
        bound = [VolumeBinding(target="/data", volume=volume.id, writeable=True)]
        script = "echo started >> /data/log; sync; cat /data/log; echo id $FLYNN_JOB_ID; sleep 1000"
        platform = job(image, script, volumes=bound, env={"FLYNN_JOB_ID": "old"}, resurrect=True)
        user = job(image, "echo up; sleep 1000")
        for wanted in (platform, user):
            await host.add_job(wanted)
        await eventually(lambda: _prints(host, user.id, "up"))
        await eventually(lambda: _prints(host, platform.id, "id old"))
    await asyncio.to_thread(node.end, signal.SIGKILL)
    node.kill_containers()
    await asyncio.to_thread(node.start)
    async with node.client() as host:
        await node.configure(host)
        assert (await host.job(user.id)).status is JobStatus.FAILED or await ended(host, user.id) is JobStatus.CRASHED
        await eventually(lambda: _has_heir(host, platform.id))
        heir = await _heir(host, platform.id)
        await eventually(lambda: _prints(host, heir, f"started\nstarted\nid {heir}\n"))
        active = await host.jobs(active=True)
        assert set(active) == {heir}


async def test_a_platform_job_that_is_killed_comes_back_one_that_is_stopped_does_not(
    node: TestMachine, image: Mountspec
) -> None:
    wanted = job(image, "echo up; sleep 1000", resurrect=True)
    async with node.client() as host:
        await node.configure(host)
        await host.add_job(wanted)
        await eventually(lambda: _prints(host, wanted.id, "up"))
        await host.signal_job(wanted.id, signal.SIGKILL)
        await eventually(lambda: _has_heir(host, wanted.id))
        heir = await _heir(host, wanted.id)
        await eventually(lambda: _prints(host, heir, "up"))
        await host.stop_job(heir)
        assert await host.jobs(active=True) == {}


async def test_a_job_accepted_but_not_started_is_started_by_the_next_daemon(
    node: TestMachine, image: Mountspec
) -> None:
    wanted = job(image, "true")
    async with node.client() as host:
        await host.add_job(wanted)  # waits: there is no network yet
        await asyncio.to_thread(node.end, signal.SIGKILL)
    await asyncio.to_thread(node.start)
    async with node.client() as host:
        assert (await host.job(wanted.id)).status is JobStatus.STARTING
        await node.configure(host)
        assert await ended(host, wanted.id) is JobStatus.DONE


async def test_acknowledged_volumes_and_tags_survive(node: TestMachine) -> None:
    async with node.client() as host:
        made = await host.create_volume(VolumeRequest(id="v1", meta={"a": "b"}))
        await host.set_tags({"disk": "ssd"})
    await asyncio.to_thread(node.end, signal.SIGKILL)
    await asyncio.to_thread(node.start)
    async with node.client() as host:
        assert await host.volumes() == [made]
        assert (await host.status()).tags == {"disk": "ssd"}
        await host.set_tags({"disk": ""})
        await host.destroy_volume("v1")
        assert await host.volumes() == []


async def test_nothing_is_left_of_jobs_that_are_gone(node: TestMachine, image: Mountspec) -> None:
    wanted = [job(image, "sleep 1000") for _ in range(3)]
    async with node.client() as host:
        await node.configure(host)
        for item in wanted:
            await host.add_job(item)
        for item in wanted:
            await eventually(lambda item=item: _runs(host, item.id))  # type: ignore[misc]
    await asyncio.to_thread(node.end, signal.SIGKILL)
    node.kill_containers()
    await asyncio.to_thread(node.start)
    async with node.client() as host:
        for item in wanted:
            await ended(host, item.id)
        await eventually(lambda: _empty(node))
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    assert [place for place in mounts if place.startswith(str(node.state / "layers"))] == []
    assert list(Path("/sys/fs/cgroup").glob(f"*/{node.name}/*/node1-*")) == []


async def _empty(node: TestMachine) -> bool:
    return not any((node.state / "jobs").iterdir())


async def _prints(host: HostClient, job_id: str, text: str) -> bool:
    try:
        return text in await output(host, job_id)
    except (ApiError, TimeoutError):
        return False


async def _runs(host: HostClient, job_id: str) -> bool:
    return (await host.job(job_id)).status is JobStatus.RUNNING


async def _heir(host: HostClient, job_id: str) -> str:
    for found in (await host.jobs()).values():
        if found.job.metadata.get("flynn-host.replaces") == job_id:
            return found.job.id
    return ""


async def _has_heir(host: HostClient, job_id: str) -> bool:
    return bool(await _heir(host, job_id))


async def test_open_streams_and_terminals_do_not_delay_the_end_of_the_daemon(
    node: TestMachine, image: Mountspec
) -> None:
    wanted = job(image, "sleep 1000", tty=True, stdin=True)
    async with node.client() as host:
        await node.configure(host)
        async with host.subscribed(), host.attach(AttachReq(job_id=wanted.id, flags=23)) as attachment:
            await host.add_job(wanted)
            await attachment.ready()
            async with asyncio.timeout(4):
                await asyncio.to_thread(node.end, signal.SIGTERM)


async def test_containers_that_cannot_be_taken_over_do_not_keep_the_others_from_it(
    node: TestMachine, image: Mountspec
) -> None:
    fine, damaged, missing, stopped = wanted = [job(image, "echo up; sleep 1000") for _ in range(4)]
    async with node.client() as host:
        await node.configure(host)
        for item in wanted:
            await host.add_job(item)
        for item in wanted:
            await eventually(lambda item=item: _prints(host, item.id, "up"))  # type: ignore[misc]
        inits = {item.id: (await host.job(item.id)).pid for item in wanted}
    await asyncio.to_thread(node.end, signal.SIGKILL)
    (node.state / "jobs" / damaged.id / "spec.json").write_text('{"id": "x", "rootfs": {"lower": 3}}')
    (node.state / "jobs" / missing.id / "spec.json").unlink()
    os.kill(inits[stopped.id] or 0, signal.SIGSTOP)  # its init answers nobody
    await asyncio.to_thread(node.start, env={"FLYNN_HOST_FAULT": "none"})  # which makes time limits shorter
    async with node.client() as host:
        for item in (damaged, missing, stopped):
            assert await ended(host, item.id) is JobStatus.FAILED
        assert (await host.job(fine.id)).status is JobStatus.RUNNING
        await host.stop_job(fine.id)
        await eventually(lambda: _empty(node))
    assert list(Path("/sys/fs/cgroup").glob(f"*/{node.name}/*/node1-*")) == []


async def test_refused_jobs_keep_neither_the_end_nor_an_update_waiting(node: TestMachine, image: Mountspec) -> None:
    async with node.client() as host:
        await node.configure(host)
        volume = await host.create_volume(VolumeRequest())
        holder = job(image, "sleep 1000", volumes=[VolumeBinding(target="/d", volume=volume.id, writeable=True)])
        await host.add_job(holder)
        for refused in (holder, replace(holder, id="node1-other")):
            with pytest.raises(Conflict):
                await host.add_job(refused)
        await host.set_tags({"disk": "ssd", "zone": "a"})
        await host.set_tags({"disk": ""})
        await host.update(HostCommand())
        await eventually(lambda: _updated(host))
        assert (await host.status()).tags == {"zone": "a"}
        await host.stop_job(holder.id)
    async with asyncio.timeout(6):
        await asyncio.to_thread(node.end, signal.SIGTERM)


async def test_flags_that_host_json_has_too_hinder_neither_a_start_nor_an_update(node: TestMachine) -> None:
    await asyncio.to_thread(node.end)
    file = node.config / "host.json"
    given = json.loads(file.read_text())
    file.write_text(json.dumps({**given, "args": [*given["args"], "--tags", "from=file", "--max-job-concurrency=3"]}))
    await asyncio.to_thread(node.start, "--max-job-concurrency", "9", "--id", "node1")
    async with node.client() as host:
        before = await host.status()
        assert before.tags == {"from": "file"} and before.flags is not None and "--id" in before.flags
        await host.update(HostCommand())
        await eventually(lambda: _updated(host))
        after = await host.status()
        assert (after.flags, after.tags, after.pid) == (before.flags, before.tags, before.pid)


async def _updated(host: HostClient) -> bool:
    update = (await host.status()).update
    return update is not None and not update.error
