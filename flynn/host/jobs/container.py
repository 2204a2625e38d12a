"""From a job to the container it runs in: limits, mounts, devices, capabilities. Pure. spec/host sections 7, 10."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flynn.host.jobs.environment import IDENTITY_DIRECTORY, HostFacts, hostname, process_environment
from flynn.host.jobs.profiles import Extras
from flynn.host.runtime.spec import (
    DEFAULT_CAPABILITIES,
    DEFAULT_DEVICES,
    ContainerSpec,
    Device,
    Limits,
    Mount,
    Network,
    RootFS,
)
from flynn.types import release
from flynn.types.host import HostJob
from flynn.types.resources import MIB, Limit, Resources

DEFAULT_MEMORY_BYTES = 1024 * MIB
DEFAULT_SCRATCH_BYTES = 100 * MIB
DEFAULT_PIDS = 4096  # nothing honest needs more, and a fork bomb must not take the node down
INITS_OWN = 1  # the container's init counts, too
SMALLEST_SHARES = 2


class BadMount(Exception):
    """A job's mount cannot be made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the steps before the container have made."""

    directory: Path
    lower: Sequence[Path]
    writable: Path
    network: Network | None
    volumes: Mapping[str, Path]  # by volume id
    read_only: Collection[str] = ()  # ids of the volumes that nobody may write to: snapshots
    identity: Path | None
    resolv_conf: str
    discoverd: str | None
    window: tuple[int, int] = (0, 0)


def container_spec(job: HostJob, partition: str, facts: HostFacts, extras: Extras, made: Prepared) -> ContainerSpec:
    """Return the complete container of a job."""
    config = job.config
    name = hostname(job.id)
    return ContainerSpec(
        id=job.id,
        directory=str(made.directory),
        args=tuple(config.args),
        rootfs=RootFS(lower=tuple(str(path) for path in made.lower), writable=str(made.writable)),
        hostname=name,
        env=process_environment(job, facts, made.discoverd),
        cwd=config.working_dir or "/",
        uid=config.uid,
        gid=config.gid,
        tty=config.tty,
        window=made.window,
        stdin=config.stdin,
        mounts=(*_mounts(job, made), *extras.mounts),
        network=made.network,
        resolv_conf=made.resolv_conf or None,
        hosts=f"127.0.0.1 localhost {name}\n",
        capabilities=(*_capabilities(job), *extras.capabilities),
        devices_allowed=(*_devices(config.allowed_devices), *extras.devices),
        devices_created=(*_devices(config.auto_created_devices), *extras.devices),
        partition=partition,
        limits=limits(job.resources),
        host_pid_namespace=config.host_pid_namespace,
        writeable_cgroups=config.writeable_cgroups,
    )


def limits(resources: Resources) -> Limits:
    """Return the limits of a container; memory and processes are never unlimited.

    `max_procs` limits the container by its cgroup. As RLIMIT_NPROC it would count all processes of the uid on the whole
    machine: three containers of the same user would have to share one limit.
    """
    cpu, processes = _limit(resources, "cpu"), _limit(resources, "max_procs")
    return Limits(
        memory_bytes=memory_bytes(resources),
        cpu_shares=None if cpu is None else max(SMALLEST_SHARES, cpu * 1024 // 1000),
        pids=DEFAULT_PIDS if processes is None else processes + INITS_OWN,
        fds=_pair(resources, "max_fd"),
    )


def memory_bytes(resources: Resources) -> int:
    """Return the memory limit."""
    wanted = _limit(resources, "memory")
    return DEFAULT_MEMORY_BYTES if wanted is None else wanted


def scratch_bytes(resources: Resources) -> int:
    """Return the size of the write layer."""
    wanted = _limit(resources, "temp_disk")
    return DEFAULT_SCRATCH_BYTES if wanted is None else wanted


def _limit(resources: Resources, name: str) -> int | None:
    return resources.get(name, Limit()).limit


def _pair(resources: Resources, name: str) -> tuple[int, int] | None:
    item = resources.get(name, Limit())
    if item.limit is None:
        return None
    soft = item.limit if item.request is None else min(item.request, item.limit)
    return soft, item.limit


def _capabilities(job: HostJob) -> tuple[str, ...]:
    given = job.config.linux_capabilities
    if given is not None:
        return tuple(name.removeprefix("CAP_") for name in given)
    return (*DEFAULT_CAPABILITIES, "NET_ADMIN") if job.config.host_network else DEFAULT_CAPABILITIES


def _devices(given: list[release.Device] | None) -> tuple[Device, ...]:
    if given is None:
        return DEFAULT_DEVICES
    return tuple(
        Device(
            type=chr(device.type),
            major=device.major,
            minor=device.minor,
            path=device.path,
            permissions=device.permissions or "rwm",
            mode=device.file_mode or 0o666,
            uid=device.uid,
            gid=device.gid,
            allow=device.allow,
        )
        for device in given
    )


def _mounts(job: HostJob, made: Prepared) -> list[Mount]:
    mounts: list[Mount] = []
    for mount in job.config.mounts:
        if not mount.target:
            raise BadMount("host: invalid empty mount target")
        mounts.append(
            Mount(
                target=mount.location,
                source=mount.target,
                writable=mount.writeable,
                fstype=mount.device,
                options=mount.data,
                flags=mount.flags,
            )
        )
    for binding in job.config.volumes:
        writable = binding.writeable and binding.volume not in made.read_only
        mounts.append(Mount(target=binding.target, source=str(made.volumes[binding.volume]), writable=writable))
    if made.identity is not None:
        mounts.append(Mount(target=IDENTITY_DIRECTORY, source=str(made.identity)))
    return mounts
