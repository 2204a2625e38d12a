"""Sinks on a real daemon: what operators set up is kept whole, and every line arrives once, whatever breaks."""

from __future__ import annotations

import asyncio
import re
import signal
import ssl
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from flynn.host.client import HostClient
from flynn.identity import Identity
from flynn.types.errors import NotFound, ValidationError
from flynn.types.host import ContainerConfig, HostJob, Mountspec
from flynn.types.sink import SinkInfo

from .machine import META, TestMachine, eventually, run_to_end

pytestmark = [pytest.mark.root, pytest.mark.slow]


class Collector:
    """A syslog server that keeps what it is sent, and can be closed and opened again on its port."""

    def __init__(self, address: str, context: ssl.SSLContext | None = None) -> None:
        self.address, self.context, self.port, self.data = address, context, 0, b""
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while chunk := await reader.read(65536):
                self.data += chunk
        except OSError:
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.address, self.port, ssl=self.context)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def frames(self) -> list[str]:
        """The messages of RFC 6587 framing."""
        found, rest = [], self.data
        while match := re.match(rb"(\d+) ", rest):
            size = int(match[1])
            found.append(rest[match.end() : match.end() + size].decode())
            rest = rest[match.end() + size :]
        return found


@asynccontextmanager
async def collector(address: str, context: ssl.SSLContext | None = None) -> AsyncIterator[Collector]:
    made = Collector(address, context)
    await made.open()
    try:
        yield made
    finally:
        made.close()


def job(image: Mountspec, script: str) -> HostJob:
    config = ContainerConfig(args=["sh", "-c", script], env={"TIER": "gold"})
    return HostJob(id=f"node1-{uuid.uuid4()}", mountspecs=[image], metadata=META, config=config)


@asynccontextmanager
async def sink(host: HostClient, kind: str = "syslog", **config: Any) -> AsyncIterator[str]:
    sink_id = f"s-{uuid.uuid4()}"
    await host.put_sink(SinkInfo(id=sink_id, kind=kind, config=config))
    try:
        yield sink_id
    finally:
        await host.delete_sink(sink_id)


async def test_lines_arrive_in_the_form_that_was_asked_for(
    machine: TestMachine, host: HostClient, image: Mountspec
) -> None:
    template = '[{{index .Metadata "flynn-controller.app_name"}}/{{.Config.Env.TIER}}{{if .Config.TTY}} tty{{end}}]'
    async with collector(machine.outside) as plain, collector(machine.outside) as prefixed:
        url, other = f"syslog://{machine.outside}:{plain.port}", f"syslog://{machine.outside}:{prefixed.port}"
        async with (
            sink(host, url=url, template=template, use_ids=True, structured_data=True),
            sink(host, url=other, template=template, format="prefixed_newline"),
        ):
            wanted = job(image, "echo first; echo second >&2")
            await run_to_end(host, wanted)

            async def arrived() -> bool:
                return (
                    sum(wanted.id in frame for frame in plain.frames()) == 2
                    and prefixed.data.count(wanted.id.encode()) == 2
                )

            await eventually(arrived)
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
    source = f"web\\.{wanted.id}"
    app = META["flynn-controller.app"]
    first, second = [frame for frame in plain.frames() if wanted.id in frame]
    assert re.fullmatch(rf'<190>1 {stamp} node1 {app} {source} ID1 \[flynn seq="\d+"\] \[shop/gold\] first', first)
    assert re.fullmatch(rf'<190>1 {stamp} node1 {app} {source} ID2 \[flynn seq="\d+"\] \[shop/gold\] second', second)
    lines = [line for line in prefixed.data.decode().splitlines() if wanted.id in line]
    assert re.fullmatch(rf"\[shop/gold\] <190>1 {stamp} node1 shop {source} ID1 - first", lines[0])


