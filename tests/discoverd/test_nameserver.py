"""The sockets of the name server, and real resolvers behind it that answer, keep silent, or are not there."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from dnslib import RCODE, RR, A, DNSRecord

from flynn.aio.clock import SystemClock
from flynn.discoverd import nameserver, store
from flynn.discoverd.nameserver import Address, NameServer
from flynn.discoverd.recursion import Upstream
from flynn.types.instance import Instance
from tests.discoverd.harness import loopback_address


def directory() -> store.Directory:
    state = store.Directory()
    web = Instance.at("10.0.0.1:80", "http")
    for command in (store.CreateService("web"), store.PutInstance("web", web)):
        state = store.apply(state, state.index + 1, command).state
    return state


@asynccontextmanager
async def name_server(*upstreams: Address, address: str | None = None) -> AsyncIterator[Address]:
    server = NameServer(directory, [Upstream(*upstream) for upstream in upstreams], SystemClock())
    async with nameserver.serving((address or loopback_address(), 0), server) as bound:
        yield bound


class OtherZones(NameServer):
    """A resolver that knows everybody at 192.0.2.1, and how often it was asked."""

    def __init__(self, rcode: int = RCODE.NOERROR, ttl: int = 0, silent: bool = False) -> None:
        super().__init__(directory, [], SystemClock())
        self.asked = 0
        self._rcode, self._ttl, self._silent = rcode, ttl, silent

    def answer_at_once(self, raw: bytes, transport: object, own: str = "") -> bytes | None:
        self.asked += 1
        if self._silent:
            return None
        query = DNSRecord.parse(raw)
        reply = query.reply()
        reply.header.rcode = self._rcode
        if self._rcode == RCODE.NOERROR:
            reply.add_answer(RR(query.q.qname, rdata=A("192.0.2.1"), ttl=self._ttl))
        return bytes(reply.pack())


async def by_udp(address: Address, query: bytes, limit: float = 10) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(address)
        sock.send(query)
        async with asyncio.timeout(limit):
            return await loop.sock_recv(sock, 4096)


async def by_tcp(address: Address, *queries: bytes) -> list[bytes]:
    reader, writer = await asyncio.open_connection(*address)
    answers = []
    async with asyncio.timeout(10):
        for query in queries:
            writer.write(len(query).to_bytes(2, "big") + query)
            answers.append(await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big")))
    writer.close()
    await writer.wait_closed()
    return answers


def addresses(raw: bytes) -> list[str]:
    return [str(record.rdata) for record in DNSRecord.parse(raw).rr]


WEB, OUTSIDE = DNSRecord.question("web.discoverd").pack(), DNSRecord.question("example.com").pack()


async def test_our_zone_by_udp_and_tcp() -> None:
    async with name_server() as address:
        assert addresses(await by_udp(address, WEB)) == ["10.0.0.1"]
        assert [addresses(answer) for answer in await by_tcp(address, WEB, WEB)] == [["10.0.0.1"]] * 2


async def test_other_names_go_to_the_resolvers_of_the_host() -> None:
    outside = OtherZones()
    async with nameserver.serving((loopback_address(), 0), outside) as upstream, name_server(upstream) as address:
        assert addresses(await by_udp(address, OUTSIDE)) == ["192.0.2.1"]
        assert [addresses(answer) for answer in await by_tcp(address, OUTSIDE)] == [["192.0.2.1"]]
        assert outside.asked == 2


async def test_the_next_resolver_is_asked_when_one_is_not_there() -> None:
    nobody = (loopback_address(), 53)
    async with nameserver.serving((loopback_address(), 0), OtherZones()) as upstream:
        async with name_server(nobody, upstream) as address:
            assert addresses(await by_udp(address, OUTSIDE)) == ["192.0.2.1"]
            assert [addresses(answer) for answer in await by_tcp(address, OUTSIDE)] == [["192.0.2.1"]]


async def test_a_silent_resolver_costs_a_moment_and_is_given_its_time() -> None:
    silent, other = OtherZones(silent=True), OtherZones()
    async with (
        nameserver.serving((loopback_address(), 0), silent) as first,
        nameserver.serving((loopback_address(), 0), other) as second,
        name_server(first, second) as address,
    ):
        for ask in (by_udp, _one_by_tcp):
            before = asyncio.get_running_loop().time()
            assert addresses(await ask(address, OUTSIDE)) == ["192.0.2.1"]
            assert asyncio.get_running_loop().time() - before < 1.9
    assert (silent.asked, other.asked) == (2, 2)


async def _one_by_tcp(address: Address, query: bytes) -> bytes:
    return (await by_tcp(address, query))[0]


@pytest.mark.parametrize("rcode", [RCODE.SERVFAIL, RCODE.REFUSED])
async def test_a_resolver_that_cannot_or_will_not_is_passed_over(rcode: int) -> None:
    async with (
        nameserver.serving((loopback_address(), 0), OtherZones(rcode)) as first,
        nameserver.serving((loopback_address(), 0), OtherZones()) as second,
        name_server(first, second) as address,
    ):
        assert addresses(await by_udp(address, OUTSIDE)) == ["192.0.2.1"]
    async with nameserver.serving((loopback_address(), 0), OtherZones(rcode)) as only, name_server(only) as address:
        assert DNSRecord.parse(await by_udp(address, OUTSIDE)).header.rcode == rcode


async def test_what_may_be_remembered_is_asked_once() -> None:
    outside = OtherZones(ttl=60)
    async with nameserver.serving((loopback_address(), 0), outside) as upstream, name_server(upstream) as address:
        at_once = await asyncio.gather(*(by_udp(address, OUTSIDE) for _ in range(20)))
        later = [await by_udp(address, OUTSIDE), *await by_tcp(address, OUTSIDE)]
        assert [addresses(answer) for answer in (*at_once, *later)] == [["192.0.2.1"]] * 22
        assert {bytes(answer[:2]) for answer in (*at_once, *later)} == {bytes(OUTSIDE[:2])}
        assert outside.asked == 1


async def test_an_answer_to_another_question_is_not_believed() -> None:
    class Liar(OtherZones):
        def answer_at_once(self, raw: bytes, transport: object, own: str = "") -> bytes | None:
            lie = DNSRecord.question("elsewhere.com").reply()
            lie.add_answer(RR("elsewhere.com", rdata=A("192.0.2.66")))
            return raw[:2] + bytes(lie.pack())[2:]

    async with (
        nameserver.serving((loopback_address(), 0), Liar()) as first,
        nameserver.serving((loopback_address(), 0), OtherZones()) as second,
        name_server(first, second) as address,
    ):
        assert addresses(await by_udp(address, OUTSIDE)) == ["192.0.2.1"]
        assert [addresses(answer) for answer in await by_tcp(address, OUTSIDE)] == [["192.0.2.1"]]


@pytest.mark.slow
async def test_who_says_nothing_is_sent_away_and_delays_nobody() -> None:
    async with name_server() as address:
        silent = [await asyncio.open_connection(*address) for _ in range(20)]
        half, writer = await asyncio.open_connection(*address)
        writer.write(b"\x00")
        before = asyncio.get_running_loop().time()
        assert [addresses(answer) for answer in await by_tcp(address, WEB)] == [["10.0.0.1"]]
        assert asyncio.get_running_loop().time() - before < 1.5
        async with asyncio.timeout(nameserver.TCP_FIRST_SECONDS + 5):
            assert await half.read() == b""
            for reader, _ in silent:
                assert await reader.read() == b""
        for _, one in silent:
            one.close()
        writer.close()


async def test_more_connections_than_can_be_served_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nameserver, "MAX_CONNECTIONS", 2)
    async with name_server() as address:
        kept = [await asyncio.open_connection(*address) for _ in range(2)]
        for reader, writer in kept:
            writer.write(len(WEB).to_bytes(2, "big") + WEB)
            await reader.readexactly(2)
        reader, writer = await asyncio.open_connection(*address)
        async with asyncio.timeout(2):
            assert await reader.read() == b""
        for one in (writer, *(writer for _, writer in kept)):
            one.close()


@pytest.mark.parametrize("upstreams", [(), ((loopback_address(), 53),)])
async def test_without_a_resolver_the_answer_is_a_failure(upstreams: tuple[Address, ...]) -> None:
    async with name_server(*upstreams) as address:
        reply = DNSRecord.parse(await by_udp(address, OUTSIDE))
        assert RCODE[reply.header.rcode] == "SERVFAIL"
        assert reply.header.ra == bool(upstreams)


async def test_rubbish_does_not_harm() -> None:
    async with name_server() as address:
        reply = DNSRecord.parse(await by_udp(address, b"\x12\x34\x01\x00\x00\x01" + b"\xff" * 30))
        assert RCODE[reply.header.rcode] == "FORMERR"
        _, writer = await asyncio.open_connection(*address)
        writer.write(b"\x00")
        writer.close()
        await writer.wait_closed()
        assert addresses(await by_udp(address, WEB)) == ["10.0.0.1"]


async def test_the_address_need_not_be_there_yet() -> None:
    async with name_server(address="100.64.77.1") as address:
        assert address[0] == "100.64.77.1"


async def test_an_address_that_somebody_else_has_is_an_error() -> None:
    with socket.socket() as somebody:
        somebody.bind((loopback_address(), 0))
        with pytest.raises(OSError, match="in use"):
            async with nameserver.serving(somebody.getsockname(), NameServer(directory, [], SystemClock())):
                pass


async def test_a_successor_answers_beside_us_until_we_stop() -> None:
    ours, successor = NameServer(directory, [], SystemClock()), NameServer(directory, [], SystemClock())
    async with nameserver.serving((loopback_address(), 0), ours) as address:
        async with nameserver.serving(address, successor):
            assert addresses(await by_udp(address, WEB)) == ["10.0.0.1"]
        assert [addresses(answer) for answer in await by_tcp(address, WEB)] == [["10.0.0.1"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.2", Upstream("10.0.0.2", 53)),
        ("10.0.0.2:5353", Upstream("10.0.0.2", 5353)),
        ("fd00::2", Upstream("fd00::2", 53)),
        ("[fd00::2]:5353", Upstream("fd00::2", 5353)),
        ("localhost:5353", Upstream("127.0.0.1", 5353)),
    ],
)
def test_resolvers_are_parsed(text: str, expected: Upstream) -> None:
    parsed = Upstream.parse(text)
    assert parsed == expected or (text.startswith("localhost") and parsed.host == "::1")


@pytest.mark.parametrize("text", ["10.0.0.2:dns", "no-such-name.invalid"])
def test_what_is_no_resolver(text: str) -> None:
    with pytest.raises(ValueError):
        Upstream.parse(text)
