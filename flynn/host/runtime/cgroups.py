"""Control groups: which layout this machine has, what a container's groups must contain, counting and killing.

v1 (also the hybrid layout, where cgroup2 is mounted without controllers) and v2. A container's group is
`<mount point>/<root>/<partition>/<id>` in every hierarchy used. Deciding (`Layout`, `steps_for`) is pure.
Init makes and joins the groups itself by carrying out the steps: migrating between groups waits for the kernel, and the
daemon's event loop has no time for that.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flynn.host.runtime import devices, kernel
from flynn.host.runtime.spec import ContainerSpec, Device

log = logging.getLogger(__name__)

#: The v1 controllers containers are put under. The others would cost a migration each and limit nothing.
V1_CONTROLLERS = ("memory", "cpu", "cpuacct", "pids", "freezer", "devices")
V2_CONTROLLERS = ("cpu", "memory", "pids", "io")


class CgroupError(Exception):
    """This machine offers no usable cgroup layout, or a group does not go away."""


@dataclass(frozen=True, slots=True)
class Layout:
    """`v1` maps controller to mount point; `v2` is set only when the unified hierarchy carries the controllers.

    For v2: the controllers it has, and whether the kernel takes programs that decide about devices.
    """

    v1: Mapping[str, str]
    v2: str | None
    controllers: frozenset[str] = frozenset(V2_CONTROLLERS)
    device_programs: bool = True

    @property
    def mount_points(self) -> tuple[str, ...]:
        """Distinct ones: cpu and cpuacct are often one hierarchy."""
        return (self.v2,) if self.v2 else tuple(dict.fromkeys(self.v1.values()))


def layout_from(mountinfo: str) -> Layout:
    """Read the layout out of /proc/self/mountinfo. Raises CgroupError when memory can be limited nowhere."""
    v1: dict[str, str] = {}
    unified = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, (fstype, _, options) = before.split(), after.split(maxsplit=2)
        if fstype == "cgroup":
            for option in options.split(","):
                if option in V1_CONTROLLERS:
                    v1.setdefault(option, fields[4])
        elif fstype == "cgroup2":
            unified = unified or fields[4]
    if "memory" in v1:
        return Layout(v1, None)
    if unified is None:
        raise CgroupError("no cgroup hierarchy with a memory controller is mounted")
    return Layout({}, unified)


def find_layout() -> Layout:
    """Look at this machine. Raises CgroupError when memory can be limited nowhere."""
    layout = layout_from(Path("/proc/self/mountinfo").read_text())
    if layout.v2 is None:
        return layout
    controllers = frozenset(Path(f"{layout.v2}/cgroup.controllers").read_text().split())
    if "memory" not in controllers:
        raise CgroupError(f"{layout.v2} has no memory controller, only {' '.join(sorted(controllers)) or 'none'}")
    return replace(layout, controllers=controllers, device_programs=_takes_device_programs())


def _takes_device_programs() -> bool:
    try:
        os.close(kernel.load_device_program(devices.program(())))
    except OSError as error:
        log.warning("jobs get no device files of their own", extra={"reason": str(error)})
        return False
    return True


@dataclass(frozen=True, slots=True)
class Steps:
    """What init does about cgroups: make `directories`, write `values` (path, text), join by writing 0 to `joins`.

    `optional` are values for files a kernel may not have (swap accounting).

    `views` are (name below /sys/fs/cgroup, directory): what the container sees of them.
    `oom_counter` is the file whose `oom_kill` line counts; `oom_control` the v1 file to register an eventfd with.
    """

    directories: tuple[str, ...]
    values: tuple[tuple[str, str], ...]
    optional: tuple[tuple[str, str], ...]
    joins: tuple[str, ...]
    views: tuple[tuple[str, str], ...]
    oom_counter: str
    oom_control: str | None
    device_rules: bool  # whether the devices allowed are among the values, or decided by the program
    device_program: bytes = b""  # for the first directory; v2 only


def steps_for(spec: ContainerSpec, layout: Layout, root: str) -> Steps:
    below = f"{root}/{spec.partition}/{spec.id}"
    limits = spec.limits
    values: list[tuple[str, str]] = []
    optional: list[tuple[str, str]] = []
    if layout.v2:
        group = f"{layout.v2}/{below}"
        if limits.memory_bytes is not None and "memory" in layout.controllers:
            values.append((f"{group}/memory.max", str(limits.memory_bytes)))
            optional.append((f"{group}/memory.swap.max", "0"))
        if limits.cpu_shares is not None and "cpu" in layout.controllers:
            values.append((f"{group}/cpu.weight", str(weight_from_shares(limits.cpu_shares))))
        if limits.pids is not None and "pids" in layout.controllers:
            values.append((f"{group}/pids.max", str(limits.pids)))
        restricted = layout.device_programs and not devices.unrestricted(spec.devices_allowed)
        return Steps(
            directories=(group,),
            values=tuple(values),
            optional=tuple(optional),
            joins=(f"{group}/cgroup.procs",),
            views=(("", group),),
            oom_counter=f"{group}/memory.events",
            oom_control=None,
            device_rules=layout.device_programs,
            device_program=devices.program(spec.devices_allowed) if restricted else b"",
        )
    groups = {controller: f"{mount}/{below}" for controller, mount in layout.v1.items()}
    if limits.memory_bytes is not None:
        values.append((f"{groups['memory']}/memory.limit_in_bytes", str(limits.memory_bytes)))
        # Memory and swap together: as much as memory alone, so no swap.
        optional.append((f"{groups['memory']}/memory.memsw.limit_in_bytes", str(limits.memory_bytes)))
    if limits.cpu_shares is not None and "cpu" in groups:
        values.append((f"{groups['cpu']}/cpu.shares", str(limits.cpu_shares)))
    if limits.pids is not None and "pids" in groups:
        values.append((f"{groups['pids']}/pids.max", str(limits.pids)))
    if "devices" in groups and not devices.unrestricted(spec.devices_allowed):
        values.append((f"{groups['devices']}/devices.deny", "a"))
        allowed = [device_rule(device) for device in spec.devices_allowed if device.allow]
        values += [(f"{groups['devices']}/devices.allow", rule) for rule in allowed]
    directories = tuple(dict.fromkeys(groups.values()))
    return Steps(
        directories=directories,
        values=tuple(values),
        optional=tuple(optional),
        joins=tuple(f"{directory}/cgroup.procs" for directory in directories),
        views=tuple(groups.items()),
        oom_counter=f"{groups['memory']}/memory.oom_control",
        oom_control=f"{groups['memory']}/cgroup.event_control",
        device_rules="devices" in groups,
    )


def device_rule(device: Device) -> str:
    major, minor = ("*" if number < 0 else str(number) for number in (device.major, device.minor))
    return f"{device.type} {major}:{minor} {device.permissions}"


def weight_from_shares(shares: int) -> int:
    """Map v1 shares (2..262144) to a v2 weight (1..10000), as systemd and runc do."""
    return 1 + (min(max(shares, 2), 262144) - 2) * 9999 // 262142


@dataclass(frozen=True, slots=True)
class Usage:
    memory_bytes: int
    memory_limit_bytes: int | None
    cpu_seconds: float
    processes: int
    oom_kills: int


class CgroupTree:
    """The groups of one node. Blocking calls, each some file operations."""

    def __init__(self, layout: Layout, root: str) -> None:
        self.layout = layout
        self.root = root.strip("/")

    def prepare(self, partitions: Mapping[str, int]) -> None:
        """Make the root and partition groups and set the partitions' cpu shares. Idempotent."""
        for mount in self.layout.mount_points:
            for partition in partitions:
                os.makedirs(f"{mount}/{self.root}/{partition}", exist_ok=True)
        if self.layout.v2:
            self._delegate(partitions)
        for partition, shares in partitions.items():
            if self.layout.v2:
                path, value = f"{self.layout.v2}/{self.root}/{partition}/cpu.weight", weight_from_shares(shares)
            else:
                path, value = f"{self.layout.v1.get('cpu')}/{self.root}/{partition}/cpu.shares", shares
            if os.path.exists(path):
                _write(path, str(value))

    def _delegate(self, partitions: Iterable[str]) -> None:
        """Pass the controllers on, level by level, down to where the containers' groups are made.

        No process may be in a group that does so (the hierarchy's root excepted): ours are only in containers' groups.
        """
        path = self.layout.v2 or ""
        parts = Path(self.root).parts
        levels = [path, *(f"{path}/{'/'.join(parts[: n + 1])}" for n in range(len(parts)))]
        levels += [f"{path}/{self.root}/{partition}" for partition in partitions]
        for level in levels:
            available = Path(f"{level}/cgroup.controllers").read_text().split()
            wanted = " ".join(f"+{controller}" for controller in V2_CONTROLLERS if controller in available)
            if not wanted:
                continue
            try:
                _write(f"{level}/cgroup.subtree_control", wanted)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise CgroupError(f"{level} cannot pass its controllers on: there are processes in it") from error
                raise

    def containers(self) -> Iterator[tuple[str, str]]:
        """(partition, id) of every group below this node's root in any hierarchy."""
        seen = set()
        for mount in self.layout.mount_points:
            for partition in _subgroups(f"{mount}/{self.root}"):
                for container in _subgroups(f"{mount}/{self.root}/{partition}"):
                    if (partition, container) not in seen:
                        seen.add((partition, container))
                        yield partition, container

    def _groups(self, partition: str, container: str) -> list[str]:
        return [f"{mount}/{self.root}/{partition}/{container}" for mount in self.layout.mount_points]

    def pids(self, partition: str, container: str) -> set[int]:
        found: set[int] = set()
        for group in self._groups(partition, container):
            for directory, _, _ in os.walk(group):
                with contextlib.suppress(OSError):
                    found.update(int(pid) for pid in Path(f"{directory}/cgroup.procs").read_text().split())
        return found

    def kill(self, partition: str, container: str) -> None:
        """SIGKILL everything in the group. Frozen meanwhile, so that nothing forks away. Does not wait."""
        if self.layout.v2:
            with contextlib.suppress(OSError):  # Linux before 5.14 has no such file
                return _write(f"{self.layout.v2}/{self.root}/{partition}/{container}/cgroup.kill", "1")
        self._set_freezer(partition, container, "FROZEN")
        try:
            for pid in self.pids(partition, container):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        finally:
            self.thaw(partition, container)
        return None

    def thaw(self, partition: str, container: str) -> None:
        """For a group of an earlier daemon, which may have died within `kill`."""
        self._set_freezer(partition, container, "THAWED")

    def _set_freezer(self, partition: str, container: str, state: str) -> None:
        if self.layout.v2:
            with contextlib.suppress(OSError):
                group = f"{self.layout.v2}/{self.root}/{partition}/{container}"
                _write(f"{group}/cgroup.freeze", "1" if state == "FROZEN" else "0")
        freezer = self.layout.v1.get("freezer")
        if freezer:
            with contextlib.suppress(OSError):
                _write(f"{freezer}/{self.root}/{partition}/{container}/freezer.state", state)

    def remove(self, partition: str, container: str, within: float = 10.0) -> None:
        """Kill what is left and remove the groups, nested ones too. Idempotent.

        Raises CgroupError when something in them does not die in time (a process stuck in the kernel).
        """
        deadline = time.monotonic() + within
        pause = 0.001
        while not self._try_remove(partition, container):
            if time.monotonic() > deadline:
                raise CgroupError(f"cgroup {partition}/{container} does not get empty")
            self.kill(partition, container)
            time.sleep(pause)
            pause = min(pause * 2, 0.1)

    def _try_remove(self, partition: str, container: str) -> bool:
        for group in self._groups(partition, container):
            for directory, _, _ in os.walk(group, topdown=False):
                try:
                    os.rmdir(directory)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
                        return False
                    raise
        return True

    def remove_all(self) -> None:
        """Remove the node's whole tree with everything in it (end of a test, uninstall)."""
        for partition, container in list(self.containers()):
            self.remove(partition, container)
        for mount in self.layout.mount_points:
            for partition in _subgroups(f"{mount}/{self.root}"):
                os.rmdir(f"{mount}/{self.root}/{partition}")
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(f"{mount}/{self.root}")

    def usage(self, partition: str, container: str) -> Usage:
        """Zeros for what cannot be read."""
        below = f"{self.root}/{partition}/{container}"
        if self.layout.v2:
            group = f"{self.layout.v2}/{below}"
            return Usage(
                _number(f"{group}/memory.current"),
                _number(f"{group}/memory.max") or None,
                _keyed(f"{group}/cpu.stat", "usage_usec") / 1e6,
                _number(f"{group}/pids.current"),
                _keyed(f"{group}/memory.events", "oom_kill"),
            )
        groups = {controller: f"{mount}/{below}" for controller, mount in self.layout.v1.items()}
        limit = _number(f"{groups['memory']}/memory.limit_in_bytes")
        return Usage(
            _number(f"{groups['memory']}/memory.usage_in_bytes"),
            limit if 0 < limit < 1 << 62 else None,
            _number(f"{groups.get('cpuacct')}/cpuacct.usage") / 1e9,
            _number(f"{groups.get('pids')}/pids.current"),
            _keyed(f"{groups['memory']}/memory.oom_control", "oom_kill"),
        )


def _subgroups(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _number(path: str) -> int:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # gone, or "max"
        return 0


def _keyed(path: str, key: str) -> int:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)
