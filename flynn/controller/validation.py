"""What a client may send: the checks of spec/controller section 6 that go beyond the types. Pure.

The message texts are the original's, because its clients and their tests compare some of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from flynn.types.app import Strategy
from flynn.types.codec import replace
from flynn.types.errors import ValidationError
from flynn.types.formation import Processes, ScaleState
from flynn.types.job import JobState
from flynn.types.release import Port, ProcessType, Release, VolumeReq
from flynn.types.resources import with_defaults

NAME_PATTERN = r"^[a-z0-9]+(-[a-z0-9]+)*$"
_NAME = re.compile(NAME_PATTERN.strip("^$"), re.ASCII)
MAX_NAME_LENGTH = 100
MAX_PROCESSES = 10_000  # of one type; nobody means more, and a typing error should not reach the scheduler

ARTIFACT_TYPES = ("docker", "file", "flynn")
PARTITIONS = ("background", "system", "user")
SMALLEST_VOLUME, LARGEST_VOLUME = 1 << 20, (1 << 63) - 1
PROTOCOLS = ("tcp", "udp")
VOLUME_TYPES = ("data", "squashfs", "ext2")
VOLUME_STATES = ("pending", "created", "destroyed")
SINK_KINDS = ("syslog",)
ROUTE_TYPES = ("http", "tcp")


def one_of(field: str, value: str, allowed: Iterable[str]) -> None:
    """Raise `ValidationError` unless `value` is one of `allowed`."""
    names = list(allowed)
    if value not in names:
        listed = " ".join(names)
        raise ValidationError(field, f"Enum error. The data must be equal to one of these values [{listed}].")


def required(key: str, value: object) -> None:
    """Raise `ValidationError` if `value` is empty."""
    if not value:
        raise ValidationError("", f'Required error. The data must be an object with "{key}" as one of its keys')


def known_keys(document: Mapping[str, object], allowed: Iterable[str]) -> None:
    """Raise `ValidationError` for the first key that is not in `allowed`."""
    unknown = sorted(set(document) - set(allowed))
    if unknown:
        raise ValidationError("", f'Additional properties aren\'t allowed, found "{unknown[0]}" as one of its keys')


def app_name(name: str) -> None:
    """Raise `ValidationError` unless `name` can be an app's."""
    if len(name) > MAX_NAME_LENGTH:
        raise ValidationError("name", f"String must not be longer than {MAX_NAME_LENGTH} characters.")
    if not _NAME.fullmatch(name):
        raise ValidationError("name", f'String must match the pattern: "{NAME_PATTERN}".')


def strategy(name: str) -> None:
    """Raise `ValidationError` unless `name` is a deployment strategy's."""
    one_of("strategy", name, list(Strategy))


def deploy_timeout(seconds: int) -> None:
    """Raise `ValidationError` for a limit that no deployment can meet."""
    if not 0 < seconds <= 86_400:
        raise ValidationError("deploy_timeout", "must be between 1 and 86400 seconds")


def job_state(state: str) -> None:
    """Raise `ValidationError` unless `state` is a job's."""
    one_of("state", state, list(JobState))


def scale_state(state: str) -> None:
    """Raise `ValidationError` unless `state` is a scale request's."""
    required("state", state)
    one_of("state", state, list(ScaleState))


def uri(field: str, value: str) -> None:
    """Raise `ValidationError` unless `value` is an absolute URI or an absolute path."""
    try:
        absolute = bool(urlsplit(value).scheme) or value.startswith("/")
    except ValueError:
        absolute = False
    if not absolute:
        raise ValidationError(field, "Value must be a valid URI, according to RFC3986.")


def counts(processes: Processes | None) -> None:
    """Raise `ValidationError` for counts that cannot be meant."""
    for name, count in (processes or {}).items():
        if not 0 <= count <= MAX_PROCESSES:
            raise ValidationError(
                "processes", f"the count of {name} must be between 0 and {MAX_PROCESSES}, not {count}"
            )


def types_of_release(wanted: Iterable[str], release: Release) -> None:
    """Raise `ValidationError` if `wanted` names process types that the release does not have."""
    missing = sorted(set(wanted) - set(release.processes))
    if missing:
        names = ", ".join(missing)
        text = f"requested scale includes process types that do not exist in the release: {names}"
        raise ValidationError("", text)


def normalized_release(release: Release) -> Release:
    """Return a release as it is stored: checked, legacy keys translated, resource limits filled in."""
    environment(release.env)
    artifacts = release.artifacts or ([release.artifact] if release.artifact else [])
    if len(set(artifacts)) != len(artifacts):
        raise ValidationError("artifacts", "must not name an artifact twice")
    processes = {name: _normalized_process(name, process) for name, process in release.processes.items()}
    return replace(release, artifacts=artifacts, processes=processes)


def environment(env: Mapping[str, str]) -> None:
    """Raise `ValidationError` for variables that no process could be given."""
    for name, value in env.items():
        if not name:
            raise ValidationError("env", f'you can\'t create an env var with an empty key (tried to set ""="{value}")')
        if "=" in name or "\0" in name or "\0" in value:
            raise ValidationError("env", f"{name!r} cannot be an environment variable")


def _normalized_process(name: str, process: ProcessType) -> ProcessType:
    if not name or "/" in name or len(name) > MAX_NAME_LENGTH:
        raise ValidationError("processes", f"{name!r} cannot be the name of a process type")
    environment(process.env)
    for port in process.ports:
        _port(name, port)
    args = [*(process.entrypoint or process.args), *process.cmd]
    if process.data and not process.volumes:
        process = replace(process, volumes=[VolumeReq(path="/data")], data=False)
    for volume in process.volumes:
        if not volume.path.startswith("/"):
            raise ValidationError("processes", f"the volume path {volume.path!r} of {name} must be absolute")
        if volume.size and not SMALLEST_VOLUME <= volume.size <= LARGEST_VOLUME:
            raise ValidationError("processes", f"the volume {volume.path} of {name} cannot hold {volume.size} bytes")
    return replace(process, args=args, resources=with_defaults(process.resources))


def _port(name: str, port: Port) -> None:
    if not 0 <= port.port <= 65535:
        raise ValidationError("processes", f"{name} has a port {port.port}; ports go from 1 to 65535, 0 means any")
    if port.proto not in PROTOCOLS:
        raise ValidationError("processes", f"{name} has a port with protocol {port.proto!r} instead of tcp or udp")
