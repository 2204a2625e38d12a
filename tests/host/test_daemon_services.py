"""Services of real jobs in a real directory: listed while they work, gone at once when they are to be left alone."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from flynn.discoverd.client import Discoverd
from flynn.host.client import HostClient
from flynn.identity import Identity
from flynn.identity.authority import ClusterCA
from flynn.types.codec import Nanoseconds
from flynn.types.errors import ApiError
from flynn.types.host import ContainerConfig, HostJob, JobEventKind, JobStatus, Mountspec
from flynn.types.instance import EventKind, Instance
from flynn.types.release import HealthCheck, Port, Service

from .machine import BIN, META, TestMachine, ended, eventually

pytestmark = [pytest.mark.root, pytest.mark.slow]

TENTH = Nanoseconds(100_000_000)
WEB = """
mkdir -p /tmp/www
trap 'rm -f /tmp/www/ok' USR1
trap 'echo all is fine > /tmp/www/ok' USR2
trap 'kill $server; exit 0' TERM
[ -n "$SLOW" ] || echo all is fine > /tmp/www/ok
httpd -f -p $PORT -h /tmp/www & server=$!
while true; do sleep 0.05; done
"""


@pytest.fixture(scope="module")
def discoverd(machine: TestMachine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cluster's discoverd, in the node's network."""
    work = tmp_path_factory.mktemp("discoverd")
    ca = ClusterCA.load(machine.state / "identity")
    ca.issue_job("discoverd", "app", "discoverd", [machine.ip]).write(work / "id")
    with (work / "log").open("wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", "nsenter", f"--net=/run/netns/{machine.name}",
             BIN / "flynn-discoverd", "-data-dir", work / "data", "-host", machine.ip],
            env={**os.environ, "FLYNN_IDENTITY": str(work / "id"), "FLYNN_HOST_KEY_FILE": str(work / "none")},
            stdout=subprocess.DEVNULL, stderr=log,
        )  # fmt: skip
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture
async def registry(discoverd: None, machine: TestMachine, host: HostClient) -> AsyncIterator[Discoverd]:
    identity = Identity.load(machine.state / "identity")
    async with Discoverd.connect([f"{machine.ip}:1111"], identity=identity) as client:

        async def answers() -> bool:
            return bool(await client.instances("flynn-host"))

        await eventually(answers, 30)
        yield client


