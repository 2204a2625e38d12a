"""Which services make up a healthy cluster, whom to ask, what the answers add up to. Pure. See spec/bootstrap 13."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from flynn.types.instance import Instance
from flynn.types.status import Health, Status


class Ask(Enum):
    ANY = "any instance"
    LEADER = "the leader"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the status page. `port` None is the registered one, a name is looked up in the metadata first."""

    name: str
    service: str
    ask: Ask = Ask.ANY
    port: int | None = None
    port_meta: str = ""
    optional: bool = False  # may be absent, and does not count
    with_key: bool = False  # wants the controller key

    def address(self, instance: Instance) -> str:
        port = instance.meta.get(self.port_meta) if self.port_meta else None
        return f"{instance.addr.rpartition(':')[0]}:{port or self.port or instance.port}"


CHECKS = (
    Check("blobstore", "blobstore"),
    Check("controller", "controller", with_key=True),
    Check("controller-scheduler", "controller-scheduler", Ask.LEADER),
    Check("controller-worker", "controller-worker"),
    Check("discoverd", "discoverd"),
    Check("flannel", "flannel"),
    Check("gitreceive", "gitreceive"),
    Check("logaggregator", "logaggregator", Ask.LEADER, port=80, port_meta="API_PORT"),
    Check("mariadb", "mariadb", Ask.LEADER, port=3307, optional=True),
    Check("mongodb", "mongodb", Ask.LEADER, port=27018, optional=True),
    Check("postgres", "postgres", Ask.LEADER, port=5433),
    Check("router", "router-api"),
    Check("tarreceive", "tarreceive", optional=True),
)

UNKNOWN = Status(status=Health.UNHEALTHY.value, version="")
"""What a service is that gave no usable answer."""


def summary(answers: Mapping[str, Status], version: str, checks: tuple[Check, ...] = CHECKS) -> Status:
    """The cluster's status: healthy if everything that is not optional is."""
    healthy = all(answers.get(check.name, UNKNOWN).healthy for check in checks if not check.optional)
    return Status(
        status=Health.HEALTHY.value if healthy else Health.UNHEALTHY.value,
        detail={name: _entry(status) for name, status in sorted(answers.items())},
        version=version,
    )


def _entry(status: Status) -> dict[str, object]:
    entry: dict[str, object] = {"status": status.status or Health.UNHEALTHY.value}
    if status.detail is not None:
        entry["detail"] = status.detail
    if status.version:
        entry["version"] = status.version
    return entry


_FREE = tuple(
    ipaddress.ip_network(text)
    for text in (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "127.0.0.0/8",
        "fd00::/8",
        "::1/128",
        "192.0.2.0/24",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "100.64.0.0/10",
    )
)


def is_free(address: str) -> bool:
    """Whether a client at this address may look without a key: private, shared and documentation networks."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return any(parsed in network for network in _FREE)