async def test_everything_about_a_sink_is_kept_and_no_line_is_lost_over_broken_connections_and_daemons(
    machine: TestMachine, host: HostClient, image: Mountspec
) -> None:
    async with collector(machine.outside) as server:
        config = {
            "url": f"syslog://{machine.outside}:{server.port}",
            "template": "{{.ID}}",
            "use_ids": True,
            "insecure": True,
            "structured_data": True,
            "format": "rfc6587",
        }
        async with sink(host, **config) as sink_id:

            async def has(word: str) -> bool:
                return any(frame.endswith(f" {word}") for frame in server.frames())

            await run_to_end(host, job(image, "echo before"))
            await eventually(lambda: has("before"))
            server.close()
            await run_to_end(host, job(image, "echo meanwhile"))
            await server.open()
            await eventually(lambda: has("meanwhile"), 30)
            machine.end(signal.SIGKILL)
            machine.start()  # not in a thread: the daemon ends with the thread that has started it
            (kept,) = [one for one in await host.sinks() if one.id == sink_id]
            assert (kept.kind, kept.config) == ("syslog", config)
            await run_to_end(host, job(image, "echo afterwards"))
            await eventually(lambda: has("afterwards"), 30)
            ends = [frame.rsplit(" ", 1)[1] for frame in server.frames()]
            assert [end for end in dict.fromkeys(ends) if end in ("before", "meanwhile", "afterwards")] == [
                "before", "meanwhile", "afterwards",
            ]  # fmt: skip
            machine.end()
            machine.start()
            await run_to_end(host, job(image, "echo again"))
            await eventually(lambda: has("again"), 30)
            assert [frame.endswith(" afterwards") for frame in server.frames()].count(True) == 1
            # What was changed counts from now on.
            async with collector(machine.outside) as elsewhere:
                await host.put_sink(
                    SinkInfo(id=sink_id, kind="syslog", config={"url": f"syslog://{machine.outside}:{elsewhere.port}"})
                )
                await run_to_end(host, job(image, "echo moved"))

                async def moved() -> bool:
                    return any(frame.endswith(" moved") for frame in elsewhere.frames())

                await eventually(moved, 30)
                assert not any(frame.endswith(" before") for frame in elsewhere.frames())
        assert sink_id not in [one.id for one in await host.sinks()]
        with pytest.raises(NotFound, match="couldn't be found"):
            await host.delete_sink(sink_id)


async def test_tls_is_verified_unless_it_is_not_to_be(machine: TestMachine, host: HostClient, image: Mountspec) -> None:
    context = Identity.load(machine.state / "identity").server_context(require_client=False)
    async with collector(machine.outside, context) as strict, collector(machine.outside, context) as lax:
        async with (
            sink(host, url=f"syslog+tls://{machine.outside}:{strict.port}"),
            sink(host, url=f"syslog+tls://{machine.outside}:{lax.port}", insecure=True),
        ):
            await run_to_end(host, job(image, "echo encrypted"))

            async def arrived() -> bool:
                return any(frame.endswith(" encrypted") for frame in lax.frames())

            await eventually(arrived)
    assert strict.data == b""


async def test_sinks_that_make_no_sense_are_refused_by_field(host: HostClient) -> None:
    before = await host.sinks()
    for kind, config, field in (
        ("nope", {}, "kind"),
        ("", {}, "kind"),
        ("syslog", {}, "url"),
        ("syslog", {"url": "http://x"}, "url"),
        ("syslog", {"url": "syslog://x", "template": "{{.Nope}}"}, "template"),
        ("syslog", {"url": "syslog://x", "format": "x"}, "format"),
    ):
        with pytest.raises(ValidationError) as refusal:
            await host.put_sink(SinkInfo(id="x", kind=kind, config=config))
        assert refusal.value.detail == {"field": field}
    assert await host.sinks() == before


async def test_what_jobs_use_is_measured(machine: TestMachine, host: HostClient, image: Mountspec) -> None:
    wanted = job(image, "while true; do :; done")
    await host.add_job(wanted)

    async def busy() -> bool:
        return (await host.stats(wanted.id)).cpu_seconds > 0.1

    async def measured() -> bool:
        text = (await host._http.get("/metrics", answer=bytes)).decode()
        labels = f'{{job="{wanted.id}",app="{META["flynn-controller.app"]}",app_name="shop",type="web"}}'
        found = re.search(re.escape(f"flynn_host_job_cpu_seconds_total{labels}") + r" ([0-9.]+)", text)
        return found is not None and float(found[1]) > 0.1 and 'flynn_host_jobs{status="running"} 1' in text

    try:
        await eventually(busy)
        stats = await host.stats(wanted.id)
        assert (stats.memory_limit_bytes, stats.oom_kills) == (1 << 30, 0)
        assert stats.processes >= 1
        assert stats.memory_bytes > 0
        await eventually(measured)
        jobs = await host._http.get("/host/jobs", answer=dict[str, Any], params={"app": "nobody"})
        assert jobs == {}
    finally:
        await host.stop_job(wanted.id)
    with pytest.raises(NotFound):
        await host.stats("node1-nope")
