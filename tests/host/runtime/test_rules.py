"""What is decided without touching the kernel: cgroup layouts and steps, the deny list, init's last words, BPF."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from flynn.host.network.ports import mac_address, port_name
from flynn.host.runtime import netlink, seccomp
from flynn.host.runtime.cgroups import CgroupError, Layout, device_rule, layout_from, steps_for, weight_from_shares
from flynn.host.runtime.process import CannotStart, find_command
from flynn.host.runtime.runtime import Exit, exit_from
from flynn.host.runtime.spec import ContainerSpec, Device, Limits, RootFS

V1 = """\
24 20 0:21 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:5 - cgroup cgroup rw,cpu,cpuacct
25 20 0:22 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
26 20 0:23 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
"""
UNIFIED = "30 20 0:30 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"


def spec(**fields: object) -> ContainerSpec:
    base: dict[str, object] = {"id": "h-1", "directory": "/d", "args": ("x",), "rootfs": RootFS(lower=("/l",))}
    return ContainerSpec(**{**base, **fields})  # type: ignore[arg-type]


class TestLayout:
    def test_v1_with_hierarchies_of_several_controllers(self) -> None:
        layout = layout_from(V1)
        assert layout.v1 == {
            "cpu": "/sys/fs/cgroup/cpu,cpuacct",
            "cpuacct": "/sys/fs/cgroup/cpu,cpuacct",
            "memory": "/sys/fs/cgroup/memory",
        }
        assert layout.mount_points == ("/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/memory")

    def test_hybrid_is_v1_as_long_as_memory_is(self) -> None:
        assert layout_from(V1 + UNIFIED).v2 is None

    def test_v2(self) -> None:
        assert layout_from(UNIFIED) == Layout({}, "/sys/fs/cgroup")

    def test_none(self) -> None:
        with pytest.raises(CgroupError):
            layout_from("22 27 0:21 / /proc rw,relatime - proc proc rw\n")


class TestSteps:
    limits = Limits(memory_bytes=1024, cpu_shares=1024, pids=5)

    def test_v1(self) -> None:
        steps = steps_for(spec(limits=self.limits), layout_from(V1), "flynn")
        assert steps.directories == (
            "/sys/fs/cgroup/cpu,cpuacct/flynn/user/h-1",
            "/sys/fs/cgroup/memory/flynn/user/h-1",
        )
        assert steps.values == (
            ("/sys/fs/cgroup/memory/flynn/user/h-1/memory.limit_in_bytes", "1024"),
            ("/sys/fs/cgroup/cpu,cpuacct/flynn/user/h-1/cpu.shares", "1024"),
        )

    def test_v2(self) -> None:
        steps = steps_for(spec(limits=self.limits), layout_from(UNIFIED), "flynn")
        group = "/sys/fs/cgroup/flynn/user/h-1"
        assert steps.joins == (f"{group}/cgroup.procs",)
        assert dict(steps.values) == {
            f"{group}/memory.max": "1024",
            f"{group}/cpu.weight": "39",
            f"{group}/pids.max": "5",
        }

    @pytest.mark.parametrize(("shares", "weight"), [(2, 1), (1024, 39), (262144, 10000), (0, 1), (1 << 30, 10000)])
    def test_weights(self, shares: int, weight: int) -> None:
        assert weight_from_shares(shares) == weight

    def test_device_rules(self) -> None:
        assert device_rule(Device(type="c", major=136, minor=-1)) == "c 136:* rwm"


@pytest.mark.parametrize(
    ("state", "end"),
    [
        ("running", None),
        ("created", None),
        ("exited 3 0 0", Exit(3)),
        ("exited 137 9 2", Exit(137, 9, True)),
        ('failed 0 exec: "foo": not found', Exit(0, 0, False, 'exec: "foo": not found')),
    ],
)
def test_last_words(state: str, end: Exit | None) -> None:
    assert exit_from(state) == end


class TestCommand:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for name in ("bin/tool", "work/local", "plain"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("")
            (tmp_path / name).chmod(0o644 if name == "plain" else 0o755)
        return tmp_path

    @pytest.mark.parametrize(
        ("name", "found"),
        [
            pytest.param("tool", "bin/tool", id="in PATH"),
            pytest.param("local", "work/local", id="in the working directory, last"),
            pytest.param("./local", "work/local", id="relative"),
            pytest.param("{root}/bin/tool", "bin/tool", id="absolute"),
        ],
    )
    def test_found(self, root: Path, name: str, found: str) -> None:
        resolved = find_command(name.format(root=root), f"/nowhere:{root}/bin", f"{root}/work")
        assert Path(resolved).resolve() == root / found

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            pytest.param("foo", 'exec: "foo": executable file not found in $PATH', id="nowhere"),
            pytest.param("", 'exec: "": executable file not found in $PATH', id="empty"),
            pytest.param("../plain", 'exec: "../plain": permission denied', id="not executable"),
            pytest.param("../bin", 'exec: "../bin": is a directory', id="directory"),
        ],
    )
    def test_refused(self, root: Path, name: str, text: str) -> None:
        with pytest.raises(CannotStart) as caught:
            find_command(name, f"{root}/bin", f"{root}/work")
        assert str(caught.value) == text


class TestSeccomp:
    """The programs, interpreted here as the kernel does."""

    ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x50001, 0x50026, 0x80000000

    def verdict(
        self, capabilities: tuple[str, ...], machine: str, number: int, *, flags: int = 0, audit: int = 0
    ) -> int:
        architecture = seccomp.ARCHITECTURES[machine]
        data = struct.pack("=iIQ6Q", number, audit or architecture.audit, 0, flags, 0, 0, 0, 0, 0)
        program = seccomp.program(capabilities, machine)
        instructions = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
        at = accumulator = 0
        while True:
            operation, if_true, if_false, operand = instructions[at]
            at += 1
            match operation:
                case 0x20:
                    accumulator = struct.unpack_from("=I", data, operand)[0]
                case 0x15:
                    at += if_true if accumulator == operand else if_false
                case 0x35:
                    at += if_true if accumulator >= operand else if_false
                case 0x45:
                    at += if_true if accumulator & operand else if_false
                case 0x06:
                    return operand

    @pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
    def test_each_call_of_the_list(self, machine: str) -> None:
        numbers = seccomp.ARCHITECTURES[machine].numbers
        for call, number in numbers.items():
            wanted = {"clone": self.ALLOW, "clone3": self.ENOSYS}.get(call, self.EPERM)
            wanted = self.ALLOW if call in seccomp.ALLOWED_ANYWAY else wanted
            assert self.verdict((), machine, number) == wanted, call
        allowed = next(number for number in range(1000) if number not in numbers.values())
        assert self.verdict((), machine, allowed) == self.ALLOW

    def test_clone_is_refused_only_with_namespaces(self) -> None:
        assert self.verdict((), "x86_64", 56, flags=0x11) == self.ALLOW
        assert self.verdict((), "x86_64", 56, flags=0x10000000) == self.EPERM

    def test_capabilities_give_back_what_they_gate(self) -> None:
        assert self.verdict(("SYS_ADMIN",), "x86_64", 165) == self.ALLOW
        assert self.verdict(("SYS_ADMIN",), "x86_64", 435) == self.ALLOW
        assert self.verdict(("SYS_ADMIN",), "x86_64", 246) == self.EPERM

    def test_no_way_around_by_another_numbering(self) -> None:
        assert self.verdict((), "x86_64", 0x40000000 + 165) == self.ENOSYS
        assert self.verdict((), "x86_64", 21, audit=0x40000003) == self.KILL

    def test_unknown_machine_has_no_filter(self) -> None:
        assert seccomp.program((), "riscv64") == b""


def test_port_names_fit_the_kernel() -> None:
    assert port_name("100.100.7.2") == "vflynn64640702"
    assert mac_address("100.100.7.2").hex(":") == "fe:00:64:64:07:02"


def test_attributes_are_padded_to_four_bytes() -> None:
    raw = netlink.name(netlink.IFLA_IFNAME, "ab") + netlink.number(netlink.IFLA_MTU, 1450)
    assert len(raw) % 4 == 0
    assert netlink.attributes(raw) == {netlink.IFLA_IFNAME: b"ab\0", netlink.IFLA_MTU: struct.pack("=I", 1450)}


def test_broadcast_address_follows_from_the_prefix() -> None:
    body = netlink.address(2, "10.1.2.3", 22)[netlink.AddressHeader.size :]
    assert netlink.attributes(body)[netlink.IFA_BROADCAST] == bytes((10, 1, 3, 255))
