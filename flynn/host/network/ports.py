"""A job's port on the bridge: its name and hardware address follow from its IPv4 address.

So the packet filter can know all ports of a subnet in advance and hold each to its own address, at no cost when a
container starts; and an address that gets a new owner does not leave stale entries in its neighbours' ARP tables.
"""

from __future__ import annotations

import socket

PREFIX = "vflynn"


def port_name(address: str) -> str:
    """14 characters; the kernel takes 15."""
    return PREFIX + socket.inet_aton(address).hex()


def mac_address(address: str) -> bytes:
    """Of the container's end; locally administered."""
    return b"\xfe\x00" + socket.inet_aton(address)
