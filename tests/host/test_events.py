"""Events of jobs: in order, numbered for who asks, found again after an interruption, and never waited for."""

from __future__ import annotations

import asyncio
import ssl
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest

from flynn.aio.broadcast import Overflowed
from flynn.host.client import HostClient
from flynn.host.jobs.events import JobEvents
from flynn.http.client import HttpClient
from flynn.http.server import Api, EventStream, Request, listen
from flynn.http.sse import FrameDecoder
from flynn.identity import Identity
from flynn.identity.access import ANYONE
from flynn.types.codec import decode
from flynn.types.errors import PreconditionFailed
from flynn.types.host import ContainerConfig, HostJob, JobEvent, JobEventKind, JobStatus, Mountspec

from .machine import META, TestMachine, run_to_end

NOW = datetime(2026, 1, 5, tzinfo=UTC)


def event(job_id: str = "h-1") -> JobEvent:
    return JobEvent(event=JobEventKind.CREATE, job_id=job_id)


def test_numbers_grow_without_gaps_and_the_next_daemon_begins_above_them() -> None:
    events = JobEvents(NOW)
    before = events.last
    for _ in range(1000):
        events.publish(event())
    assert [one.number for one in events.after(before)] == list(range(before + 1, before + 1001))
    assert JobEvents(NOW.replace(second=1)).last > events.last


def test_what_is_not_known_any_more_is_refused_rather_than_left_out() -> None:
    events = JobEvents(NOW, kept=3)
    first = events.last
    for _ in range(3):
        events.publish(event())
    assert len(events.after(first)) == 3
    events.publish(event())
    with pytest.raises(PreconditionFailed):
        events.after(first)
    assert len(events.after(first + 1)) == 3
    assert events.after(events.last) == []
    with pytest.raises(PreconditionFailed):
        events.after(events.last + 1)  # of a daemon whose clock was ahead


async def test_a_reader_that_is_too_far_behind_is_cut_off_and_holds_up_nobody() -> None:
    events = JobEvents(NOW)
    async with events.subscribe(limit=10) as slow, events.subscribe(limit=100) as quick:
        for _ in range(50):
            events.publish(event())
        assert [(await anext(quick)).number for _ in range(50)][-1] == events.last
        assert len([await anext(slow) for _ in range(10)]) == 10
        with pytest.raises(Overflowed):
            await anext(slow)


