"""The node's bridge: made once, brought to the wanted state at every call.

Uses the small rtnetlink module of the runtime, as the start of a container does.
"""

from __future__ import annotations

import errno
import os
import socket
from ipaddress import IPv4Interface
from pathlib import Path

from flynn.host.runtime import netlink


def ensure_bridge(name: str, address: IPv4Interface, mtu: int) -> None:
    """Create or adjust the bridge in the current network namespace: address, mtu, up; turn IPv4 forwarding on.

    Other IPv4 addresses are removed. Idempotent; takes a few ms, mostly the kernel's.
    """
    link = netlink.Netlink()
    try:
        index = _ensure_link(link, name)
        _change(link, netlink.link_header(index) + netlink.number(netlink.IFLA_MTU, mtu), f"mtu {mtu} of {name}")
        _ensure_address(link, index, address)
        flags = netlink.IFF_UP | netlink.IFF_PROMISC  # promiscuous, so that tools on the host see all traffic
        _change(link, netlink.link_header(index, flags), f"{name} up")
    finally:
        link.close()
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def remove_bridge(name: str) -> None:
    """Remove it if it is there (for tests and `flynn-host` uninstall)."""
    link = netlink.Netlink()
    try:
        link.request(netlink.RTM_DELLINK, netlink.link_header() + netlink.name(netlink.IFLA_IFNAME, name), what=name)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
    finally:
        link.close()


def _ensure_link(link: netlink.Netlink, name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        # A fixed address of its own: otherwise the bridge takes a port's and changes it as containers come and go.
        mac = b"\xfe" + os.urandom(5)
        kind = netlink.attribute(netlink.IFLA_LINKINFO, netlink.attribute(netlink.IFLA_INFO_KIND, b"bridge"))
        body = netlink.link_header() + netlink.name(netlink.IFLA_IFNAME, name)
        body += netlink.attribute(netlink.IFLA_ADDRESS, mac) + kind
        link.request(netlink.RTM_NEWLINK, body, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL, f"create bridge {name}")
        return socket.if_nametoindex(name)


def _change(link: netlink.Netlink, body: bytes, what: str) -> None:
    link.request(netlink.RTM_NEWLINK, body, 0, what)


def _ensure_address(link: netlink.Netlink, index: int, wanted: IPv4Interface) -> None:
    present = False
    header = netlink.AddressHeader.pack(socket.AF_INET, 0, 0, 0, 0)
    for body in link.dump(netlink.RTM_GETADDR, header):
        family, prefix, _, _, owner = netlink.AddressHeader.unpack_from(body)
        if owner != index or family != socket.AF_INET:
            continue
        local = netlink.attributes(body[netlink.AddressHeader.size :])[netlink.IFA_LOCAL]
        if local == wanted.ip.packed and prefix == wanted.network.prefixlen:
            present = True
        else:
            old = netlink.address(index, socket.inet_ntoa(local), prefix)
            link.request(netlink.RTM_DELADDR, old, what=f"remove {socket.inet_ntoa(local)}")
    if not present:
        new = netlink.address(index, str(wanted.ip), wanted.network.prefixlen)
        link.request(netlink.RTM_NEWADDR, new, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL, f"address {wanted}")
