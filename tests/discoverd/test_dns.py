"""DNS answers as text: one line per question, the reply's records in the form of dig."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from dnslib import EDNS0, QTYPE, RCODE, DNSRecord

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
    reply = dns.answer(query, STATE, transport, recursive=True, now=1000, shuffle=list)
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


def test_a_reply_too_large_for_the_asker_is_cut_and_says_so() -> None:
    name = f"_{'x' * 50}._http.discoverd"
    state = store.Directory()
    for command in (store.CreateService("x" * 50), *(store.PutInstance("x" * 50, one) for one in BIG)):
        state = store.apply(state, state.index + 1, command).state
    query = DNSRecord.question(name, "ANY")
    reply = dns.answer(query, state, Transport.UDP, recursive=False, now=1, shuffle=list)
    raw = dns.packed(reply, query, Transport.UDP)
    assert len(raw) <= 512
    parsed = DNSRecord.parse(raw)
    assert len(parsed.rr) == 6 or parsed.header.tc


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
