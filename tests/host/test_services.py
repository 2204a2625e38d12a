"""Services of jobs in the directory: there while healthy, gone at once when the job is to be left alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest

from flynn.aio.supervisor import TaskSet
from flynn.discoverd.memory import MemoryRegistry
from flynn.host.discovery import Discovery
from flynn.host.services import probe
from flynn.host.services.departures import Departures
from flynn.host.services.health import Check
from flynn.host.services.registration import JobServices
from flynn.types.codec import Nanoseconds, replace
from flynn.types.host import ContainerConfig, HostJob
from flynn.types.instance import Instance
from flynn.types.release import HealthCheck, Port, Service

FAST = Nanoseconds(10_000_000)


class Known:
    """What `JobServices` needs of Discovery, with a directory in memory."""

    def __init__(self) -> None:
        self.registry = MemoryRegistry()
        self.connected = asyncio.Event()
        self.connected.set()


@asynccontextmanager
async def web(pages: dict[str, tuple[int, str]]) -> AsyncIterator[int]:
    """A server whose pages may change; status 0 is a dropped connection."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            status, body = pages.get(head.split(b" ")[1].decode(), (404, ""))
            if status:
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                await writer.drain()
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


def job(port: int, check: HealthCheck | None) -> HostJob:
    service = Service(name="shop-web", create=True, check=check)
    env = {"FLYNN_APP_ID": "a", "FLYNN_JOB_ID": "h-1", "OTHER": "x"}
    return HostJob(id="h-1", config=ContainerConfig(env=env, ports=[Port(port=port, proto="tcp", service=service)]))


@asynccontextmanager
async def served(known: Known, wanted: HostJob) -> AsyncIterator[tuple[JobServices, list[str]]]:
    killed: list[str] = []

    async def kill(reason: str) -> None:
        killed.append(reason)

    services = JobServices(wanted, "127.0.0.1", cast(Discovery, known), kill)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(services.run())
        try:
            yield services, killed
        finally:
            running.cancel()


async def until_registered(known: Known, count: int) -> None:
    async with asyncio.timeout(5):
        while len(await known.registry.instances("shop-web")) != count:
            await asyncio.sleep(0.01)


async def test_without_a_check_the_port_is_registered_at_once_with_what_is_known_of_the_job() -> None:
    known = Known()
    async with served(known, job(5000, None)) as (services, _):
        await until_registered(known, 1)
        (instance,) = await known.registry.instances("shop-web")
        assert (instance.addr, instance.proto) == ("127.0.0.1:5000", "tcp")
        assert instance.meta == {"FLYNN_APP_ID": "a", "FLYNN_JOB_ID": "h-1"}
        await services.leave()
        assert await known.registry.instances("shop-web") == []


async def test_a_daemon_that_ends_leaves_its_jobs_in_the_directory() -> None:
    known = Known()
    async with served(known, job(5000, None)):
        await until_registered(known, 1)
    assert len(await known.registry.instances("shop-web")) == 1


async def test_a_port_is_registered_while_it_is_healthy() -> None:
    known, pages = Known(), {"/": (503, "")}
    async with web(pages) as port:
        check = HealthCheck(type="http", interval=FAST)
        async with served(known, job(port, check)) as (_, killed):
            await asyncio.sleep(0.05)
            assert await known.registry.instances("shop-web") == []
            pages["/"] = (200, "")
            await until_registered(known, 1)
            pages["/"] = (500, "")
            await until_registered(known, 0)
            assert killed == []


async def test_a_job_that_does_not_come_up_in_time_is_killed_if_so_wanted() -> None:
    known = Known()
    check = HealthCheck(type="tcp", interval=FAST, start_timeout=FAST, kill_down=True)
    async with served(known, job(1, check)) as (_, killed):
        async with asyncio.timeout(5):
            while not killed:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("check", "outcome"),
    [
        pytest.param(HealthCheck(type="tcp"), True, id="connects"),
        pytest.param(HealthCheck(type="http", path="/ok"), True, id="200"),
        pytest.param(HealthCheck(type="http", path="/moved"), False, id="another status"),
        pytest.param(HealthCheck(type="http", path="/moved", status=302), True, id="the wanted status"),
        pytest.param(HealthCheck(type="http", path="/ok", match="fine"), True, id="match"),
        pytest.param(HealthCheck(type="http", path="/ok", match="bad"), False, id="no match"),
        pytest.param(HealthCheck(type="http", path="/long", match="end"), False, id="match too far back"),
        pytest.param(HealthCheck(type="http", path="/drop"), False, id="no answer"),
        pytest.param(HealthCheck(type="https", path="/ok"), False, id="no TLS there"),
    ],
)
async def test_probes(check: HealthCheck, outcome: bool) -> None:
    pages = {"/ok": (200, "all is fine"), "/moved": (302, ""), "/drop": (0, ""), "/long": (200, "x" * 6000 + "end")}
    async with web(pages) as port:
        assert await probe.succeeds(Check.of(check), "127.0.0.1", port) is outcome


async def test_nobody_there_is_a_failure_not_an_error() -> None:
    assert await probe.succeeds(Check.of(HealthCheck(type="tcp")), "127.0.0.1", 1) is False


async def test_what_a_system_job_registered_itself_is_taken_out_when_it_has_ended() -> None:
    known = Known()
    instance = Instance.at("192.0.2.1:80", "https", {"FLYNN_JOB_ID": "h-1"})
    await known.registry.create("status-web")
    await known.registry.register("status-web", instance)
    system = replace(job(80, None), metadata={"flynn-system-app": "true"})
    async with asyncio.timeout(10), TaskSet() as tasks:
        departures = Departures(cast(Discovery, known), tasks)
        departures.job_ended(job(80, None))  # a user's job: the host keeps its registration itself
        assert len(tasks) == 0
        departures.job_ended(system)
        while len(tasks):
            await asyncio.sleep(0)
    assert await known.registry.instances("status-web") == []
