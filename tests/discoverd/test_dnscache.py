"""Answers that are remembered: for how long, for whom, and what of them changes meanwhile."""

from __future__ import annotations

import pytest
from dnslib import EDNS0, RCODE, RR, SOA, A, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from flynn.discoverd import dnscache
from flynn.discoverd.dnscache import Cache


def question(name: str = "example.com", id: int = 1) -> bytes:
    query = DNSRecord.question(name)
    query.header.id = id
    return bytes(query.pack())


def reply(
    query: bytes, *ttls: int, rcode: int = RCODE.NOERROR, soa: tuple[int, int] | None = None, tc: int = 0
) -> bytes:
    """`soa`: its time to live, and its minimum."""
    answer = DNSRecord.parse(query).reply()
    answer.header.rcode, answer.header.tc = rcode, tc
    for number, ttl in enumerate(ttls):
        answer.add_answer(RR(answer.q.qname, rdata=A(f"192.0.2.{number}"), ttl=ttl))
    if soa is not None:
        answer.add_auth(RR("com", 6, rdata=SOA("ns.com", "me.com", (1, 2, 3, 4, soa[1])), ttl=soa[0]))
    answer.add_ar(EDNS0(udp_len=1232))
    return bytes(answer.pack())


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        pytest.param(reply(question(), 300, 60, 100), 60, id="as long as its shortest record"),
        pytest.param(reply(question(), 10**6), dnscache.MAX_TTL, id="but not for days"),
        pytest.param(reply(question(), 0, 60), 0, id="not at all, if a record says so"),
        pytest.param(reply(question(), 300, tc=1), 0, id="not what was cut"),
        pytest.param(reply(question(), 300, rcode=RCODE.SERVFAIL), 0, id="not a failure"),
        pytest.param(reply(question(), rcode=RCODE.NXDOMAIN, soa=(50, 40)), 40, id="a name that is not there: minimum"),
        pytest.param(reply(question(), rcode=RCODE.NXDOMAIN, soa=(30, 40)), 30, id="or the time to live of the SOA"),
        pytest.param(reply(question(), soa=(900, 900)), dnscache.MAX_NEGATIVE_TTL, id="nothing of that type, not long"),
        pytest.param(reply(question(), rcode=RCODE.NXDOMAIN), 0, id="without a SOA nobody allowed it"),
        pytest.param(reply(question(), 300)[:-20], 0, id="not what is broken"),
    ],
)
def test_how_long(answer: bytes, seconds: int) -> None:
    cache = Cache()
    cache.put(question(), answer, now=1000)
    assert (cache.get(question(), 1000 + seconds - 0.1) is not None) is (seconds > 0)
    assert cache.get(question(), 1000 + seconds) is None
    assert len(cache) == 0


def test_the_time_to_live_runs_down_and_the_id_is_the_askers() -> None:
    cache = Cache()
    cache.put(question(id=1), reply(question(id=1), 300, 60), now=1000)
    raw = cache.get(question(id=2), 1020.9)
    assert raw is not None
    answer = DNSRecord.parse(raw)
    assert (answer.header.id, [record.ttl for record in answer.rr]) == (2, [280, 40])
    assert answer.ar[0].rtype == 41 and answer.ar[0].rclass == 1232, "the options are no record with a time to live"


def test_another_question_has_another_answer() -> None:
    cache = Cache()
    cache.put(question(), reply(question(), 300), now=0)
    assert cache.get(question("example.org"), 1) is None
    assert cache.get(question("EXAMPLE.com"), 1) is None, "spelling is repeated in the answer, and some check that"
    with_options = DNSRecord.question("example.com")
    with_options.add_ar(EDNS0(udp_len=1232))
    assert cache.get(bytes(with_options.pack()), 1) is None


def test_there_are_never_too_many() -> None:
    cache = Cache(limit=3)
    for number in range(5):
        cache.put(question(f"{number}.com"), reply(question(f"{number}.com"), 300), now=0)
        cache.get(question("0.com"), 1)
    assert [bool(cache.get(question(f"{number}.com"), 1)) for number in range(5)] == [True, False, False, True, True]


@pytest.mark.parametrize(
    ("query", "answer", "fits"),
    [
        (question(), reply(question(), 1), True),
        (question(), reply(question("EXAMPLE.com"), 1), True),
        (question(), reply(question(id=2), 1), False),
        (question(), reply(question("example.org"), 1), False),
        (question(), question(), False),
        (question(), reply(question(), 1)[:15], False),
        (question(), b"", False),
    ],
)
def test_what_can_be_an_answer(query: bytes, answer: bytes, fits: bool) -> None:
    assert dnscache.answers(query, answer) is fits


@given(st.binary(max_size=200))
def test_rubbish_is_neither_kept_nor_harmful(rubbish: bytes) -> None:
    cache = Cache()
    raw = question()[:2] + b"\x81\x80" + rubbish
    dnscache.answers(question(), raw)
    if len(raw) >= 12:
        cache.put(question(), raw, 0)
        cache.get(question(), 1)
