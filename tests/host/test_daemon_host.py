"""The host itself, asked through its API: tags, ports, back-pressure, and refusals its clients can act on."""

from __future__ import annotations

import asyncio
import signal
import uuid

import pytest

from flynn.host.client import HostClient
from flynn.identity import Identity
from flynn.types.codec import replace
from flynn.types.errors import Conflict, NotFound, RateLimited, ValidationError
from flynn.types.host import ContainerConfig, HostJob, Mountspec, ResourceCheckPort
from flynn.types.release import Port

from .machine import META, TestMachine, ended, eventually

pytestmark = [pytest.mark.root, pytest.mark.slow]

STARTING_LIMIT = 200


def job(image: Mountspec, script: str) -> HostJob:
    return HostJob(
        id=f"node1-{uuid.uuid4()}", mountspecs=[image], metadata=META,
        config=ContainerConfig(args=["sh", "-c", script]),
    )  # fmt: skip


async def test_tags_are_merged_and_kept(machine: TestMachine, host: HostClient) -> None:
    """The original replaced them by what was posted last, and forgot them."""
    await host.set_tags({"disk": "ssd", "zone": "a"})
    await host.set_tags({"zone": "", "fast": "true"})
    assert (await host.status()).tags == {"disk": "ssd", "fast": "true"}
    with pytest.raises(ValidationError):
        await host.set_tags({"good": "1", "bad=": "2"})
    assert (await host.status()).tags == {"disk": "ssd", "fast": "true"}
    machine.end(signal.SIGKILL)
    machine.start()
    assert (await host.status()).tags == {"disk": "ssd", "fast": "true"}
    await host.set_tags({"disk": "", "fast": ""})
    assert (await host.status()).tags == {}


async def test_a_slash_too_much_is_led_to_the_path_without(machine: TestMachine, host: HostClient) -> None:
    for method, path, status, location in (
        ("GET", "/host/jobs/?active=true", b"301", b"/host/jobs?active=true"),
        ("POST", "/host/tags/", b"307", b"/host/tags"),
        ("GET", "/host/nothing/", b"404", b""),
        ("GET", "//host/jobs/", b"404", b""),
    ):
        context = Identity.load(machine.state / "identity").client_context()
        reader, writer = await asyncio.open_connection(machine.ip, 1113, ssl=context)
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        assert head.split(b" ")[1] == status, head
        assert head.partition(b"Location: ")[2].partition(b"\r")[0] == location


async def test_ports_that_somebody_listens_on_are_told(host: HostClient) -> None:
    await host.resource_check([ResourceCheckPort(port=9), ResourceCheckPort(port=9, proto="udp")])
    with pytest.raises(Conflict, match="Conflicting resources found") as refusal:
        await host.resource_check([ResourceCheckPort(port=9), ResourceCheckPort(port=1113)])
    assert refusal.value.detail == {"ports": [{"port": 1113, "proto": "tcp"}]}
    assert refusal.value.retry is False


async def test_what_is_not_there_is_404_and_what_cannot_be_now_409(host: HostClient, image: Mountspec) -> None:
    """The original answered 500 to each of these, which its clients tried again."""
    for attempt in (host.stop_job, host.deregister_job, host.stats, host.job):
        with pytest.raises(NotFound, match="host: unknown job") as unknown:
            await attempt("node1-nope")
        assert unknown.value.retry is False
    with pytest.raises(NotFound):
        await host.signal_job("node1-nope", 15)
    wanted = job(image, "true")
    await host.add_job(wanted)
    await ended(host, wanted.id)
    await host.stop_job(wanted.id)  # as wanted already
    with pytest.raises(Conflict, match="job is not running") as late:
        await host.signal_job(wanted.id, 15)
    assert late.value.retry is False
    with pytest.raises(Conflict):
        await host.stats(wanted.id)
    with pytest.raises(Conflict, match="job already exists"):
        await host.add_job(wanted)


async def test_more_jobs_than_can_be_started_are_put_off(
    machine: TestMachine, host: HostClient, image: Mountspec
) -> None:
    """They wait for a layer that does not come. One more is refused for now, and taken when there is room again."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
        finally:
            writer.close()

    server = await asyncio.start_server(silent, machine.outside, 0)
    port = server.sockets[0].getsockname()[1]
    stuck = Mountspec(
        type="squashfs",
        id=f"stuck-{uuid.uuid4().hex}",
        url=f"http://{machine.outside}:{port}/x",
        size=9,
        hashes=image.hashes,
    )
    waiting = [job(stuck, "true") for _ in range(STARTING_LIMIT)]
    few = asyncio.Semaphore(10)  # at a time: each is a connection

    async def stop(one: HostJob) -> None:
        async with few:
            await host.stop_job(one.id)

    try:
        for one in waiting:
            await host.add_job(one)
        with pytest.raises(RateLimited, match="maximum concurrent AddJob calls running, try again later") as refusal:
            await host.add_job(job(image, "true"))
        assert refusal.value.retry is True
        await host.stop_job(waiting[0].id)
        late = job(stuck, "true")
        await host.add_job(late)
        waiting.append(late)
    finally:
        await asyncio.gather(*(stop(one) for one in waiting))
        server.close()
    last = job(image, "exit 3")
    await host.add_job(last)
    await ended(host, last.id)
    assert (await host.job(last.id)).exit_status == 3


async def test_jobs_in_the_hosts_network_get_ports_of_their_own(
    machine: TestMachine, host: HostClient, image: Mountspec
) -> None:
    """Of the original all got 5000, and all but one failed. What somebody else listens on is not given away either."""
    squatter = job(image, "exec httpd -f -p 127.0.0.1:5001 -h /tmp")
    sharing = [
        HostJob(
            id=f"node1-{uuid.uuid4()}", mountspecs=[image], metadata=META,
            config=ContainerConfig(
                args=["sh", "-c", "exec httpd -f -p 127.0.0.1:$PORT -h /tmp"], host_network=True,
                ports=[Port(proto="tcp")],
            ),
        )
        for _ in range(3)
    ]  # fmt: skip
    squatting = replace(squatter, config=replace(squatter.config, host_network=True))
    await host.add_job(squatting)

    async def squats() -> bool:
        try:
            await host.resource_check([ResourceCheckPort(port=5001)])
        except Conflict:
            return True
        return False

    try:
        await eventually(squats)
        for one in sharing:
            await host.add_job(one)

        async def ports() -> list[int]:
            return sorted([(await host.job(one.id)).job.config.ports[0].port for one in sharing])

        async def given() -> bool:
            return await ports() == [5000, 5002, 5003]

        await eventually(given)
        for one in sharing:
            assert not (await host.job(one.id)).status.down
            assert (await host.job(one.id)).job.config.env["PORT"] in ("5000", "5002", "5003")
    finally:
        for one in (squatting, *sharing):
            await host.stop_job(one.id)
