"""What the name server answers: one query and the state of the directory in, one reply out. Pure.

Zone `discoverd.`, as in spec/discoverd section 6: `<service>`, `_<service>._<proto>`, `<id>.<service>._i`,
`leader.<service>`. Time to live is 0 everywhere, since the truth changes with every failover. Deviations: replies are
cut to the size the asker accepts with TC set (the original never said so), EDNS is answered, the apex exists, and
addresses that are no IP literals are left out instead of being sent empty. Recursion is `recursion`'s business.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from dnslib import AAAA, EDNS0, NS, OPCODE, QTYPE, RCODE, RR, SOA, SRV, A, DNSHeader, DNSLabel, DNSRecord
from dnslib.label import DNSBuffer

from flynn.discoverd.store import Directory
from flynn.types.instance import Instance

ZONE = "discoverd"
NAME_SERVER = "ns"  # unless there is a service of that name
UDP_INSTANCES = 3  # what a small datagram holds with some room; who wants all of them asks by TCP
UDP_BYTES = 512  # without EDNS
MAX_UDP_BYTES = 1232  # with it: what passes everywhere unfragmented
MAX_TCP_BYTES = 65535
_BADVERS = 16  # of the extended response codes: the upper part goes into the OPT record

Shuffle = Callable[[Sequence[Instance]], list[Instance]]


class Transport(Enum):
    UDP = "udp"
    TCP = "tcp"


@dataclass(frozen=True, slots=True)
class Found:
    """The instances a name stands for. `single` names are hosts of their own: a SRV points back at the name."""

    instances: Sequence[Instance]
    service: str
    single: bool = False


def in_zone(query: DNSRecord) -> bool:
    return _labels(query.q.qname)[-1:] == [ZONE]


def refusal(query: DNSRecord, *, recursive: bool) -> DNSRecord | None:
    """What is said to a query that is not one: another operation, or an EDNS that nobody has defined yet."""
    if query.header.opcode != OPCODE.QUERY:
        reply = failure(query, RCODE.NOTIMP, recursive=recursive)
        reply.header.opcode = query.header.opcode
        return reply
    edns = next((record for record in query.ar if record.rtype == QTYPE.OPT), None)
    if edns is not None and edns.edns_ver != 0:
        reply = failure(query, RCODE.NOERROR, recursive=recursive)
        reply.ar = [EDNS0(udp_len=MAX_UDP_BYTES, ext_rcode=_BADVERS >> 4)]
        return reply
    return None


def answer(
    query: DNSRecord,
    state: Directory,
    transport: Transport,
    *,
    recursive: bool,
    now: int,
    shuffle: Shuffle,
    own: str = "",
) -> DNSRecord:
    """The authoritative reply to a query for a name in the zone.

    Args:
        recursive: whether names outside are resolved too, which is all this does with it: say so.
        now: seconds since the epoch, the serial of the zone.
        shuffle: the order in which instances are given; the caller owns the chance.
        own: the address that was asked, which is that of the zone's name server.
    """
    reply = _reply(query, recursive=recursive, authoritative=True)
    found = resolve(_labels(query.q.qname), state)
    if query.q.qtype == QTYPE.SOA and found is not None:
        reply.add_answer(_soa(now))
    elif isinstance(found, Found):
        _add_records(reply, query, found, transport, shuffle)
    elif found == ZONE:
        _add_apex(reply, query, now)
    elif found == NAME_SERVER:
        _add_own(reply, query, own)
    else:
        reply.header.rcode = RCODE.NXDOMAIN
    if not reply.rr:
        reply.add_auth(_soa(now))
    return reply


def resolve(labels: Sequence[str], state: Directory) -> Found | str | None:
    """What a name in the zone stands for: instances, the zone itself, its name server, or nothing.

    A service without instances does not exist for the DNS, as a resolver that remembers "exists, but no address" would
    keep clients away longer than one that asks again.
    """
    match list(labels[:-1]):
        case []:
            return ZONE
        case [name]:
            found = _several(name, state, lambda instance: True)
            return NAME_SERVER if found is None and name == NAME_SERVER else found
        case [service, proto] if service.startswith("_") and proto.startswith("_"):
            return _several(service[1:], state, lambda instance: instance.proto == proto[1:])
        case [instance_id, name, "_i"]:
            service_ = state.services.get(name)
            instance = service_.instances.get(instance_id) if service_ else None
            return Found([instance], name, single=True) if instance else None
        case ["leader", name]:
            service_ = state.services.get(name)
            leader = service_.leader if service_ else None
            return Found([leader], name, single=True) if leader else None
    return None


def failure(query: DNSRecord, rcode: int, *, recursive: bool) -> DNSRecord:
    reply = _reply(query, recursive=recursive, authoritative=False)
    reply.header.rcode = rcode
    return reply


def malformed(datagram: bytes) -> bytes | None:
    """FORMERR for what could not be decoded, as far as there is an id to answer to."""
    if len(datagram) < 12 or datagram[2] & 0x80:
        return None  # no header, or an answer: replying to that could go round for ever
    header = DNSHeader(id=int.from_bytes(datagram[:2], "big"), qr=1, rcode=RCODE.FORMERR)
    return bytes(DNSRecord(header).pack())


def packed(reply: DNSRecord, query: DNSRecord, transport: Transport) -> bytes:
    """Bytes of at most the size the asker accepts; what does not fit goes, and the asker is told (TC)."""
    limit = MAX_TCP_BYTES if transport is Transport.TCP else min(max(_accepted_bytes(query), UDP_BYTES), MAX_UDP_BYTES)
    raw = _wire(reply)
    if len(raw) <= limit:
        return raw
    # Additional records are a kindness, so they go first, and silently.
    reply.ar = [record for record in reply.ar if record.rtype == QTYPE.OPT]
    records = list(reply.rr)

    def cut_to(count: int) -> bytes:
        reply.rr = records[:count]
        reply.header.tc = int(count < len(records))
        return _wire(reply)

    fits, too_many = 0, len(records) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if len(cut_to(middle)) <= limit else (fits, middle)
    return cut_to(fits)


class _NamesInReach(dict[tuple[bytes, ...], int]):
    """Where names begin that may be pointed at. A pointer has 14 bits; the library forgets that in long messages."""

    def __setitem__(self, name: tuple[bytes, ...], offset: int) -> None:
        if offset < 1 << 14:
            super().__setitem__(name, offset)


def _wire(record: DNSRecord) -> bytes:
    record.set_header_qa()
    buffer = DNSBuffer()
    buffer.names = _NamesInReach()
    for part in (record.header, *record.questions, *record.rr, *record.auth, *record.ar):
        part.pack(buffer)
    return bytes(buffer.data)


def _several(name: str, state: Directory, wanted: Callable[[Instance], bool]) -> Found | None:
    service = state.services.get(name)
    if service is None or not service.instances:
        return None
    return Found([instance for instance in service.sorted_instances if wanted(instance)], name)


def _add_records(reply: DNSRecord, query: DNSRecord, found: Found, transport: Transport, shuffle: Shuffle) -> None:
    qtype, asked = query.q.qtype, query.q.qname
    instances = shuffle(found.instances)
    hosts = _distinct_hosts(instances, qtype)
    if transport is Transport.UDP:
        instances, hosts = instances[:UDP_INSTANCES], hosts[:UDP_INSTANCES]
    for address in hosts:
        reply.add_answer(_address_record(asked, address))
    if qtype not in (QTYPE.SRV, QTYPE.ANY):
        return
    for instance in instances:
        target = asked if found.single else DNSLabel(f"{instance.id}.{found.service}._i.{ZONE}.")
        if not instance.host or not _has_numeric_port(instance):
            continue
        reply.add_answer(RR(asked, QTYPE.SRV, ttl=0, rdata=SRV(1, 1, instance.port, target)))
        host = _ip(instance)
        if transport is Transport.TCP and qtype == QTYPE.SRV and host is not None:
            reply.add_ar(_address_record(target, host))


def _add_apex(reply: DNSRecord, query: DNSRecord, now: int) -> None:
    if query.q.qtype == QTYPE.ANY:
        reply.add_answer(_soa(now))
    if query.q.qtype in (QTYPE.NS, QTYPE.ANY):
        reply.add_answer(RR(query.q.qname, QTYPE.NS, ttl=0, rdata=NS(f"{NAME_SERVER}.{ZONE}.")))


def _add_own(reply: DNSRecord, query: DNSRecord, own: str) -> None:
    address = ipaddress.ip_address(own) if own else None
    wanted = {4: (QTYPE.A, QTYPE.ANY), 6: (QTYPE.AAAA, QTYPE.ANY)}
    if address is not None and query.q.qtype in wanted[address.version]:
        reply.add_answer(_address_record(query.q.qname, address))


IP = ipaddress.IPv4Address | ipaddress.IPv6Address


def _distinct_hosts(instances: Iterable[Instance], qtype: int) -> list[IP]:
    addresses = dict.fromkeys(address for one in instances if (address := _ip(one)) is not None)
    versions = {QTYPE.A: (4,), QTYPE.AAAA: (6,), QTYPE.ANY: (4, 6)}.get(qtype, ())
    return [address for address in addresses if address.version in versions]


def _ip(instance: Instance) -> IP | None:
    try:
        return ipaddress.ip_address(instance.host)
    except ValueError:
        return None


def _has_numeric_port(instance: Instance) -> bool:
    port = instance.addr.rpartition(":")[2]
    return port.isdecimal() and int(port) < 65536


def _address_record(owner: DNSLabel, address: IP) -> RR:
    if address.version == 4:
        return RR(owner, QTYPE.A, ttl=0, rdata=A(str(address)))
    return RR(owner, QTYPE.AAAA, ttl=0, rdata=AAAA(str(address)))


def _soa(now: int) -> RR:
    times = (now, 3600, 600, 86400, 0)
    return RR(f"{ZONE}.", QTYPE.SOA, ttl=0, rdata=SOA(f"{NAME_SERVER}.{ZONE}.", f"postmaster.{ZONE}.", times))


def _reply(query: DNSRecord, *, recursive: bool, authoritative: bool) -> DNSRecord:
    header = DNSHeader(
        id=query.header.id, qr=1, aa=int(authoritative), ra=int(recursive), rd=query.header.rd, opcode=OPCODE.QUERY
    )
    reply = DNSRecord(header, q=query.q)
    if any(record.rtype == QTYPE.OPT for record in query.ar):
        reply.add_ar(EDNS0(udp_len=MAX_UDP_BYTES))
    return reply


def _accepted_bytes(query: DNSRecord) -> int:
    return next((int(record.rclass) for record in query.ar if record.rtype == QTYPE.OPT), UDP_BYTES)


def _labels(name: DNSLabel) -> list[str]:
    return [label.decode("ascii", "replace").lower() for label in name.label]
