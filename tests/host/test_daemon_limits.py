"""Limits and profiles of jobs, each seen from inside a real container of a real daemon."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

from flynn.host.client import HostClient
from flynn.host.jobs.profiles import Extras, ProfileError, extras
from flynn.host.runtime import loop
from flynn.host.runtime.spec import Device
from flynn.types.host import ActiveJob, ContainerConfig, HostJob, JobEventKind, JobStatus, Mountspec
from flynn.types.resources import Limit

from .machine import META, run_to_end
from .test_daemon_jobs import output

MIB = 1 << 20


def job(image: Mountspec, script: str, resources: dict[str, Limit] | None = None, **fields: Any) -> HostJob:
    profiles = fields.pop("profiles", [])
    config = ContainerConfig(args=["sh", "-c", script], **fields)
    return HostJob(
        id=f"node1-{uuid.uuid4()}", mountspecs=[image], metadata=META, config=config, resources=resources or {},
        profiles=profiles,
    )  # fmt: skip


async def ran(host: HostClient, wanted: HostJob) -> tuple[ActiveJob, str]:
    """Run a job to its end: its record, and what it printed."""
    events = await run_to_end(host, wanted)
    last = events[-1].job
    assert events[-1].event is JobEventKind.CLEANUP
    assert last is not None
    return last, await output(host, wanted.id)


@pytest.mark.root
@pytest.mark.slow
class TestInside:
    async def test_without_limits_the_defaults_hold(self, host: HostClient, image: Mountspec) -> None:
        script = (
            "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes pids/pids.max cpu/cpu.shares;"
            "df -m / | tail -n1 | awk '{print $2}'"
        )
        _, text = await ran(host, job(image, script))
        memory, pids, shares, disk = text.split()[-4:]
        assert (memory, pids, shares) == (str(1 << 30), "4096", "1024")
        assert 85 <= int(disk) <= 100

    async def test_memory(self, host: HostClient, image: Mountspec) -> None:
        wanted = job(image, "exec dd if=/dev/zero of=/dev/null bs=128M count=1", {"memory": Limit(limit=32 * MIB)})
        last, _ = await ran(host, wanted)
        assert (last.status, last.exit_status) == (JobStatus.CRASHED, 137)
        assert last.error == "killed for lack of memory: it wanted more than its limit of 32 MiB"

    async def test_memory_of_a_child_whose_parent_goes_on(self, host: HostClient, image: Mountspec) -> None:
        script = "dd if=/dev/zero of=/dev/null bs=128M count=1; exit 5"
        last, _ = await ran(host, job(image, script, {"memory": Limit(limit=32 * MIB)}))
        assert last.exit_status == 5
        assert "lack of memory" in (last.error or "")

    async def test_an_ordinary_end_has_no_error(self, host: HostClient, image: Mountspec) -> None:
        last, _ = await ran(host, job(image, "exit 5"))
        assert (last.exit_status, last.error) == (5, None)

    async def test_cpu(self, host: HostClient, image: Mountspec) -> None:
        _, text = await ran(host, job(image, "cat /sys/fs/cgroup/cpu/cpu.shares", {"cpu": Limit(limit=750)}))
        assert text.split()[-1] == "768"

    async def test_processes(self, host: HostClient, image: Mountspec) -> None:
        script = "i=0; while [ $i -lt 9 ]; do sleep 60 & i=$((i+1)); echo $i; done"
        last, text = await ran(host, job(image, script, {"max_procs": Limit(limit=8)}))
        assert last.exit_status not in (0, None)
        assert "can't fork" in text
        assert {"7"} <= set(text.split())
        assert "8" not in text.split()

    async def test_processes_of_one_container_leave_the_others_alone(self, host: HostClient, image: Mountspec) -> None:
        """RLIMIT_NPROC would count all processes of the user on the machine."""
        holder = job(image, "for i in 1 2 3 4 5 6; do sleep 1000 & done; wait", {"max_procs": Limit(limit=8)}, uid=1000)
        await host.add_job(holder)
        try:
            last, _ = await ran(
                host, job(image, "sleep 0.1 & sleep 0.1 & wait", {"max_procs": Limit(limit=4)}, uid=1000)
            )
            assert last.exit_status == 0
        finally:
            await host.stop_job(holder.id)

    async def test_temporary_disk(self, host: HostClient, image: Mountspec) -> None:
        last, text = await ran(
            host, job(image, "dd if=/dev/zero of=/x bs=1M count=32", {"temp_disk": Limit(limit=16 * MIB)})
        )
        assert last.exit_status == 1
        assert "No space left on device" in text

    async def test_descriptors(self, host: HostClient, image: Mountspec) -> None:
        limits = {"max_fd": Limit(request=32, limit=64)}
        _, text = await ran(host, job(image, "ulimit -Sn; ulimit -Hn", limits))
        assert text.split()[-2:] == ["32", "64"]

    async def test_the_loop_profile_gives_one_device(self, host: HostClient, image: Mountspec) -> None:
        script = (
            "ls /dev/loop* && dd if=/dev/zero of=/img bs=1M count=4 2>/dev/null && losetup /dev/loop0 /img && "
            "echo hello > /dev/loop0 && head -c5 /img; mknod /tmp/other b 7 0; head -c1 /tmp/other"
        )
        before = set(loop.GIVEN_AWAY.glob("*"))
        last, text = await ran(host, job(image, script, profiles=["loop"], linux_capabilities=None))
        assert {"/dev/loop0", "hello"} <= set(text.splitlines()), text
        assert "/tmp/other: Operation not permitted" in text, "the other devices carry other jobs' disks"
        assert last.exit_status == 1
        assert set(loop.GIVEN_AWAY.glob("*")) == before

    @pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="no KVM here")
    async def test_the_kvm_profile(self, host: HostClient, image: Mountspec) -> None:
        script = "ls -l /dev/kvm /dev/net/tun && true < /dev/kvm && grep CapEff /proc/self/status"
        last, text = await ran(host, job(image, script, profiles=["kvm"]))
        assert last.exit_status == 0, text
        assert int(text.split()[-1], 16) >> 12 & 1, "NET_ADMIN"

    @pytest.mark.skipif(Path("/dev/zfs").exists(), reason="there is a ZFS module here")
    async def test_a_profile_the_machine_does_not_have(self, host: HostClient, image: Mountspec) -> None:
        events = await run_to_end(host, job(image, "true", profiles=["zfs"]))
        last = events[-1].job
        assert last is not None
        assert last.status == JobStatus.FAILED
        assert last.error == "error applying zfs profile: [Errno 2] No such file or directory: '/dev/zfs'"


def test_what_profiles_add(tmp_path: Path) -> None:
    for name in ("zfs", "kvm", "net/tun"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    zfs = extras(["zfs"], tmp_path)
    assert [device.path for device in zfs.devices] == ["/dev/zfs", ""]
    assert zfs.devices[1] == Device(type="b", major=230, minor=-1)
    assert zfs.mounts == ()
    (tmp_path / "zvol").mkdir()
    assert [(mount.target, mount.source) for mount in extras(["zfs"], tmp_path).mounts] == [
        ("/dev/zvol", str(tmp_path / "zvol"))
    ]
    kvm = extras(["kvm"], tmp_path)
    assert [device.path for device in kvm.devices] == ["/dev/kvm", "/dev/net/tun"]
    assert kvm.capabilities == ("NET_ADMIN",)
    one = Device(type="b", major=7, minor=12, path="/dev/loop0")
    assert extras(["loop"], tmp_path, lambda: 12) == Extras((one,))
    assert extras([]) == Extras()


def test_profiles_that_cannot_be(tmp_path: Path) -> None:
    def none_left() -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(ProfileError, match="unknown job profile: x"):
        extras(["x"], tmp_path)
    with pytest.raises(ProfileError, match="error applying kvm profile"):
        extras(["kvm"], tmp_path)
    with pytest.raises(ProfileError, match=r"error applying loop profile: .*No space left"):
        extras(["loop"], tmp_path, none_left)
