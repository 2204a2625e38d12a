"""The aggregator as hosts, the controller and other aggregators meet it: TLS, frames in, JSON out."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flynn.aio.clock import SystemClock
from flynn.http.client import HttpClient
from flynn.http.server import listen
from flynn.identity import Identity
from flynn.identity.authority import ClusterCA
from flynn.identity.peer import Peer, PeerKind
from flynn.logaggregator import client
from flynn.logaggregator.api import logaggregator_api
from flynn.logaggregator.buffer import Logs
from flynn.logaggregator.collector import Collector
from flynn.logaggregator.rfc5424 import Message, Stream, encode, frame
from flynn.types.errors import Forbidden, ValidationError
from flynn.types.instance import Instance

START = datetime(2020, 1, 2, 3, 4, 5, 678900, tzinfo=UTC)
JOB = "host1-0b4d4b7e-5f7a-4a7e-9a3e-2f1f0d7f4c11"


def message(n: int, text: bytes = b"hello", stream: Stream = Stream.STDOUT) -> Message:
    return Message(
        time=START + timedelta(seconds=n),
        seq=n,
        host="host1",
        app="app",
        process=f"web.{JOB}",
        stream=stream,
        text=text,
    )


@dataclass
class Aggregator:
    logs: Logs
    instance: Instance
    ca: ClusterCA
    directory: Path
    clients: list[client.LogAggregator] = field(default_factory=list)

    def identity(self, peer: Peer) -> Identity:
        self.ca.issue(peer, []).write(self.directory / str(peer))
        return Identity.load(self.directory / str(peer))

    def host(self) -> Identity:
        return self.identity(Peer(PeerKind.HOST, "host1"))

    def app(self, name: str) -> Identity:
        return self.identity(Peer(PeerKind.APP, name, "web"))

    async def send(self, *messages: Message) -> None:
        async with client.sending(self.instance, self.host()) as stream:
            for m in messages:
                stream.write(frame(encode(m)))
            await stream.drain()
            await self.until(lambda: all(m.cursor <= self.logs.cursors.get(m.host, (START, -1)) for m in messages))

    async def until(self, condition) -> None:  # type: ignore[no-untyped-def]  # a predicate
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.005)


@pytest.fixture
async def aggregator(tmp_path: Path) -> AsyncIterator[Aggregator]:
    ca = ClusterCA.create()
    ca.issue_job("logaggregator", "app", "logaggregator", []).write(tmp_path / "own")
    own = Identity.load(tmp_path / "own")
    logs = Logs()
    async with (
        listen(logaggregator_api(logs, SystemClock()), "127.0.0.1", 0, tls=own) as (_, api_port),
        Collector(logs).listening("127.0.0.1", 0, own.server_context()) as port,
    ):
        instance = Instance.at(f"127.0.0.1:{port}", "tcp", {client.API_PORT: str(api_port)})
        yield Aggregator(logs, instance, ca, tmp_path)


async def read(reader: client.LogAggregator, app: str = "app", **params: str) -> bytes:
    async with reader.log(app, params) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def test_a_line_from_host_to_reader(aggregator: Aggregator) -> None:
    await aggregator.send(message(1), message(2, b"a <b> & \xff \xe2\x80\xa8", Stream.STDERR))
    async with client.at(aggregator.instance, aggregator.app("controller")) as reader:
        assert (await read(reader)).decode() == (
            f'{{"host_id":"host1","job_id":"{JOB}","msg":"hello","process_type":"web","source":"app",'
            '"stream":"stdout","timestamp":"2020-01-02T03:04:06.6789Z"}\n'
            f'{{"host_id":"host1","job_id":"{JOB}","msg":"a \\u003cb\\u003e \\u0026 \ufffd \\u2028",'
            '"process_type":"web","source":"app","stream":"stderr","timestamp":"2020-01-02T03:04:07.6789Z"}\n'
        )
        assert (await read(reader, lines="1")).count(b"\n") == 1
        assert await read(reader, stream_types="init") == b""
        assert await read(reader, process_type="") == b""
        assert (await read(reader, job_id=JOB)).count(b"\n") == 2
        assert await read(reader, app="unknown") == b""


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ("x", 'lines strconv.Atoi: parsing "x": invalid syntax'),
        ("10001", "lines lines must be an integer between 0 and 10000"),
        ("-1", "lines lines must be an integer between 0 and 10000"),
        ("9" * 400, "lines lines must be an integer between 0 and 10000"),
    ],
)
async def test_bad_numbers_of_lines(aggregator: Aggregator, lines: str, text: str) -> None:
    async with client.at(aggregator.instance, aggregator.app("controller")) as reader:
        with pytest.raises(ValidationError) as refusal:
            await read(reader, lines=lines)
    assert (refusal.value.message, refusal.value.detail) == (text, {"field": "lines"})


async def test_following_gives_history_then_news_without_gap(aggregator: Aggregator) -> None:
    await aggregator.send(message(1, b"1"), message(2, b"2"))
    async with client.at(aggregator.instance, aggregator.app("controller")) as reader:
        async with reader.log("app", {"follow": "true", "lines": "1"}) as chunks:
            seen = b""
            await aggregator.send(message(3, b"3"))
            async with asyncio.timeout(5):
                async for chunk in chunks:
                    seen += chunk
                    if seen.count(b"\n") == 2:
                        break
        assert b'"msg":"1"' not in seen
        assert seen.index(b'"msg":"2"') < seen.index(b'"msg":"3"')
    await aggregator.until(lambda: not aggregator.logs._followers)


async def test_hosts_learn_what_is_there_and_new_instances_take_it_over(aggregator: Aggregator) -> None:
    await aggregator.send(*(message(n, b"%d" % n) for n in range(1, 2001)))
    async with client.at(aggregator.instance, aggregator.host()) as host:
        cursors = await host.cursors()
        assert (cursors["host1"].time, cursors["host1"].seq) == message(2000).cursor
    async with client.at(aggregator.instance, aggregator.app("logaggregator")) as peer:
        taken = [m async for m in peer.snapshot()]
    assert taken == [message(n, b"%d" % n) for n in range(1, 2001)]


async def test_a_bad_message_is_skipped_and_a_bad_frame_ends_the_connection(aggregator: Aggregator) -> None:
    async with client.sending(aggregator.instance, aggregator.host()) as stream:
        stream.write(frame(b"<1>1 2020-01-02T03:04:05Z host") + frame(encode(message(1))))
        await aggregator.until(lambda: aggregator.logs.cursors)
        stream.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await stream.read() == b""
    await aggregator.send(message(2))


async def test_only_hosts_send_and_only_the_platform_reads(aggregator: Aggregator) -> None:
    async with client.sending(aggregator.instance, aggregator.app("controller")) as stream:
        stream.write(frame(encode(message(1))))
        assert await stream.read() == b""
    assert not aggregator.logs.cursors
    async with client.at(aggregator.instance, aggregator.app("shop")) as other:
        with pytest.raises(Forbidden):
            await read(other)
    stranger = ssl.create_default_context(cadata=aggregator.ca.pem.decode())
    url = f"https://127.0.0.1:{aggregator.instance.meta[client.API_PORT]}"
    async with HttpClient(url, tls=stranger, server_name=client.SERVER_NAME) as nobody:
        with pytest.raises(Exception, match="unreachable"):
            await nobody.get("/log/app")
