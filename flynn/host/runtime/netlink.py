"""Just enough rtnetlink for links, addresses and routes, without a library.

Init cannot afford one (memory, import time), and a start path of two dozen milliseconds has no room for one either.
The messages are built by pure functions; `Netlink` sends one and reads its acknowledgement.
"""

from __future__ import annotations

import os
import socket
import struct

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE = 24
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 1, 4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_LINKINFO, IFLA_NET_NS_FD, IFLA_PROMISCUITY = (
    1,
    3,
    4,
    10,
    18,
    28,
    30,
)
IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 1, 2, 1
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST = 1, 2, 4
RTA_GATEWAY, RTA_OIF = 5, 4
IFF_UP, IFF_PROMISC = 1, 0x100

LinkHeader = struct.Struct("=BxHiII")
AddressHeader = struct.Struct("=BBBBI")
RouteHeader = struct.Struct("=BBBBBBBBI")
MessageHeader = struct.Struct("=IHHII")
AttributeHeader = struct.Struct("=HH")


def attribute(kind: int, value: bytes) -> bytes:
    return AttributeHeader.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def name(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def link_header(index: int = 0, flags: int = 0) -> bytes:
    """Only the flags named are changed."""
    return LinkHeader.pack(socket.AF_UNSPEC, 0, index, flags, flags)


def veth(*, outside: str, bridge: int, inside: str, inside_namespace: int, mtu: int, mac: bytes) -> bytes:
    """A request body: a pair whose outer end is up and on the bridge, whose inner end is in another namespace."""
    peer = link_header() + name(IFLA_IFNAME, inside) + number(IFLA_MTU, mtu) + attribute(IFLA_ADDRESS, mac)
    peer += number(IFLA_NET_NS_FD, inside_namespace)
    info = attribute(IFLA_INFO_KIND, b"veth") + attribute(IFLA_INFO_DATA, attribute(VETH_INFO_PEER, peer))
    outer = name(IFLA_IFNAME, outside) + number(IFLA_MTU, mtu) + number(IFLA_MASTER, bridge)
    return link_header(flags=IFF_UP) + outer + attribute(IFLA_LINKINFO, info)


def address(index: int, ip: str, prefix: int) -> bytes:
    local = socket.inet_aton(ip)
    header = AddressHeader.pack(socket.AF_INET, prefix, 0, 0, index)
    body = header + attribute(IFA_LOCAL, local) + attribute(IFA_ADDRESS, local)
    if prefix >= 31:
        return body
    broadcast = struct.unpack("!I", local)[0] | (1 << 32 - prefix) - 1
    return body + attribute(IFA_BROADCAST, struct.pack("!I", broadcast))


def default_route(index: int, gateway: str) -> bytes:
    table_main, protocol_boot, scope_universe, unicast = 254, 3, 0, 1
    header = RouteHeader.pack(socket.AF_INET, 0, 0, 0, table_main, protocol_boot, scope_universe, unicast, 0)
    return header + attribute(RTA_GATEWAY, socket.inet_aton(gateway)) + number(RTA_OIF, index)


def attributes(raw: bytes) -> dict[int, bytes]:
    found = {}
    offset = 0
    while offset + 4 <= len(raw):
        length, kind = AttributeHeader.unpack_from(raw, offset)
        if length < 4:
            break
        found[kind] = raw[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


class Netlink:
    """A blocking rtnetlink socket, bound to the network namespace it was opened in."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def request(self, kind: int, body: bytes, flags: int = 0, what: str = "netlink") -> None:
        """Send one change and wait for the kernel's verdict. Raises OSError with `what` as its file name."""
        self._send(kind, body, flags | NLM_F_ACK)
        self._answers(what)

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """The bodies of all objects of a kind."""
        self._send(kind, body, NLM_F_DUMP)
        return self._answers("netlink dump")

    def _send(self, kind: int, body: bytes, flags: int) -> None:
        self._sequence += 1
        header = MessageHeader.pack(16 + len(body), kind, flags | NLM_F_REQUEST, self._sequence, 0)
        self._socket.sendto(header + body, (0, 0))

    def _answers(self, what: str) -> list[bytes]:
        found: list[bytes] = []
        while True:
            raw = self._socket.recv(1 << 17)
            offset = 0
            while offset + 16 <= len(raw):
                length, kind, _, sequence, _ = MessageHeader.unpack_from(raw, offset)
                body = raw[offset + 16 : offset + length]
                offset += (length + 3) & ~3
                if sequence != self._sequence:
                    continue  # the rest of an earlier, abandoned answer
                if kind == NLMSG_ERROR:
                    errno = -struct.unpack_from("=i", body)[0]
                    if errno:
                        raise OSError(errno, os.strerror(errno), what)
                    return found
                if kind == NLMSG_DONE:
                    return found
                found.append(body)
