"""What the daemon hands to the zygote: the spec, worked out so far that init only carries out.

A file of its own (marshal of plain values) because init can afford neither dataclasses nor json. It is read once, by
the same interpreter that wrote it, so the format need not last.
"""

from __future__ import annotations

import marshal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FILE = "plan"


class Plan:
    """Fields as in ContainerSpec unless said otherwise. Lists and tuples of plain values only."""

    directory: str
    args: list[str]
    env: dict[str, str]
    cwd: str
    hostname: str
    uid: int | None
    gid: int | None
    tty: bool
    window: tuple[int, int]
    stdin: bool
    lower: list[str]  # the top layer first
    writable: str | None
    mounts: list[tuple[str, str, bool, str, str, int]]  # target, source, writable, fstype, options, flags
    network: tuple[str, str, bytes, str, int, str, int] | None  # port, bridge, mac, address, prefix, gateway, mtu
    resolv_conf: bool  # there is a file of that name in `directory`
    hosts: str | None
    capabilities: int  # mask
    nodev: bool  # device files in the root file system are dead: nothing else keeps a job off the host's disks
    devices: list[tuple[str, bool, int, int, int, int, int]]  # path, block?, major, minor, mode, uid, gid
    cgroup_directories: list[str]
    cgroup_values: list[tuple[str, str]]
    cgroup_optional: list[tuple[str, str]]  # as values, for files that may be missing
    cgroup_devices: bytes  # a program for the first directory; empty for none
    cgroup_joins: list[str]
    cgroup_views: list[tuple[str, str]]
    cgroups_writable: bool
    oom_counter: str
    oom_control: str | None
    fds: tuple[int, int] | None
    processes: tuple[int, int] | None
    host_pid_namespace: bool
    no_new_privileges: bool
    seccomp: bytes  # the BPF program, empty for none
    shm_bytes: int

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


def dumps(plan: Plan) -> bytes:
    return marshal.dumps(plan.__dict__)


def load(path: str) -> Plan:
    with open(path, "rb") as file:
        return Plan(marshal.load(file))
