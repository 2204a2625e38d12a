"""The short way gives the bytes of the long way, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import pytest
from dnslib import EDNS0, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from flynn.discoverd import dns
from flynn.discoverd.dns import Transport
from flynn.discoverd.shortcut import Shortcut
from flynn.discoverd.store import Directory, Service
from flynn.types.codec import replace
from flynn.types.instance import Instance

T = TypeVar("T")

NOW = 1577934245
HOSTS = ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "[fd00::1]", "[fd00::2]", "db.example.com", "")


def state_of(**services: Sequence[str]) -> Directory:
    found = {}
    for name, hosts in services.items():
        instances = [replace(Instance.at(f"{host}:{8000 + n}", "http"), index=n + 1) for n, host in enumerate(hosts)]
        found[name] = Service(instances={one.id: one for one in instances})
    return Directory(index=9, services=found)


STATE = state_of(web=HOSTS[:5], two=("10.0.0.1", "10.0.0.1"), six=("[fd00::1]", "10.0.0.7"), none=("db.example.com",))


def backwards(items: Sequence[T]) -> list[T]:
    return list(reversed(items))


def both(raw: bytes, state: Directory, *, recursive: bool = True) -> tuple[bytes | None, bytes]:
    query = DNSRecord.parse(raw)
    reply = dns.answer(query, state, Transport.UDP, recursive=recursive, now=NOW, shuffle=backwards)
    short = Shortcut().answer(raw, state, recursive=recursive, now=NOW, shuffle=backwards)
    return short, dns.packed(reply, query, Transport.UDP)


def asked(name: str, kind: str = "A", *, edns: bool = False, rd: int = 1, id: int = 4711) -> bytes:
    query = DNSRecord.question(name, kind)
    query.header.id, query.header.rd = id, rd
    if edns:
        query.add_ar(EDNS0(udp_len=4096))
    return bytes(query.pack())


@pytest.mark.parametrize("edns", [False, True], ids=["plain", "EDNS"])
@pytest.mark.parametrize("kind", ["A", "AAAA"])
@pytest.mark.parametrize("name", ["web.discoverd", "Web.DISCOVERD", "two.discoverd", "six.discoverd", "none.discoverd"])
def test_the_usual_query_is_answered_in_the_same_bytes(name: str, kind: str, edns: bool) -> None:
    short, long = both(asked(name, kind, edns=edns), STATE)
    assert short == long or (short, name, kind) == (None, "Web.DISCOVERD", "AAAA")  # an odd spelling, and no address


@given(
    hosts=st.lists(st.sampled_from(HOSTS), min_size=1, max_size=8),
    kind=st.sampled_from(["A", "AAAA"]),
    edns=st.booleans(),
    rd=st.integers(0, 1),
    id=st.integers(0, 65535),
    recursive=st.booleans(),
)
def test_it_is_so_for_all_services(hosts: list[str], kind: str, edns: bool, rd: int, id: int, recursive: bool) -> None:
    raw = asked("web.discoverd", kind, edns=edns, rd=rd, id=id)
    short, long = both(raw, state_of(web=hosts), recursive=recursive)
    assert short == long


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gone.discoverd", "A"),
        ("discoverd", "A"),
        ("leader.web.discoverd", "A"),
        ("_web._http.discoverd", "A"),
        ("web.example.com", "A"),
        ("web.discoverd", "SRV"),
        ("web.discoverd", "ANY"),
        ("web.discoverd", "SOA"),
    ],
)
def test_everything_else_goes_the_long_way(name: str, kind: str) -> None:
    assert both(asked(name, kind), STATE)[0] is None


@given(st.data())
def test_a_query_that_is_damaged_gets_no_other_answer(data: st.DataObject) -> None:
    raw = bytearray(asked("web.discoverd", edns=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    short = Shortcut().answer(cut, STATE, recursive=True, now=NOW, shuffle=backwards)
    if short is not None:
        assert short == both(cut, STATE)[1]


@given(st.binary(max_size=80))
def test_noise_has_no_answer(noise: bytes) -> None:
    assert Shortcut().answer(noise, STATE, recursive=True, now=NOW, shuffle=backwards) is None


def test_a_change_of_the_service_is_seen_at_once() -> None:
    shortcut = Shortcut()
    for hosts in (("10.0.0.1",), ("10.0.0.2",), ("10.0.0.1",)):
        reply = shortcut.answer(asked("web.discoverd"), state_of(web=hosts), recursive=True, now=NOW, shuffle=backwards)
        assert reply is not None
        assert [str(record.rdata) for record in DNSRecord.parse(reply).rr] == list(hosts)
