"""What the kernel of this machine should know about the others' blocks, and the difference to what it knows. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network

from flynn.flannel.document import BackendType, Lease, Overlay


@dataclass(frozen=True, slots=True)
class Route:
    subnet: IPv4Network
    gateway: str


@dataclass(frozen=True, slots=True)
class Neighbour:
    """ARP: the overlay address of another machine's device has this MAC."""

    address: str
    mac: str


@dataclass(frozen=True, slots=True)
class Forwarding:
    """FDB: frames for this MAC go, wrapped in UDP, to this machine."""

    mac: str
    public_ip: str


@dataclass(frozen=True, slots=True)
class Datapath:
    """Everything in the kernel that follows from the leases."""

    forwarding: frozenset[Forwarding] = field(default_factory=frozenset)
    neighbours: frozenset[Neighbour] = field(default_factory=frozenset)
    routes: frozenset[Route] = field(default_factory=frozenset)

    def minus(self, other: Datapath) -> Datapath:
        return Datapath(
            self.forwarding - other.forwarding, self.neighbours - other.neighbours, self.routes - other.routes
        )

    def __bool__(self) -> bool:
        return bool(self.forwarding or self.neighbours or self.routes)


def wanted(overlay: Overlay, leases: Sequence[Lease], own: Lease) -> Datapath:
    """What should be there for the leases of the other machines. Leases of another backend cannot be reached."""
    others = [lease for lease in leases if lease.subnet != own.subnet and lease.backend == own.backend]
    match overlay.backend:
        case BackendType.VXLAN:
            reachable = [lease for lease in others if lease.vtep_mac]
            return Datapath(
                frozenset(Forwarding(lease.vtep_mac, lease.public_ip) for lease in reachable),
                frozenset(Neighbour(str(lease.subnet.network_address), lease.vtep_mac) for lease in reachable),
                frozenset(Route(lease.subnet, str(lease.subnet.network_address)) for lease in reachable),
            )
        case BackendType.HOST_GW:
            return Datapath(routes=frozenset(Route(lease.subnet, lease.public_ip) for lease in others))
        case BackendType.ALLOC:
            return Datapath()
