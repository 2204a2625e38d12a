"""The network state in discoverd: what the metadata of the service `flannel` holds. Pure.

    {"config": {"Network": "100.100.0.0/16", "Backend": {"Type": "vxlan"}},
     "subnets": {"100.100.53.0-24": {"PublicIP": "10.9.0.1", "HTTPPort": "5002", "BackendType": "vxlan",
                                     "BackendData": {"VtepMAC": "16:4c:88:29:c0:5b"},
                                     "HostID": "host0", "RenewedAt": "2026-01-01T00:00:00Z"}}}

`HostID` and `RenewedAt` are ours; old readers skip them. Whatever we do not know, at the top or in a lease, survives
our writes: the document is carried along as plain data and only the parts we own are changed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network
from typing import Any

Document = Mapping[str, Any]

DEFAULT_NETWORK = IPv4Network("100.100.0.0/16")


class InvalidNetwork(ValueError):
    """The network configuration in discoverd, or the one proposed for it, makes no sense."""


class BackendType(StrEnum):
    """How packets get to another machine's containers."""

    VXLAN = "vxlan"
    HOST_GW = "host-gw"  # plain routes: all machines share a layer-2 segment
    ALLOC = "alloc"  # not our business: whoever runs the machines connects the bridges


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """The cluster-wide configuration: one network, cut into one block per machine."""

    network: IPv4Network
    subnet_len: int
    first: IPv4Address  # network address of the first block that may be given out
    last: IPv4Address  # and of the last
    backend: BackendType
    vni: int = 1
    port: int = 8472  # what Linux chose before there was a standard (4789); old clusters speak it


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One machine's block."""

    subnet: IPv4Network
    public_ip: str
    http_port: str = ""
    backend: str = ""
    vtep_mac: str = ""
    host_id: str = ""
    renewed_at: datetime | None = None

    @property
    def key(self) -> str:
        return f"{self.subnet.network_address}-{self.subnet.prefixlen}"

    def written_over(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes of this lease, with those it does not know kept from `attributes`."""
        ours = {
            "PublicIP": self.public_ip,
            "HTTPPort": self.http_port,
            "BackendType": self.backend,
            "BackendData": {"VtepMAC": self.vtep_mac} if self.vtep_mac else None,
            "HostID": self.host_id,
            "RenewedAt": self.renewed_at.isoformat().replace("+00:00", "Z") if self.renewed_at else None,
        }
        return {**attributes, **{key: value for key, value in ours.items() if value}}


def proposal(
    network: IPv4Network,
    backend: BackendType,
    *,
    subnet_min: str = "",
    subnet_max: str = "",
    subnet_len: int = 0,
    vni: int = 0,
    port: int = 0,
) -> dict[str, Any]:
    """The configuration the first machine of a cluster writes; what is zero or empty is left out."""
    optional = {"SubnetLen": subnet_len, "SubnetMin": subnet_min, "SubnetMax": subnet_max}
    numbers = {"VNI": vni, "Port": port}
    return {
        "Network": str(network),
        **{key: value for key, value in optional.items() if value},
        "Backend": {"Type": backend.value, **{key: value for key, value in numbers.items() if value}},
    }


def overlay_of(document: Document) -> Overlay:
    """Raises InvalidNetwork."""
    config = _folded(document.get("config"))
    if "network" not in config:
        raise InvalidNetwork("the network state has no Network")
    try:
        network = IPv4Network(str(config["network"]), strict=False)
        subnet_len = int(config.get("subnetlen") or (24 if network.prefixlen < 24 else network.prefixlen + 1))
        if not network.prefixlen <= subnet_len < 31:
            raise InvalidNetwork(f"SubnetLen {subnet_len} does not fit into {network}")
        size = 1 << (32 - subnet_len)
        first = IPv4Address(config.get("subnetmin") or int(network.network_address) + size)
        last = IPv4Address(config.get("subnetmax") or int(network.broadcast_address) + 1 - size)
        backend = _folded(config.get("backend") or {"Type": "vxlan"})
        kind = BackendType(str(backend.get("type", "")).lower())
        vni, port = int(backend.get("vni") or 1), int(backend.get("port") or 8472)
    except InvalidNetwork:
        raise
    except (ValueError, TypeError) as error:
        raise InvalidNetwork(f"the network state is wrong: {error}") from error
    for name, address in (("SubnetMin", first), ("SubnetMax", last)):
        if address not in network:
            raise InvalidNetwork(f"{name} {address} is not in {network}")
        if int(address) % size:
            raise InvalidNetwork(f"{name} {address} is not the beginning of a /{subnet_len}")
    if first > last:
        raise InvalidNetwork(f"SubnetMin {first} lies behind SubnetMax {last}")
    return Overlay(network=network, subnet_len=subnet_len, first=first, last=last, backend=kind, vni=vni, port=port)


def leases_of(document: Document) -> list[Lease]:
    """All leases that can be read, in the order of their addresses."""
    subnets = document.get("subnets") or {}
    leases = [lease for key, attributes in subnets.items() if (lease := _lease(key, attributes)) is not None]
    return sorted(leases, key=lambda lease: lease.subnet)


def with_lease(document: Document, lease: Lease) -> dict[str, Any]:
    subnets = dict(document.get("subnets") or {})
    subnets[lease.key] = lease.written_over(subnets.get(lease.key) or {})
    return {**document, "subnets": subnets}


def without_leases(document: Document, leases: list[Lease]) -> dict[str, Any]:
    gone = {lease.key for lease in leases}
    subnets = {key: value for key, value in (document.get("subnets") or {}).items() if key not in gone}
    return {**document, "subnets": subnets}


def _lease(key: str, attributes: object) -> Lease | None:
    address, _, length = key.partition("-")
    if not isinstance(attributes, Mapping):
        return None
    data = attributes.get("BackendData")
    try:
        return Lease(
            subnet=IPv4Network(f"{address}/{length}"),
            public_ip=str(ipaddress.IPv4Address(attributes["PublicIP"])),
            http_port=str(attributes.get("HTTPPort", "")),
            backend=str(attributes.get("BackendType", "")),
            vtep_mac=str(data.get("VtepMAC", "")).lower() if isinstance(data, Mapping) else "",
            host_id=str(attributes.get("HostID", "")),
            renewed_at=_time(attributes.get("RenewedAt")),
        )
    except (KeyError, ValueError):
        return None


def _time(value: object) -> datetime | None:
    if not isinstance(value, str):
        return None
    time = datetime.fromisoformat(value)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _folded(value: object) -> dict[str, Any]:
    """Keys of the configuration are matched without regard to case, as Go does."""
    return {str(key).lower(): item for key, item in value.items()} if isinstance(value, Mapping) else {}
