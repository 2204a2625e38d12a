"""What a job sees: ports, environment, host name. spec/host.md section 7."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flynn.host.runtime.spec import DEFAULT_PATH
from flynn.types.codec import replace
from flynn.types.host import HostJob
from flynn.types.release import Port

FIRST_PORT, LAST_PORT = 5000, 65535
MAX_HOSTNAME = 64  # the kernel's limit
IDENTITY_DIRECTORY = "/run/flynn/identity"


class UnknownProto(Exception):
    """A port names a protocol other than tcp and udp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What every job of a host is told about it."""

    host_id: str
    external_ip: str
    listen_ip: str = ""


def with_ports(job: HostJob, taken: Collection[int] = ()) -> HostJob:
    """Give every port 0 its number (5000 + position) and put `PORT`, `PORT_0` ... into the environment.

    `taken` are ports of the network the job will be in; the next that is free takes the place of such a one.
    """
    ports: list[Port] = []
    used = {*taken, *(port.port for port in job.config.ports)}
    env = dict(job.config.env)
    for position, port in enumerate(job.config.ports):
        if port.proto not in ("tcp", "udp", ""):
            raise UnknownProto(f'unknown port proto "{port.proto}"')
        number = port.port or next(n for n in range(FIRST_PORT + position, LAST_PORT + 1) if n not in used)
        used.add(number)
        ports.append(replace(port, port=number, proto=port.proto or "tcp"))
        env[f"PORT_{position}"] = str(number)
    if ports:
        env["PORT"] = str(ports[0].port)
    return replace(job, config=replace(job.config, ports=ports, env=env))


def with_address(job: HostJob, ip: str) -> HostJob:
    """Tell a job with a network of its own that this address is how it is reached."""
    return replace(job, config=replace(job.config, env={**job.config.env, "EXTERNAL_IP": ip}))


def hostname(job_id: str) -> str:
    """Return the job id behind its host's name, as far as the kernel takes it."""
    return (job_id.partition("-")[2] or job_id)[:MAX_HOSTNAME]


def is_system_app(job: HostJob) -> bool:
    """Tell whether a job belongs to the platform and gets a certificate. Only trusted callers can set the metadata."""
    return job.metadata.get("flynn-system-app") == "true"


def process_environment(job: HostJob, facts: HostFacts, discoverd: str | None) -> Mapping[str, str]:
    """Return the complete environment of the job's process; later entries win."""
    env = {"PATH": DEFAULT_PATH, "TERM": "xterm", "HOME": "/"}
    env |= {"EXTERNAL_IP": facts.external_ip, "LISTEN_IP": facts.listen_ip}
    if discoverd:
        env["DISCOVERD"] = discoverd
    if is_system_app(job):
        env |= {
            "FLYNN_HOST_IP": facts.external_ip,
            "FLYNN_HOST_ID": facts.host_id,
            "FLYNN_IDENTITY": IDENTITY_DIRECTORY,
        }
    env |= job.config.env
    env |= {"HOSTNAME": hostname(job.id), "container": ""}
    return env
