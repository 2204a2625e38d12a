"""Whether a job may be added: the checks that answer the caller at once. Other mistakes show as an `error` event."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from flynn.types.app import HANDS_OVER, SYSTEM_APP
from flynn.types.errors import Conflict, ValidationError
from flynn.types.host import META_APP, ActiveJob, HostJob

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # it names a directory, a cgroup, and in part the job's machine
MAX_USER = (1 << 32) - 2  # the last number means "leave it as it is"
MAX_LIMIT = (1 << 63) - 1
DEVICE_TYPES = (ord("a"), ord("b"), ord("c"))


def check(job: HostJob, jobs: Mapping[str, ActiveJob]) -> None:
    """Refuse a job without layers, with a taken id, or with volumes that another job uses.

    A volume belongs to one starting or running job at a time: two writers on one file system ruin databases. Except
    that jobs of the platform that agree on who writes share it with their successor, see `hands_over`.
    """
    if not job.mountspecs:
        raise ValidationError("mountspecs", "must be set")
    check_values(job)
    if job.id in jobs:
        raise Conflict("job already exists")
    others = (other for other in jobs.values() if not hands_over(other.job, job))
    taken = volumes_in_use(others) & {binding.volume for binding in job.config.volumes}
    if taken:
        raise Conflict(f"volumes in use: {', '.join(sorted(taken))}")


def hands_over(holder: HostJob, successor: HostJob) -> bool:
    """Tell whether a job gives way to another one of the same app while both run."""
    ours = (META_APP, SYSTEM_APP, HANDS_OVER)
    one, other = ([job.metadata.get(key, "") for key in ours] for job in (holder, successor))
    return one == other and bool(one[0]) and one[1:] == ["true", "true"]


def check_values(job: HostJob) -> None:
    """Refuse values no kernel takes, before anything is made for the job. Raises `ValidationError` naming the first.

    What a job asks for and this host has not (partitions, profiles, volumes) is not checked here: that fails the job.
    """
    config = job.config
    if ID.fullmatch(job.id) is None:
        raise ValidationError("id", "must be a plain name of up to 200 letters, digits, dots, dashes and underscores")
    for name, limit in job.resources.items():
        for field, number in (("request", limit.request), ("limit", limit.limit)):
            if number is not None and not 0 <= number <= MAX_LIMIT:
                raise ValidationError(f"resources.{name}.{field}", f"cannot be {number}")
    for position, port in enumerate(config.ports):
        if not 0 <= port.port <= 65535:
            raise ValidationError(f"config.ports[{position}].port", f"cannot be {port.port}")
    for field, number in (("uid", config.uid), ("gid", config.gid)):
        if number is not None and not 0 <= number <= MAX_USER:
            raise ValidationError(f"config.{field}", f"cannot be {number}")
    for name in config.env:
        if not name or "=" in name:
            raise ValidationError("config.env", f"cannot have a variable called {name!r}")
    for field, devices in (
        ("allowed_devices", config.allowed_devices or []), ("auto_created_devices", config.auto_created_devices or []),
    ):  # fmt: skip
        for position, device in enumerate(devices):
            where = f"config.{field}[{position}]"
            if device.type not in DEVICE_TYPES:
                raise ValidationError(
                    f"{where}.type", f"must be 97 (all), 98 (block) or 99 (character), not {device.type}"
                )
            if not all(-1 <= number < 1 << 20 for number in (device.major, device.minor)):
                raise ValidationError(f"{where}.major", "and minor must be numbers of a device, or -1")
            if not 0 <= device.file_mode <= 0o7777:
                raise ValidationError(f"{where}.file_mode", f"cannot be {device.file_mode}")
            if not all(0 <= owner <= MAX_USER for owner in (device.uid, device.gid)):
                raise ValidationError(f"{where}.uid", "and gid must be ids of a user and a group")
    for position, mount in enumerate(config.mounts):
        if not 0 <= mount.flags < 1 << 32:
            raise ValidationError(f"config.mounts[{position}].flags", f"cannot be {mount.flags}")
    for field, text in _texts(job):
        if "\0" in text:
            raise ValidationError(field, "contains a NUL")


def _texts(job: HostJob) -> Iterator[tuple[str, str]]:
    """All that ends up as a C string, with the name of its field."""
    config = job.config
    yield from ((f"config.args[{position}]", text) for position, text in enumerate(config.args))
    yield from (("config.env", text) for item in config.env.items() for text in item)
    yield "config.working_dir", config.working_dir
    for position, mount in enumerate(config.mounts):
        for field, text in (
            ("location", mount.location), ("target", mount.target), ("device", mount.device), ("data", mount.data),
        ):  # fmt: skip
            yield f"config.mounts[{position}].{field}", text
    for position, binding in enumerate(config.volumes):
        yield f"config.volumes[{position}].target", binding.target
    for field, devices in (
        ("allowed_devices", config.allowed_devices),
        ("auto_created_devices", config.auto_created_devices),
    ):
        yield from ((f"config.{field}[{at}].path", device.path) for at, device in enumerate(devices or []))
    for position, spec in enumerate(job.mountspecs):
        yield f"mountspecs[{position}].id", spec.id
        yield f"mountspecs[{position}].url", spec.url
    yield from (("metadata", text) for item in job.metadata.items() for text in item)


def volumes_in_use(jobs: Iterable[ActiveJob]) -> set[str]:
    """Return the ids of the volumes bound by jobs that are not down."""
    return {b.volume for job in jobs if not job.status.down for b in job.job.config.volumes}
