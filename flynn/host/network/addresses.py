"""The node's pool of container addresses: pure, one network, round robin (a freed address rests before its reuse)."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface


class AddressError(Exception):
    """The texts are part of the host API's contract."""


class AddressPool:
    """Addresses of the network of `bridge` (e.g. 100.100.7.1/24) but its own, the network's and the broadcast one."""

    def __init__(self, bridge: IPv4Interface, taken: Iterable[IPv4Address] = ()) -> None:
        self.network = bridge.network
        self._first = int(self.network.network_address) + 1
        self._last = int(self.network.broadcast_address) - 1
        self._taken = {int(bridge.ip)}
        self._previous = self._last
        for address in taken:
            self.reserve(address)

    def allocate(self) -> IPv4Address:
        """Return the next free address after the one given out last.

        Raises AddressError when all are taken.
        """
        size = self._last - self._first + 1
        for step in range(size):
            candidate = self._first + (self._previous + 1 + step - self._first) % size
            if candidate not in self._taken:
                self._previous = candidate
                self._taken.add(candidate)
                return IPv4Address(candidate)
        raise AddressError("no available ip addresses on network")

    def reserve(self, address: IPv4Address) -> None:
        """Take one given address: of a restored container. Does not move the round robin."""
        if not self._first <= int(address) <= self._last:
            raise AddressError("requested ip is out of range")
        if int(address) in self._taken:
            raise AddressError("ip already allocated")
        self._taken.add(int(address))

    def release(self, address: IPv4Address) -> None:
        """Give an address back; unknown ones are ignored."""
        self._taken.discard(int(address))
