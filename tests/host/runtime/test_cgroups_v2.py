"""cgroup v2: what is written where (on a tree of plain files), and the rules for devices (by the kernel itself).

This machine's unified hierarchy may have no controllers (the hybrid layout): devices need none, so that containers can
be put there for real, while limits are looked at as files.
"""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flynn.host.runtime import devices, kernel
from flynn.host.runtime.cgroups import CgroupError, CgroupTree, Layout, steps_for
from flynn.host.runtime.devices import MKNOD, READ, WRITE
from flynn.host.runtime.runtime import Runtime, plan_for
from flynn.host.runtime.spec import DEFAULT_DEVICES, ContainerSpec, Device, Limits, RootFS
from tests.host.runtime.conftest import run, started

PARTITIONS = {"system": 4096, "user": 8192}
FILES = (
    "cgroup.procs", "cgroup.subtree_control", "cgroup.kill", "cgroup.freeze", "cpu.weight", "cpu.stat", "memory.max",
    "memory.swap.max", "memory.current", "memory.events", "pids.max", "pids.current",
)  # fmt: skip


class Files:
    """A hierarchy of plain files: the kernel's would appear by themselves when a group is made."""

    def __init__(self, top: Path, controllers: str = "cpuset cpu io memory pids") -> None:
        self.top = top
        for group in ("", "flynn", "flynn/system", "flynn/user", "flynn/user/h-1"):
            (top / group).mkdir(exist_ok=True)
            (top / group / "cgroup.controllers").write_text(controllers + "\n")
            for name in FILES:
                (top / group / name).write_text("")
        self.layout = Layout({}, str(top), frozenset(controllers.split()))
        self.tree = CgroupTree(self.layout, "flynn")

    def read(self, path: str) -> str:
        return (self.top / path).read_text()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def spec(**fields: object) -> ContainerSpec:
    base: dict[str, object] = {"id": "h-1", "directory": "/d", "args": ("x",), "rootfs": RootFS(lower=("/l",))}
    return ContainerSpec(**{**base, **fields})  # type: ignore[arg-type]


