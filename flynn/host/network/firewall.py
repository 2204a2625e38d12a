"""Which packets containers may send: a pure rule set, rendered for nftables, replaced as a whole."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Everything the packet filter depends on. `trusted` are the addresses of system-app jobs on this host."""

    bridge: str
    address: IPv4Interface  # the bridge's: 100.100.7.1/24
    overlay: IPv4Network  # all hosts' subnets together: 100.100.0.0/16
    hosts: Collection[IPv4Address] = ()  # external addresses of the cluster's hosts, this one included
    trusted: Collection[IPv4Address] = ()
    table: str = "flynn"


async def apply(policy: Policy) -> None:
    """Make the kernel's table exactly this policy, atomically (`nft -f -`, about 10 ms). Idempotent."""
    raise NotImplementedError


async def trust(policy: Policy, address: IPv4Address) -> None:
    """Add the address of a starting system job without rendering everything anew."""
    raise NotImplementedError


async def distrust(policy: Policy, address: IPv4Address) -> None:
    """Take it back. Before the address is released, or the next user job inherits its rights. Idempotent."""
    raise NotImplementedError


async def remove(table: str = "flynn") -> None:
    """Drop the table if it is there."""
    raise NotImplementedError
