"""DNS answers as text: one line per question, the reply's records in the form of dig."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from dnslib import EDNS0, OPCODE, QTYPE, RCODE, DNSRecord

from flynn.discoverd import dns, store
from flynn.discoverd.dns import Transport
from flynn.types.instance import Instance

ONE, TWO = Instance.at("10.0.0.1:80", "http"), Instance.at("10.0.0.1:81", "http")
SIX, NAMED = Instance.at("[fd00::1]:82", "tcp"), Instance.at("some.host:83", "tcp")
BIG = [Instance.at(f"10.1.0.{n}:80", "http") for n in range(1, 31)]


def directory() -> store.Directory:
    state = store.Directory()
    content = {"web": [ONE, TWO, SIX, NAMED], "big": BIG, "empty": [], "leader": [ONE], "db": []}
    for name, instances in content.items():
        for command in (store.CreateService(name), *(store.PutInstance(name, one) for one in instances)):
            state = store.apply(state, state.index + 1, command).state
    return state


STATE = directory()
SOA = "discoverd. 0 SOA ns.discoverd. postmaster.discoverd. 1000 3600 600 86400 0"


@dataclass
class Reply:
    rcode: str
    answer: list[str]
    authority: list[str]
    additional: list[str]
    record: DNSRecord


def ask(name: str, qtype: str = "A", transport: Transport = Transport.UDP, edns: int = 0) -> Reply:
    query = DNSRecord.question(name, qtype)
    if edns:
        query.add_ar(EDNS0(udp_len=edns))
    query = DNSRecord.parse(query.pack())
    reply = dns.answer(query, STATE, transport, recursive=True, now=1000, shuffle=list, own="10.0.0.53")
    record = DNSRecord.parse(dns.packed(reply, query, transport))

    def lines(records: list[object]) -> list[str]:
        shown = [r for r in records if r.rtype != QTYPE.OPT]  # type: ignore[attr-defined]
        return [f"{r.rname} {r.ttl} {QTYPE[r.rtype]} {r.rdata}" for r in shown]  # type: ignore[attr-defined]

    return Reply(RCODE[record.header.rcode], lines(record.rr), lines(record.auth), lines(record.ar), record)


@pytest.mark.parametrize(
    ("name", "qtype", "answer"),
    [
        pytest.param("web.discoverd", "A", ["web.discoverd. 0 A 10.0.0.1"], id="addresses once each"),
        pytest.param("WEB.Discoverd", "A", ["WEB.Discoverd. 0 A 10.0.0.1"], id="the asker's spelling is repeated"),
        pytest.param("web.discoverd", "AAAA", ["web.discoverd. 0 AAAA fd00::1"], id="IPv6"),
        pytest.param("_web._tcp.discoverd", "AAAA", ["_web._tcp.discoverd. 0 AAAA fd00::1"], id="by protocol"),
        pytest.param("leader.web.discoverd", "A", ["leader.web.discoverd. 0 A 10.0.0.1"], id="the leader"),
        pytest.param(
            "leader.web.discoverd",
            "SRV",
            ["leader.web.discoverd. 0 SRV 1 1 80 leader.web.discoverd."],
            id="a leader's port points back at its name",
        ),
        pytest.param("leader.discoverd", "A", ["leader.discoverd. 0 A 10.0.0.1"], id="a service named leader"),
        pytest.param(
            f"{ONE.id}.web._i.discoverd", "A", [f"{ONE.id}.web._i.discoverd. 0 A 10.0.0.1"], id="one instance"
        ),
        pytest.param(
            "_web._http.discoverd",
            "SRV",
            [
                f"_web._http.discoverd. 0 SRV 1 1 {port} {one.id}.web._i.discoverd."
                for one, port in ((ONE, 80), (TWO, 81))
            ],
            id="ports of one address",
        ),
        pytest.param(
            "_web._tcp.discoverd",
            "ANY",
            [
                "_web._tcp.discoverd. 0 AAAA fd00::1",
                f"_web._tcp.discoverd. 0 SRV 1 1 82 {SIX.id}.web._i.discoverd.",
                f"_web._tcp.discoverd. 0 SRV 1 1 83 {NAMED.id}.web._i.discoverd.",
            ],
            id="any: addresses, then ports",
        ),
        pytest.param("web.discoverd", "SOA", [SOA], id="the zone's SOA"),
        pytest.param("discoverd", "SOA", [SOA], id="the apex"),
        pytest.param("discoverd", "NS", ["discoverd. 0 NS ns.discoverd."], id="its name server"),
        pytest.param("discoverd", "ANY", [SOA, "discoverd. 0 NS ns.discoverd."], id="all of the apex"),
        pytest.param("ns.discoverd", "A", ["ns.discoverd. 0 A 10.0.0.53"], id="which is the one that was asked"),
    ],
)
def test_answers(name: str, qtype: str, answer: list[str]) -> None:
    reply = ask(name, qtype)
    assert (reply.rcode, reply.answer, reply.authority) == ("NOERROR", answer, [])
    assert reply.record.header.aa and reply.record.header.ra and reply.record.header.rd


@pytest.mark.parametrize(
    ("name", "qtype", "rcode"),
    [
        ("nope.discoverd", "A", "NXDOMAIN"),
        ("empty.discoverd", "A", "NXDOMAIN"),
        ("leader.empty.discoverd", "A", "NXDOMAIN"),
        ("leader.nope.discoverd", "A", "NXDOMAIN"),
        ("unknown.web._i.discoverd", "A", "NXDOMAIN"),
        ("a.b.c.d.discoverd", "A", "NXDOMAIN"),
        ("web.discoverd", "TXT", "NOERROR"),
        ("_web._udp.discoverd", "A", "NOERROR"),
        ("leader.web.discoverd", "AAAA", "NOERROR"),
        ("_web._tcp.discoverd", "A", "NOERROR"),
        ("discoverd", "A", "NOERROR"),
        ("discoverd", "TXT", "NOERROR"),
        ("ns.discoverd", "AAAA", "NOERROR"),
    ],
)
def test_negative_answers_carry_the_zone(name: str, qtype: str, rcode: str) -> None:
    reply = ask(name, qtype)
    assert (reply.rcode, reply.answer, reply.authority) == (rcode, [], [SOA])


def test_a_datagram_names_three_instances_and_a_connection_all() -> None:
    assert len(ask("big.discoverd").answer) == 3
    assert len(ask("big.discoverd", "SRV").answer) == 3
    assert len(ask("big.discoverd", transport=Transport.TCP).answer) == 30
    by_tcp = ask("big.discoverd", "SRV", Transport.TCP)
    assert len(by_tcp.answer) == len(by_tcp.additional) == 30
    assert by_tcp.additional[0] == f"{BIG[0].id}.big._i.discoverd. 0 A 10.1.0.1"


def cut(qtype: str, transport: Transport, instances: list[Instance], edns: int = 0) -> tuple[int, DNSRecord]:
    """Size and content of the reply to a question about a service with a long name."""
    name = "x" * 62
    state = store.Directory()
    for command in (store.CreateService(name), *(store.PutInstance(name, one) for one in instances)):
        state = store.apply(state, state.index + 1, command).state
    query = DNSRecord.question(f"_{name}._http.discoverd", qtype)
    if edns:
        query.add_ar(EDNS0(udp_len=edns))
    query = DNSRecord.parse(query.pack())
    reply = dns.answer(query, state, transport, recursive=False, now=1, shuffle=list)
    raw = dns.packed(reply, query, transport)
    return len(raw), DNSRecord.parse(raw)


@pytest.mark.parametrize(
    ("edns", "limit", "records", "tc"),
    [(0, 512, 5, 1), (100, 512, 5, 1), (512, 512, 5, 1), (600, 600, 6, 0), (4096, 1232, 6, 0), (65535, 1232, 6, 0)],
)
def test_a_reply_too_large_for_the_asker_is_cut_and_says_so(edns: int, limit: int, records: int, tc: int) -> None:
    size, reply = cut("ANY", Transport.UDP, BIG, edns)
    assert size <= limit
    assert (len(reply.rr), reply.header.tc) == (records, tc)
    assert bool([record for record in reply.ar if record.rtype == QTYPE.OPT]) is bool(edns)


def test_even_a_connection_carries_no_more_than_64_kilobytes() -> None:
    thousands = [Instance.at(f"10.{n >> 8}.{n & 255}.1:80", "http") for n in range(1500)]
    size, reply = cut("SRV", Transport.TCP, thousands)
    assert (size <= 65535, reply.header.tc, reply.ar) == (True, 1, [])
    assert len(reply.rr) > 450
    size, reply = cut("SRV", Transport.TCP, thousands[:250])
    assert (reply.header.tc, len(reply.rr), len(reply.ar)) == (0, 250, 250)


@pytest.mark.parametrize("transport", Transport)
@pytest.mark.parametrize("spelling", ["lower", "upper", "title"])
@pytest.mark.parametrize("qtype", ["A", "AAAA", "ANY", "SRV", "SOA", "NS", "TXT"])
@pytest.mark.parametrize(
    ("name", "rcode"),
    [
        ("web", 0), ("_web._http", 0), ("_web._tcp", 0), ("_web._udp", 0), (f"{SIX.id}.web._i", 0), ("leader.web", 0),
        ("nope", 3), ("empty", 3), ("_nope._http", 3), (f"{SIX.id}.big._i", 3), ("leader.empty", 3), ("leader.nope", 3),
    ],
)  # fmt: skip
def test_every_kind_of_question_by_every_way_in_any_spelling(
    name: str, rcode: int, qtype: str, spelling: str, transport: Transport
) -> None:
    asked: str = getattr(f"{name}.discoverd", spelling)()
    reply = ask(asked, qtype, transport)
    assert reply.record.header.rcode == rcode
    plain = ask(f"{name}.discoverd", qtype, transport)
    assert [line.lower() for line in reply.answer] == [line.lower() for line in plain.answer]
    assert [line.lower() for line in reply.additional] == [line.lower() for line in plain.additional]
    assert all(line.startswith(f"{asked}. ") for line in reply.answer if qtype != "SOA")
    assert reply.authority == ([] if reply.answer else [SOA])
    assert (reply.record.header.aa, reply.record.header.tc) == (1, 0)


GOLDEN = Path(__file__).parent / "golden" / "dns.txt"


def golden() -> str:
    """What goes over the wire, byte for byte; `REGENERATE=1` writes it anew, to be looked at as a difference."""
    lines = []
    for name, qtype, transport, edns in (
        ("web.discoverd", "A", Transport.UDP, 0),
        ("WEB.Discoverd", "AAAA", Transport.UDP, 0),
        ("_web._http.discoverd", "SRV", Transport.UDP, 0),
        ("_web._tcp.discoverd", "SRV", Transport.TCP, 0),
        ("_web._tcp.discoverd", "ANY", Transport.UDP, 1232),
        ("leader.web.discoverd", "A", Transport.TCP, 0),
        ("leader.web.discoverd", "SRV", Transport.TCP, 0),
        (f"{ONE.id}.web._i.discoverd", "ANY", Transport.UDP, 0),
        ("nope.discoverd", "A", Transport.UDP, 0),
        ("web.discoverd", "TXT", Transport.UDP, 0),
        ("discoverd", "SOA", Transport.UDP, 0),
        ("discoverd", "NS", Transport.UDP, 4096),
    ):
        query = DNSRecord.question(name, qtype)
        query.header.id = 0x1234
        if edns:
            query.add_ar(EDNS0(udp_len=edns))
        query = DNSRecord.parse(query.pack())
        reply = dns.answer(query, STATE, transport, recursive=True, now=1000, shuffle=list)
        lines += [f"{name} {qtype} {transport.value} {edns}", dns.packed(reply, query, transport).hex(" ", -4), ""]
    return "\n".join(lines)


def test_replies_are_byte_exact() -> None:
    if os.environ.get("REGENERATE"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(golden())
    assert golden() == GOLDEN.read_text()


def test_what_is_no_query_is_refused() -> None:
    notify = DNSRecord.question("web.discoverd")
    notify.header.opcode = OPCODE.NOTIFY
    refused = dns.refusal(notify, recursive=False)
    assert refused is not None
    assert (refused.header.rcode, refused.header.opcode) == (RCODE.NOTIMP, OPCODE.NOTIFY)
    future = DNSRecord.question("web.discoverd")
    future.add_ar(EDNS0(version=1))
    refused = dns.refusal(DNSRecord.parse(future.pack()), recursive=False)
    assert refused is not None
    reply = DNSRecord.parse(refused.pack())
    assert [(one.edns_ver, one.edns_rcode) for one in reply.ar] == [(0, 1)]
    assert dns.refusal(DNSRecord.question("web.discoverd"), recursive=False) is None


def test_edns_is_answered_and_never_unasked() -> None:
    assert [record.rtype for record in ask("web.discoverd", edns=4096).record.ar] == [QTYPE.OPT]
    assert ask("web.discoverd").record.ar == []


def test_rubbish_gets_a_format_error_or_nothing() -> None:
    reply = DNSRecord.parse(dns.malformed(b"\x12\x34\x01\x00" + b"\xff" * 20) or b"")
    assert (reply.header.id, RCODE[reply.header.rcode]) == (0x1234, "FORMERR")
    assert dns.malformed(b"short") is None
    assert dns.malformed(b"\x12\x34\x81\x00" + b"\x00" * 20) is None


@pytest.mark.parametrize("name", ["example.com", "notdiscoverd", "discoverd.com", "."])
def test_other_zones_are_not_ours(name: str) -> None:
    assert not dns.in_zone(DNSRecord.question(name))
