"""Which packets containers may send: a pure rule set, rendered for nftables, replaced as a whole.

Three things: traffic that leaves the overlay gets the host's address; nobody outside the overlay opens connections to
containers; and jobs of users and builds reach nothing of the platform but DNS and the router. Only jobs of system apps
(`trusted`) reach control ports, which ask for certificates on top.

A second table, of the bridge family, holds each job to its own address: jobs have NET_RAW and could forge frames.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from flynn.host.network.ports import PREFIX, mac_address, port_name

#: On hosts: Raft, discoverd, flynn-host, router API, flannel.
CONTROL_PORTS = (1110, 1111, 1113, 5000, 5002)
VXLAN_PORT = 8472
DNS_PORT = 53
ROUTER_PORTS = ("80", "443", "3000-3500")
#: Larger subnets get no rules about forged addresses: they would have to name every port.
LARGEST_BOUND_SUBNET = 4096


class FirewallError(Exception):
    """nft refused; the text is its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Everything the packet filter depends on. `trusted` are the addresses of system-app jobs on this host."""

    bridge: str
    address: IPv4Interface  # the bridge's: 100.100.7.1/24
    overlay: IPv4Network  # all hosts' subnets together: 100.100.0.0/16
    hosts: Collection[IPv4Address] = ()  # external addresses of the cluster's hosts, this one included
    trusted: Collection[IPv4Address] = ()
    table: str = "flynn"


def render(policy: Policy) -> str:
    """Both tables as one nft transaction that replaces what was there."""
    bridge, address, overlay, table = policy.bridge, policy.address, policy.overlay, f"inet {policy.table}"
    ports = ", ".join(ROUTER_PORTS)
    control = ", ".join(map(str, CONTROL_PORTS))
    # The bridges of all hosts have the same place in their subnets, so a mask finds them without knowing the hosts.
    place = f"ip daddr & {address.network.hostmask} == {IPv4Address(int(address.ip) & int(address.network.hostmask))}"
    return f"""\
add table {table}
delete table {table}
table {table} {{
    set trusted {{
        type ipv4_addr
        {_elements(policy.trusted)}
    }}
    set hosts {{
        type ipv4_addr
        {_elements(policy.hosts)}
    }}
    chain input {{
        type filter hook input priority filter - 5; policy accept;
        iifname != "{bridge}" accept
        ct state established,related accept
        ip saddr @trusted accept
        meta l4proto {{ icmp, ipv6-icmp }} accept
        ip daddr {address.ip} meta l4proto {{ tcp, udp }} th dport {DNS_PORT} accept
        ip saddr {address.network} tcp dport {{ {ports} }} accept
        reject with icmpx admin-prohibited
    }}
    chain forward {{
        type filter hook forward priority filter - 5; policy accept;
        ct state established,related accept
        iifname "{bridge}" goto from_containers
        oifname "{bridge}" ip saddr != {overlay} ip saddr != @hosts drop
    }}
    chain from_containers {{
        ip saddr != {address.network} drop
        ip saddr @trusted accept
        ip daddr @hosts tcp dport {{ {control} }} reject with icmpx admin-prohibited
        ip daddr @hosts udp dport {VXLAN_PORT} reject with icmpx admin-prohibited
        ip daddr {overlay} {place} tcp dport {{ {ports} }} accept
        ip daddr {overlay} {place} meta l4proto {{ tcp, udp }} reject with icmpx admin-prohibited
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {address.network} ip daddr != {overlay} masquerade
    }}
}}
{_render_binding(policy)}"""


def _render_binding(policy: Policy) -> str:
    """Frames of a job carry its own addresses; anything but IPv4 and ARP is dropped."""
    table, network = f"bridge {policy.table}", policy.address.network
    start = f"add table {table}\ndelete table {table}\n"
    if network.num_addresses > LARGEST_BOUND_SUBNET:
        return start
    jobs = [str(address) for address in network.hosts() if address != policy.address.ip]
    ports = ",\n".join(f"{port_name(job)} . {mac_address(job).hex(':')} . {job}" for job in jobs)
    return f"""\
{start}table {table} {{
    set jobs {{
        type ifname . ether_addr . ipv4_addr
        elements = {{ {ports} }}
    }}
    chain prerouting {{
        type filter hook prerouting priority filter; policy accept;
        iifname != "{PREFIX}*" accept
        ether type ip iifname . ether saddr . ip saddr @jobs accept
        ether type arp iifname . arp saddr ether . arp saddr ip @jobs accept
        drop
    }}
}}
"""


def _elements(addresses: Collection[IPv4Address]) -> str:
    return f"elements = {{ {', '.join(map(str, sorted(addresses)))} }}" if addresses else ""


async def apply(policy: Policy) -> None:
    """Make the kernel's tables exactly this policy, atomically (`nft -f -`, about 10 ms). Idempotent."""
    await _nft(render(policy))


async def trust(policy: Policy, address: IPv4Address) -> None:
    """Add the address of a starting system job without rendering everything anew. Idempotent."""
    await _nft(f"add element inet {policy.table} trusted {{ {address} }}\n")


async def distrust(policy: Policy, address: IPv4Address) -> None:
    """Take it back. Before the address is released, or the next user job inherits its rights. Idempotent."""
    # Deleting what is not there fails, so add it first, in the same transaction.
    change = f"element inet {policy.table} trusted {{ {address} }}\n"
    await _nft(f"add {change}delete {change}")


async def remove(table: str = "flynn") -> None:
    """Drop the tables if they are there."""
    families = (f"{family} {table}" for family in ("inet", "bridge"))
    await _nft("".join(f"add table {name}\ndelete table {name}\n" for name in families))


async def _nft(script: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *("nft", "-f", "-"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate(script.encode())
    if process.returncode:
        raise FirewallError(errors.decode("utf-8", "replace").strip())