class TestFiles:
    def test_controllers_are_passed_on_down_to_the_partitions_and_no_further(self, files: Files) -> None:
        files.tree.prepare(PARTITIONS)
        for level in ("", "flynn/", "flynn/system/", "flynn/user/"):
            assert files.read(f"{level}cgroup.subtree_control") == "+cpu +memory +pids +io"
        assert files.read("flynn/user/h-1/cgroup.subtree_control") == "", "processes live here"
        assert (files.read("flynn/system/cpu.weight"), files.read("flynn/user/cpu.weight")) == ("157", "313")

    def test_only_controllers_that_are_there_are_passed_on(self, tmp_path: Path) -> None:
        files = Files(tmp_path, "memory pids")
        files.tree.prepare(PARTITIONS)
        assert files.read("flynn/cgroup.subtree_control") == "+memory +pids"
        steps = steps_for(spec(limits=Limits(memory_bytes=5, cpu_shares=1024, pids=6)), files.layout, "flynn")
        assert {path.rpartition("/")[2] for path, _ in steps.values} == {"memory.max", "pids.max"}

    def test_limits(self, files: Files) -> None:
        wanted = spec(limits=Limits(memory_bytes=1 << 28, cpu_shares=768, pids=64))
        steps = steps_for(wanted, files.layout, "flynn")
        group = str(files.top / "flynn/user/h-1")
        assert steps.directories == (group,)
        assert dict(steps.values) == {
            f"{group}/memory.max": "268435456",
            f"{group}/cpu.weight": "30",
            f"{group}/pids.max": "64",
        }
        assert dict(steps.optional) == {f"{group}/memory.swap.max": "0"}
        assert steps.joins == (f"{group}/cgroup.procs",)
        assert (steps.oom_counter, steps.oom_control) == (f"{group}/memory.events", None)
        assert steps.device_rules
        assert steps.device_program == devices.program(DEFAULT_DEVICES)

    def test_a_kernel_without_device_programs_leaves_a_job_no_devices(self, files: Files) -> None:
        layout = Layout({}, str(files.top), files.layout.controllers, device_programs=False)
        plan = plan_for(spec(), steps_for(spec(), layout, "flynn"), "x86_64")
        assert (plan.nodev, plan.cgroup_devices, plan.capabilities >> 27 & 1) == (True, b"", 0)
        plan = plan_for(spec(), steps_for(spec(), files.layout, "flynn"), "x86_64")
        assert (plan.nodev, plan.capabilities >> 27 & 1) == (False, 1)

    def test_everything_allowed_needs_no_program(self, files: Files) -> None:
        steps = steps_for(spec(devices_allowed=(Device(type="a", major=-1, minor=-1),)), files.layout, "flynn")
        assert (steps.device_rules, steps.device_program) == (True, b"")

    def test_killing_is_one_write(self, files: Files) -> None:
        files.tree.kill("user", "h-1")
        assert files.read("flynn/user/h-1/cgroup.kill") == "1"

    def test_killing_where_the_kernel_cannot(self, files: Files) -> None:
        """Linux before 5.14: freeze, kill one by one, thaw."""
        (files.top / "flynn/user/h-1/cgroup.kill").unlink()
        victim = subprocess.Popen(["sleep", "60"])
        try:
            (files.top / "flynn/user/h-1/cgroup.procs").write_text(f"{victim.pid}\n")
            files.tree.kill("user", "h-1")
            assert victim.wait(5) == -9
        finally:
            victim.kill()
        assert files.read("flynn/user/h-1/cgroup.freeze") == "0"

    def test_usage_and_out_of_memory(self, files: Files) -> None:
        group = files.top / "flynn/user/h-1"
        (group / "memory.current").write_text("4096\n")
        (group / "memory.max").write_text("8192\n")
        (group / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
        (group / "pids.current").write_text("3\n")
        (group / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 0\n")
        usage = files.tree.usage("user", "h-1")
        assert (usage.memory_bytes, usage.memory_limit_bytes, usage.cpu_seconds) == (4096, 8192, 2.5)
        assert (usage.processes, usage.oom_kills) == (3, 1)
        (group / "memory.max").write_text("max\n")
        assert files.tree.usage("user", "h-1").memory_limit_bytes is None

    def test_processes_in_between_are_told(self, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel refuses to pass controllers on from a group with processes of its own."""

        def busy(path: int, data: bytes) -> int:
            raise OSError(16, "Device or resource busy")

        monkeypatch.setattr(os, "write", busy)
        with pytest.raises(CgroupError, match="there are processes in it"):
            files.tree.prepare(PARTITIONS)


# Rules for devices


def interpret(program: bytes, access: int, kind: int, major: int, minor: int) -> int:
    """What the kernel computes: just the instructions we use."""
    context, registers, at = struct.pack("<III", access << 16 | kind, major, minor), [0] * 11, 0
    while True:
        code, both, offset, value = struct.unpack_from("<BBhi", program, at * 8)
        to, of = both & 15, both >> 4
        at += 1
        match code:
            case 0x61:
                registers[to] = struct.unpack_from("<I", context, offset)[0]
            case 0xBC:
                registers[to] = registers[of] & 0xFFFFFFFF
            case 0x54:
                registers[to] &= value & 0xFFFFFFFF
            case 0x74:
                registers[to] >>= value
            case 0xB7:
                registers[to] = value
            case 0x55:
                at += offset if registers[to] != value else 0
            case 0x95:
                return registers[0]
            case _:
                raise AssertionError(f"unknown instruction {code:#x}")


def covered(allowed: Sequence[Device], access: int, kind: int, major: int, minor: int) -> bool:
    """The rules as v1 documents them, obviously right."""
    bits = {"m": MKNOD, "r": READ, "w": WRITE}
    return any(
        device.allow
        and {"b": 1, "c": 2}[device.type] == kind
        and device.major in (-1, major)
        and device.minor in (-1, minor)
        and all(letter in device.permissions for letter, bit in bits.items() if access & bit)
        for device in allowed
    )


numbers = st.sampled_from([-1, 0, 1, 5, 136, 259])
rules = st.lists(
    st.builds(
        Device,
        type=st.sampled_from("bc"),
        major=numbers,
        minor=numbers,
        permissions=st.sampled_from(["", "r", "w", "m", "rw", "rm", "rwm"]),
        allow=st.booleans(),
    ),
    max_size=5,
).map(tuple)


@given(rules, st.integers(1, 7), st.sampled_from([1, 2]), st.sampled_from([0, 1, 5, 259]), st.sampled_from([0, 1, 5]))
def test_the_program_decides_as_v1_does(
    allowed: tuple[Device, ...], access: int, kind: int, major: int, minor: int
) -> None:
    verdict = interpret(devices.program(allowed), access, kind, major, minor)
    assert verdict == int(covered(allowed, access, kind, major, minor))


def test_default_devices() -> None:
    program = devices.program(DEFAULT_DEVICES)
    null, disk, terminal = (2, 1, 3), (1, 254, 0), (2, 136, 7)
    assert interpret(program, READ | WRITE, *null)
    assert interpret(program, MKNOD, *disk), "making the file is allowed"
    assert not interpret(program, READ, *disk), "opening it is not"
    assert interpret(program, READ | WRITE, *terminal)
    assert not interpret(program, READ, 2, 5, 1), "the machine's console"


def unified() -> str | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line:
            return line.split()[4]
    return None


@pytest.fixture
def group() -> AsyncIterator[Path]:
    top = unified()
    if top is None:
        pytest.skip("no cgroup2 here")
    path = Path(top) / f"flynn-test-{os.getpid()}-devices"
    path.mkdir()
    try:
        yield path  # type: ignore[misc]
    finally:
        path.rmdir()


@pytest.mark.root
class TestKernel:
    def test_a_process_in_the_group_cannot_open_what_is_not_allowed(self, group: Path, tmp_path: Path) -> None:
        """The kernel's verifier takes the program, and the kernel asks it."""
        try:
            kernel.attach_device_program(str(group), devices.program(DEFAULT_DEVICES))
        except PermissionError:
            pytest.skip("programs may not be loaded here")
        disk = tmp_path / "disk"
        os.mknod(disk, 0o600 | stat.S_IFBLK, os.stat("/dev/loop0").st_rdev)
        script = (
            "import os, sys, stat\n"
            f"open('{group}/cgroup.procs', 'w').write('0')\n"
            f"for path in ('/dev/null', '/dev/urandom', '{disk}', '/dev/loop-control'):\n"
            "    try: os.close(os.open(path, os.O_RDONLY)); print('open', end=' ')\n"
            "    except PermissionError: print('refused', end=' ')\n"
            f"os.mknod('{tmp_path}/made', 0o600 | stat.S_IFBLK, os.makedev(7, 1))\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=True)
        assert done.stdout.split() == ["open", "open", "refused", "refused"]
        os.close(os.open("/dev/loop-control", os.O_RDONLY))  # outside the group nothing has changed

    async def test_a_container_on_the_unified_hierarchy(
        self, spec: Callable[..., ContainerSpec], tmp_path: Path
    ) -> None:
        top = unified()
        if top is None:
            pytest.skip("no cgroup2 here")
        layout = Layout({}, top, frozenset())
        runtime = Runtime(state_dir=tmp_path, cgroup_root=f"flynn-test-{os.getpid()}", layout=layout)
        async with runtime:
            try:
                script = (
                    "echo x > /dev/null && head -c1 /dev/urandom > /tmp/r && mknod /tmp/disk b 7 0 && "
                    "if head -c1 /tmp/disk 2>/tmp/why; then echo read; else cat /tmp/why; fi; cat /proc/self/cgroup"
                )
                end, out, _ = await run(runtime, spec(script, limits=Limits(memory_bytes=1 << 28, pids=9)))
                assert end.code == 0
                assert "Operation not permitted" in out
                assert f"/flynn-test-{os.getpid()}/user/host-1" in out
                sleeper = await started(runtime, spec("sleep 100 & sleep 100"))
                await sleeper.kill()
                assert (await sleeper.wait()).code == 137
                await sleeper.destroy()
                control = Device(type="c", major=10, minor=237, path="/dev/loop-control")
                more = (*DEFAULT_DEVICES, control)
                end, out, err = await run(
                    runtime, spec("true < /dev/loop-control && echo yes", devices_allowed=more, devices_created=more)
                )
                assert out == "yes\n", err
            finally:
                await runtime.collect_leftovers(())
                runtime.cgroups.remove_all()