async def test_a_reader_that_takes_nothing_is_disconnected() -> None:
    """It stops reading, its socket's buffers fill, and after some patience the connection is gone."""
    ended = asyncio.Event()

    async def endless(request: Request) -> EventStream:
        async def items() -> AsyncIterator[str]:
            try:
                while True:
                    yield "x" * 10_000
                    await asyncio.sleep(0)
            finally:
                ended.set()

        return EventStream(items(), patience=0.2)

    api = Api("test")
    api.route("GET", "/events", endless, allow=ANYONE)
    async with asyncio.timeout(30), listen(api, "127.0.0.1", 0) as (host, port):
        _, writer = await asyncio.open_connection(host, port, limit=1024)
        writer.write(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        await ended.wait()
        async with HttpClient(f"http://{host}:{port}") as http:
            assert await http.get("/ping", answer=bytes) is not None
        writer.close()


# On a real daemon


def job(image: Mountspec) -> HostJob:
    config = ContainerConfig(args=["true"])
    return HostJob(id=f"node1-{uuid.uuid4()}", mountspecs=[image], metadata=META, config=config)


@asynccontextmanager
async def raw_stream(
    machine: TestMachine, path: str, headers: str = ""
) -> AsyncIterator[tuple[asyncio.StreamReader, int]]:
    """What comes behind the head of an event stream, and where the head says that it begins."""
    context = Identity.load(machine.state / "identity").client_context()
    assert isinstance(context, ssl.SSLContext)
    reader, writer = await asyncio.open_connection(machine.ip, 1113, ssl=context)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n{headers}\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK"), head
    assert b"Content-Type: text/event-stream; charset=utf-8" in head
    try:
        yield reader, int(head.partition(b"Last-Event-ID: ")[2].partition(b"\r")[0])
    finally:
        writer.close()


async def chunk(reader: asyncio.StreamReader) -> bytes:
    size = int(await reader.readuntil(b"\r\n"), 16)
    data = await reader.readexactly(size)
    await reader.readexactly(2)
    return data


async def until_cleanup(reader: asyncio.StreamReader) -> bytes:
    data = b""
    async with asyncio.timeout(20):
        while b'"event":"cleanup"' not in data or not data.endswith(b"\n\n"):
            data += await chunk(reader)
    return data


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("headers", ["", "Last-Event-Id: 0\r\n"])
async def test_clients_of_the_original_get_what_the_original_sent(
    machine: TestMachine, host: HostClient, image: Mountspec, headers: str
) -> None:
    """Nothing but `data: <json>` and one blank line: their reader takes everything else for an event."""
    wanted = job(image)
    async with raw_stream(machine, f"/host/jobs/{wanted.id}", headers) as (reader, _):
        await host.add_job(wanted)
        data = await until_cleanup(reader)
    messages = data.removesuffix(b"\n\n").split(b"\n\n")
    assert all(message.startswith(b'data: {"event":"') and b"\n" not in message for message in messages)
    found = [decode(message.removeprefix(b"data: "), JobEvent) for message in messages]
    kinds = JobEventKind
    assert [one.event for one in found] == [kinds.CREATE, kinds.START, kinds.STOP, kinds.CLEANUP]


@pytest.mark.root
@pytest.mark.slow
async def test_who_asks_gets_numbers_and_who_comes_back_gets_what_he_missed(
    machine: TestMachine, host: HostClient, image: Mountspec
) -> None:
    async with raw_stream(machine, "/host/jobs?numbered=true") as (_, begin):
        pass
    first, second = job(image), job(image)
    await run_to_end(host, first)
    await run_to_end(host, second)
    async with raw_stream(machine, "/host/jobs", f"Last-Event-ID: {begin}\r\n") as (reader, _):
        data = b""
        while data.count(b"data: ") < 8:
            data += await chunk(reader)
    frames = FrameDecoder().feed(data)
    assert [int(frame.id) for frame in frames] == list(range(begin + 1, begin + 9))
    assert [decode(frame.data, JobEvent).job_id for frame in frames] == [first.id] * 4 + [second.id] * 4
    async with raw_stream(machine, f"/host/jobs/{second.id}", f"Last-Event-ID: {begin + 6}\r\n") as (reader, _):
        data = b""
        while data.count(b"data: ") < 2:
            data += await chunk(reader)
    assert [frame.id for frame in FrameDecoder().feed(data)] == [str(begin + 7), str(begin + 8)]


@pytest.mark.root
@pytest.mark.slow
async def test_the_client_follows_through_broken_connections_and_says_when_it_cannot(
    machine: TestMachine, host: HostClient, image: Mountspec
) -> None:
    """A proxy that cuts the wire: no event is lost or doubled. A daemon that is another one: that is said."""
    cut: set[asyncio.StreamWriter] = set()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, sending = await asyncio.open_connection(machine.ip, 1113)
        cut.update((writer, sending))
        await asyncio.gather(pipe(reader, sending), pipe(upstream, writer))

    jobs = [job(image) for _ in range(3)]
    kinds = [JobEventKind.CREATE, JobEventKind.START, JobEventKind.STOP, JobEventKind.CLEANUP]
    async with asyncio.timeout(60), await asyncio.start_server(forward, "127.0.0.1", 0) as proxy:
        identity = Identity.load(machine.state / "identity")
        port = proxy.sockets[0].getsockname()[1]
        async with HttpClient(f"https://127.0.0.1:{port}", tls=identity, server_name=machine.ip) as http:
            async with HostClient(http).following() as events:
                seen: list[JobEvent] = []
                for wanted in jobs:
                    for writer in cut:
                        writer.transport.abort()
                    cut.clear()
                    await run_to_end(host, wanted)
                    while len(seen) < 4 * (jobs.index(wanted) + 1):
                        seen.append(await anext(events))
                assert [(one.job_id, one.event) for one in seen] == [(j.id, kind) for j in jobs for kind in kinds]
                machine.end()
                machine.start()
                with pytest.raises(PreconditionFailed):
                    await anext(events)
    async with machine.client() as again:
        assert (await again.job(jobs[0].id)).status is JobStatus.DONE
