"""What a container is to be: plain values, decided by the daemon, carried out by init.

Not here: defaults that depend on job or host (profiles, partitions, resource defaults). The caller fills those in.
The spec is kept as `spec.json` in the container's directory, so that a later daemon can take the container over.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

DEFAULT_CAPABILITIES: tuple[str, ...] = (
    "NET_RAW",
    "NET_BIND_SERVICE",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "DAC_OVERRIDE",
    "SETFCAP",
    "SETPCAP",
    "SETGID",
    "SETUID",
    "MKNOD",
    "CHOWN",
    "FOWNER",
    "FSETID",
    "KILL",
    "SYS_CHROOT",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device to create in /dev, to allow, or both. `major` and `minor` -1 mean any; an empty `path` only allows."""

    type: str  # "c" or "b"; "a" in an allow list means everything
    major: int
    minor: int
    path: str = ""
    permissions: str = "rwm"
    mode: int = 0o666
    uid: int = 0
    gid: int = 0
    allow: bool = True


def _char(major: int, minor: int, path: str = "", permissions: str = "rwm") -> Device:
    return Device(type="c", major=major, minor=minor, path=path, permissions=permissions)


#: Allowed and created alike; those without a path are only allowed. Not 5:1: a job could type at the machine's console.
DEFAULT_DEVICES: tuple[Device, ...] = (
    _char(-1, -1, permissions="m"),
    Device(type="b", major=-1, minor=-1, permissions="m"),
    _char(136, -1),
    _char(5, 2),
    _char(10, 200),
    _char(1, 3, "/dev/null"),
    _char(1, 5, "/dev/zero"),
    _char(1, 7, "/dev/full"),
    _char(5, 0, "/dev/tty"),
    _char(1, 9, "/dev/urandom"),
    _char(1, 8, "/dev/random"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RootFS:
    """An overlay. `lower` are mounted directories, the bottom layer first (the order of mountspecs).

    `writable` is a directory on a file system that can carry an overlay upper; init makes `upper` and `work` below it.
    It must not be used by another container. None gives a read-only root.
    """

    lower: tuple[str, ...]
    writable: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One more mount. Without `fstype` it binds the host path `source` (a file or a directory) to `target`.

    `target` is a path in the container; missing directories (or the missing file) are created in the write layer.
    `options` is the data string of a file system mount, `flags` its MS_* bits. Binds are recursive.
    """

    target: str
    source: str
    writable: bool = False
    fstype: str = ""
    options: str = ""
    flags: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A veth pair: `eth0` with this address inside, an end on `bridge` outside."""

    bridge: str
    address: str  # IPv4, without prefix
    prefix: int
    gateway: str
    mtu: int = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """None means: the kernel's default. Pairs are (soft, hard)."""

    memory_bytes: int | None = None
    cpu_shares: int | None = None  # v1 scale, 2..262144, 1024 is one ordinary share; converted to weights on v2
    pids: int | None = None
    fds: tuple[int, int] | None = None
    processes: tuple[int, int] | None = None  # RLIMIT_NPROC: counts the uid's processes, not the container's


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """Everything init needs. Decided once; nothing in it changes while the container lives."""

    id: str  # the job id; names the cgroup; no slash
    directory: str  # absolute, the container's own: socket, spec.json, exit status; created when missing
    args: tuple[str, ...]
    rootfs: RootFS
    hostname: str = ""  # set in the UTS namespace only with a network of its own
    env: Mapping[str, str] = field(default_factory=dict)  # complete: init adds nothing
    cwd: str = "/"
    uid: int | None = None
    gid: int | None = None
    tty: bool = False
    window: tuple[int, int] = (0, 0)  # rows, columns of the pty at start
    stdin: bool = False  # without it fd 0 is /dev/null
    mounts: tuple[Mount, ...] = ()
    network: Network | None = None  # None: the network namespace of the daemon ("host network")
    resolv_conf: str | None = None  # bound read-only over /etc/resolv.conf from <directory>/resolv.conf
    hosts: str | None = None  # written to /etc/hosts in the write layer
    capabilities: tuple[str, ...] = DEFAULT_CAPABILITIES  # without CAP_; applied to all five sets
    devices_allowed: tuple[Device, ...] = DEFAULT_DEVICES
    devices_created: tuple[Device, ...] = DEFAULT_DEVICES
    partition: str = "user"  # the cgroup is <runtime's cgroup root>/<partition>/<id>
    limits: Limits = Limits()
    host_pid_namespace: bool = False
    writeable_cgroups: bool = False
    no_new_privileges: bool = True
    seccomp: bool = True
    shm_bytes: int = 64 << 20


SPEC_FILE = "spec.json"
OLDEST_PROTOCOL = 1  # of inits whose spec does not say: made before it was written down


def to_json(spec: ContainerSpec, protocol: int) -> str:
    """Write a spec down, with the protocol its init speaks (see `init`)."""
    return json.dumps({**dataclasses.asdict(spec), "protocol": protocol})


def protocol_of(text: str) -> int:
    """Return the protocol of the init of a container."""
    return int(json.loads(text).get("protocol", OLDEST_PROTOCOL))


def from_json(text: str) -> ContainerSpec:
    """Read what `to_json` wrote, now, earlier or later: unknown keys are dropped, missing ones have their defaults.

    Raises ValueError, KeyError or TypeError when what every version has is not there.
    """
    values = _known(ContainerSpec, json.loads(text))
    root, network = values["rootfs"], values.get("network")
    limits: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in _known(Limits, values.get("limits", {})).items()
    }
    values["rootfs"] = RootFS(lower=tuple(root["lower"]), writable=root.get("writable"))
    values["limits"] = Limits(**limits)
    values["network"] = Network(**_known(Network, network)) if network else None
    values["mounts"] = tuple(Mount(**_known(Mount, mount)) for mount in values.get("mounts", ()))
    for name in ("devices_allowed", "devices_created"):
        if name in values:
            values[name] = tuple(Device(**_known(Device, device)) for device in values[name])
    for name in ("args", "capabilities", "window"):
        if name in values:
            values[name] = tuple(values[name])
    return ContainerSpec(**values)


def _known(kind: type[Any], raw: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {key: value for key, value in raw.items() if key in names}