class Shop:
    """One job with a service of its own."""

    def __init__(self, host: HostClient, registry: Discoverd, image: Mountspec, **fields: Any) -> None:
        self.host, self.registry = host, registry
        self.name = f"shop-{uuid.uuid4()}"
        env = {"FLYNN_APP_ID": "a", "FLYNN_APP_NAME": "shop", "FLYNN_PROCESS_TYPE": "web", "OTHER": "x"}
        env |= fields.pop("env", {})
        proto, check = fields.pop("proto", "tcp"), fields.pop("check", None)
        script = fields.pop("script", WEB)
        service = Service(name=self.name, create=True, check=check)
        self.job = HostJob(
            id=f"node1-{uuid.uuid4()}", mountspecs=[image], metadata=META,
            config=ContainerConfig(args=["sh", "-c", script], env=env, ports=[Port(proto=proto, service=service)]),
        )  # fmt: skip

    async def __aenter__(self) -> Shop:
        await self.host.add_job(self.job)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.host.stop_job(self.job.id)

    async def instances(self) -> list[Instance]:
        return await self.registry.instances(self.name)

    async def listed(self) -> bool:
        return len(await self.instances()) == 1

    async def unlisted(self) -> bool:
        return await self.instances() == []

    async def running(self) -> bool:
        return (await self.host.job(self.job.id)).status is JobStatus.RUNNING

    async def is_not_listed_for(self, seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < deadline:
            assert await self.unlisted()
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("proto", ["tcp", "udp"])
async def test_a_port_without_a_check_is_listed_as_long_as_the_job_runs(
    host: HostClient, registry: Discoverd, image: Mountspec, proto: str
) -> None:
    async with Shop(host, registry, image, proto=proto) as shop:
        await eventually(shop.listed)
        (instance,) = await shop.instances()
        address = f"{(await host.job(shop.job.id)).internal_ip}:5000"
        assert (instance.addr, instance.proto) == (address, proto)
        assert instance.id == hashlib.md5(f"{proto}-{address}".encode()).hexdigest()
        assert instance.meta == {"FLYNN_APP_ID": "a", "FLYNN_APP_NAME": "shop", "FLYNN_PROCESS_TYPE": "web"}
        await host.stop_job(shop.job.id)
        assert await shop.unlisted()


async def test_a_port_with_a_check_is_listed_while_it_is_healthy(
    host: HostClient, registry: Discoverd, image: Mountspec
) -> None:
    """The job starts first; then up at once, down after `threshold` failures, and up again."""
    check = HealthCheck(type="http", path="/ok", match="fine", interval=TENTH, threshold=2)
    kinds: list[JobEventKind | EventKind] = []

    async def follow_service(name: str) -> None:
        async for event in registry.watch(name):
            if event.kind in (EventKind.UP, EventKind.DOWN):
                kinds.append(event.kind)

    shop = Shop(host, registry, image, check=check, env={"SLOW": "1"})
    await registry.create(shop.name)
    following = asyncio.ensure_future(follow_service(shop.name))
    async with host.subscribed(shop.job.id) as events, shop:
        while (event := await anext(events)).event is not JobEventKind.START:
            assert kinds == []
        kinds.append(event.event)
        await shop.is_not_listed_for(0.5)
        await host.signal_job(shop.job.id, signal.SIGUSR2)
        await eventually(shop.listed)
        await host.signal_job(shop.job.id, signal.SIGUSR1)
        await eventually(shop.unlisted)
        await host.signal_job(shop.job.id, signal.SIGUSR2)
        await eventually(shop.listed)
        assert await shop.running()
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert kinds[:4] == [JobEventKind.START, EventKind.UP, EventKind.DOWN, EventKind.UP]


async def test_a_port_that_never_works_is_never_listed_and_its_job_left_alone(
    host: HostClient, registry: Discoverd, image: Mountspec
) -> None:
    check = HealthCheck(type="http", path="/nothing", interval=TENTH, start_timeout=TENTH)
    async with Shop(host, registry, image, check=check) as shop:
        await eventually(shop.running)
        await shop.is_not_listed_for(1)
        assert await shop.running()


async def test_kill_down_ends_a_job_that_does_not_come_up(
    host: HostClient, registry: Discoverd, image: Mountspec
) -> None:
    check = HealthCheck(type="tcp", interval=TENTH, start_timeout=Nanoseconds(500_000_000), kill_down=True)
    async with Shop(host, registry, image, check=check, script="sleep 60") as shop:
        assert await ended(host, shop.job.id) is JobStatus.CRASHED
        job = await host.job(shop.job.id)
        assert (job.exit_status, job.error) == (137, f"killed: the service {shop.name} was not up within 0.5 s")


async def test_kill_down_ends_a_job_that_goes_down(host: HostClient, registry: Discoverd, image: Mountspec) -> None:
    check = HealthCheck(type="http", path="/ok", interval=TENTH, kill_down=True)
    async with Shop(host, registry, image, check=check) as shop:
        await eventually(shop.listed)
        await host.signal_job(shop.job.id, signal.SIGUSR1)
        assert await ended(host, shop.job.id) is JobStatus.CRASHED
        job = await host.job(shop.job.id)
        assert (job.exit_status, job.error) == (137, f"killed: the service {shop.name} is down")
        assert await shop.unlisted()


async def test_a_check_that_is_none_ends_the_job_with_the_reason(
    host: HostClient, registry: Discoverd, image: Mountspec
) -> None:
    async with Shop(host, registry, image, check=HealthCheck(type="ping")) as shop:
        assert await ended(host, shop.job.id) is JobStatus.CRASHED
        assert (await host.job(shop.job.id)).error == 'killed: unknown health check type "ping"'


async def test_deregistered_is_for_good_while_the_job_goes_on(
    host: HostClient, registry: Discoverd, image: Mountspec
) -> None:
    async with Shop(host, registry, image, check=HealthCheck(type="tcp", interval=TENTH)) as shop:
        await eventually(shop.listed)
        await host.deregister_job(shop.job.id)
        assert await shop.unlisted()
        await host.deregister_job(shop.job.id)
        await shop.is_not_listed_for(6)  # longer than a heartbeat
        assert await shop.running()
    await host.deregister_job(shop.job.id)  # nothing to do for a job that is down
    with pytest.raises(ApiError):
        await host.deregister_job("node1-nope")


async def test_the_next_daemon_goes_on_with_the_registrations(
    machine: TestMachine, host: HostClient, registry: Discoverd, image: Mountspec
) -> None:
    """Killed and started again, nobody in the directory notices; what is deregistered later is gone."""
    changes: list[EventKind] = []

    async def follow(name: str) -> None:
        async for event in registry.watch(name):
            changes.append(event.kind)

    async with Shop(host, registry, image, check=HealthCheck(type="tcp", interval=TENTH)) as shop:
        await eventually(shop.listed)
        following = asyncio.ensure_future(follow(shop.name))
        machine.end(signal.SIGKILL)
        machine.start()
        await asyncio.sleep(11)  # an instance lives ten seconds without a heartbeat
        assert await shop.listed()
        assert EventKind.DOWN not in changes
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
