"""The node's part of the overlay: bridge, addresses, packet filter, and what jobs resolve names with.

Nothing works before `configure` was called (by flannel, through the host API): jobs wait at `ready`. spec/host.md
section 11.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

from flynn.host.network import bridge, firewall
from flynn.host.network.addresses import AddressPool
from flynn.host.network.firewall import Policy
from flynn.host.runtime.spec import Network
from flynn.types.codec import replace
from flynn.types.errors import ValidationError
from flynn.types.host import NetworkConfig

SMALLEST_MTU, LARGEST_MTU, DEFAULT_MTU = 576, 65535, 1500
RESOLV_CONF = Path("/etc/resolv.conf")


@dataclass(frozen=True, slots=True)
class Subnet:
    """A network configuration that makes sense."""

    interface: IPv4Interface
    overlay: IPv4Network
    mtu: int

    @classmethod
    def parse(cls, config: NetworkConfig) -> Subnet:
        """Check what came over the wire; bad input is the caller's error, never ours. Raises `ValidationError`."""
        try:
            interface = IPv4Interface(config.subnet)
        except ValueError as error:
            raise ValidationError("subnet", f"must be an IPv4 address with prefix: {error}") from error
        if not 8 <= interface.network.prefixlen <= 30:
            raise ValidationError("subnet", "must have a prefix between /8 and /30")
        if interface.ip in (interface.network.network_address, interface.network.broadcast_address):
            raise ValidationError("subnet", "must name the bridge's address, like 100.100.7.1/24")
        mtu = config.mtu or DEFAULT_MTU
        if not SMALLEST_MTU <= mtu <= LARGEST_MTU:
            raise ValidationError("mtu", f"must be between {SMALLEST_MTU} and {LARGEST_MTU}")
        try:
            overlay = IPv4Network(config.network) if config.network else interface.network
        except ValueError as error:
            raise ValidationError("network", f"must be an IPv4 network: {error}") from error
        if not interface.network.subnet_of(overlay):
            raise ValidationError("network", f"{overlay} does not contain {interface.network}")
        return cls(interface, overlay, mtu)


class NodeNetwork:
    """Bridge, addresses and packet filter of this node. One per daemon."""

    def __init__(self, *, bridge_name: str, external_ip: IPv4Address, resolv_conf: Path = RESOLV_CONF) -> None:
        self.config: NetworkConfig | None = None
        self.ready = asyncio.Event()
        self._bridge, self._external_ip, self._resolv_conf = bridge_name, external_ip, resolv_conf
        self._hosts: frozenset[IPv4Address] = frozenset({external_ip})
        self._subnet: Subnet | None = None
        self._pool: AddressPool | None = None
        self._addresses: set[IPv4Address] = set()  # of containers, taken over ones included
        self._trusted: set[IPv4Address] = set()
        self._changing = asyncio.Lock()  # guards the kernel's side: bridge and packet filter

    async def configure(self, config: NetworkConfig) -> NetworkConfig:
        """Make the bridge; returns once it exists. Later calls may change the job id and the mtu, not the subnet.

        Raises:
            ValidationError: the configuration makes no sense, or moves the subnet under running jobs.
        """
        subnet = Subnet.parse(config)
        async with self._changing:
            if self._subnet is not None and subnet.interface != self._subnet.interface and self._addresses:
                raise ValidationError("subnet", f"cannot change from {self._subnet.interface} while jobs use it")
            await asyncio.to_thread(bridge.ensure_bridge, self._bridge, subnet.interface, subnet.mtu)
            if self._pool is None or subnet.interface != self._subnet_interface():
                inside = {ip for ip in self._addresses if ip in subnet.interface.network}
                self._pool = AddressPool(subnet.interface, inside)
            self._subnet = subnet
            await firewall.apply(self._policy())
            resolvers = await asyncio.to_thread(nameservers, self._resolv_conf)
            self.config = replace(config, mtu=subnet.mtu, resolvers=resolvers)
            self.ready.set()
            return self.config

    def _subnet_interface(self) -> IPv4Interface | None:
        return self._subnet.interface if self._subnet else None

    def _policy(self) -> Policy:
        assert self._subnet is not None
        return Policy(
            bridge=self._bridge,
            address=self._subnet.interface,
            overlay=self._subnet.overlay,
            hosts=sorted(self._hosts),
            trusted=sorted(self._trusted),
            table=f"flynn-{self._bridge}" if self._bridge != "flynnbr0" else "flynn",
        )

    def restore(self, address: IPv4Address, *, trusted: bool) -> None:
        """Count the address of a container of an earlier daemon as taken. Before or after `configure`."""
        self._addresses.add(address)
        if trusted:
            self._trusted.add(address)
        if self._pool is not None:
            self._pool.reserve(address)

    async def allocate(self, *, trusted: bool) -> Network:
        """Take an address for a job; `trusted` ones (system jobs) may reach the control APIs. Needs `ready`.

        Raises:
            AddressError: all are taken.
        """
        assert self._pool is not None and self._subnet is not None
        address = self._pool.allocate()
        self._addresses.add(address)
        if trusted:
            self._trusted.add(address)
            async with self._changing:
                await firewall.trust(self._policy(), address)
        return Network(
            bridge=self._bridge,
            address=str(address),
            prefix=self._subnet.interface.network.prefixlen,
            gateway=str(self._subnet.interface.ip),
            mtu=self._subnet.mtu,
        )

    async def release(self, address: IPv4Address) -> None:
        """Give an address back, its rights first. Idempotent."""
        if address in self._trusted:
            self._trusted.discard(address)
            if self._subnet is not None:
                async with self._changing:
                    await firewall.distrust(self._policy(), address)
        self._addresses.discard(address)
        if self._pool is not None:
            self._pool.release(address)

    async def set_hosts(self, hosts: Iterable[IPv4Address]) -> None:
        """Tell the packet filter who the cluster's hosts are."""
        wanted = frozenset(hosts) | {self._external_ip}
        if wanted == self._hosts:
            return
        self._hosts = wanted
        async with self._changing:
            if self._subnet is not None:
                await firewall.apply(self._policy())

    def resolv_conf(self, *, cluster: bool) -> str:
        """Return the text of a job's /etc/resolv.conf: the bridge's DNS, or the machine's own before there is one."""
        own = _read(self._resolv_conf)
        if not cluster or self._subnet is None:
            return own
        search = [line for line in own.splitlines() if line.split()[:1] == ["search"]]
        return "\n".join([*search, f"nameserver {self._subnet.interface.ip}", ""])


def nameservers(resolv_conf: Path) -> list[str]:
    """Return the addresses of the machine's name servers."""
    lines = (line.split() for line in _read(resolv_conf).splitlines())
    return [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
