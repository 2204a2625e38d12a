"""The query that nearly all are, addresses of a service by UDP, answered from bytes to bytes.

Taking a query apart and putting a reply together with a library costs twenty times what these lines do. Whatever looks
different in any way (other names and types, more than one question, EDNS options, no such service) is left to `dns`;
what is answered here is answered in the same bytes. Pure.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Sequence

from flynn.discoverd import dns
from flynn.discoverd.store import Directory, Service

Shuffle = Callable[[Sequence[bytes]], list[bytes]]

MAX_KEPT = 4096  # services whose addresses are remembered
_A, _AAAA = b"\x00\x01\x00\x01", b"\x00\x1c\x00\x01"  # with class IN
_ZONE = b"\x09discoverd\x00"
_ASKED = b"\xc0\x0c"  # points at the question's name
_RECORD = {
    _A: _ASKED + _A + b"\x00\x00\x00\x00\x00\x04",
    _AAAA: _ASKED + _AAAA + b"\x00\x00\x00\x00\x00\x10",
}  # owner, type, class, time to live 0, length
_OPT = b"\x00\x00\x29" + struct.pack("!H", dns.MAX_UDP_BYTES) + bytes(6)


class Shortcut:
    """Remembers the addresses of the services it was asked for, as long as their instances stay what they are."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Service, dict[bytes, list[bytes]]]] = {}

    def answer(self, query: bytes, state: Directory, *, recursive: bool, now: int, shuffle: Shuffle) -> bytes | None:
        """The reply, or None for a query that has to go the long way. The arguments are those of `dns.answer`."""
        if query[2:3] >= b"\x08" or query[4:11] != b"\x00\x01\x00\x00\x00\x00\x00":
            return None  # a reply, another operation, or not one question and nothing but additional records
        zone = 13 + query[12] if len(query) > 12 else 0
        end = zone + len(_ZONE) + len(_A)
        kind = query[end - len(_A) : end]
        if kind not in _RECORD or query[zone : end - len(_A)].lower() != _ZONE:
            return None
        with_edns = query[11:12] == b"\x01"
        if not _ends_plainly(query[end:]) if with_edns else query[11:12] != b"\x00" or len(query) != end:
            return None
        name = query[13:zone].lower()
        service = state.services.get(name.decode("ascii")) if name.isascii() else None
        if service is None or not service.instances:
            return None
        hosts = self._hosts(name.decode("ascii"), service)[kind]
        found = list(dict.fromkeys(shuffle(hosts)))[: dns.UDP_INSTANCES]
        if not found and query[zone : end - len(_A)] != _ZONE:
            return None  # names are pointed at only in the same spelling
        flags = 0x8400 | (query[2] & 1) << 8 | recursive << 7  # a reply, authoritative
        counts = struct.pack("!HHHHH", flags, 1, len(found), 0 if found else 1, with_edns)
        lead = _RECORD[kind]
        records = b"".join([lead + host for host in found]) if found else _authority(zone, now)
        return query[:2] + counts + query[12:end] + records + (_OPT if with_edns else b"")

    def _hosts(self, name: str, service: Service) -> dict[bytes, list[bytes]]:
        """Per type, the addresses of all instances in order, those of several instances several times."""
        kept = self._kept.get(name)
        if kept is not None and kept[0] is service:
            return kept[1]
        hosts: dict[bytes, list[bytes]] = {_A: [], _AAAA: []}
        for instance in service.sorted_instances:
            try:
                address = ipaddress.ip_address(instance.host)
            except ValueError:
                continue
            hosts[_A if address.version == 4 else _AAAA].append(address.packed)
        if len(self._kept) >= MAX_KEPT:
            self._kept.clear()
        self._kept[name] = service, hosts
        return hosts


def _ends_plainly(rest: bytes) -> bool:
    """Whether the one additional record is EDNS version 0 without options."""
    return len(rest) == 11 and rest[:3] == b"\x00\x00\x29" and rest[5:7] == b"\x00\x00" and rest[9:] == b"\x00\x00"


def _authority(zone: int, now: int) -> bytes:
    """The SOA record of the zone, whose name is at an offset of the message."""
    pointer = struct.pack("!H", 0xC000 | zone)
    names = b"\x02ns" + pointer + b"\x0apostmaster" + pointer
    data = names + struct.pack("!5I", now, 3600, 600, 86400, 0)
    return pointer + b"\x00\x06\x00\x01\x00\x00\x00\x00" + struct.pack("!H", len(data)) + data
