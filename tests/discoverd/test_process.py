"""discoverd as a process: killed without warning, beside a host that comes late and forgets."""

from __future__ import annotations

import asyncio
import socket

import pytest
from dnslib import DNSRecord

from flynn.daemon import ConfigError
from flynn.discoverd import config
from flynn.http.client import HttpClient, KeyAuth
from flynn.types.codec import replace
from flynn.types.errors import ObjectExists, PreconditionFailed, Unauthorized
from flynn.types.host import DiscoverdConfig, NetworkConfig
from flynn.types.instance import DiscoverdEvent, EventKind, Instance, LeaderType, ServiceMeta
from tests.discoverd.fakehost import fake_host
from tests.discoverd.harness import Place, Process, loopback_address, until

WEB = Instance.at("10.0.0.1:80", "http")


@pytest.mark.slow
async def test_a_killed_discoverd_is_back_within_two_seconds_and_nobody_notices(place: Place) -> None:
    heard: list[DiscoverdEvent] = []
    async with Process(place, "-notify", "") as process, place.client() as client:
        await client.create("web")
        await client.put_meta("web", ServiceMeta(data={"n": 1}))
        async with client.registered("web", WEB):

            async def listen() -> None:
                async for event in client.watch("web"):
                    heard.append(event)

            listening = asyncio.ensure_future(listen())
            await until(lambda: any(event.kind is EventKind.CURRENT for event in heard))
            so_far = len(heard)
            await process.kill()
            await process.start()
            before = asyncio.get_running_loop().time()
            assert [one.id for one in await client.instances("web")] == [WEB.id]
            assert asyncio.get_running_loop().time() - before < 3  # a slow machine gets a second more
            meta = await client.get_meta("web")
            assert meta is not None and meta.data == {"n": 1}
            await client.put_meta("web", replace(meta, data={"n": 2}))
            await until(lambda: len(heard) > so_far)
            assert [event.kind for event in heard[so_far:]] == [EventKind.SERVICE_META]
            listening.cancel()
        assert [one.id for one in await client.instances("discoverd")]
        assert await process.stop() == 0


@pytest.mark.slow
async def test_a_discoverd_that_is_replaced_stops_at_once_and_nobody_is_told_that_others_left(place: Place) -> None:
    heard: list[DiscoverdEvent] = []
    async with Process(place, "-notify", "") as process, place.client() as client:
        await client.create("web")
        async with client.registered("web", WEB):

            async def listen() -> None:
                async for event in client.watch("web"):
                    heard.append(event)

            listening = asyncio.ensure_future(listen())
            await until(lambda: any(event.kind is EventKind.CURRENT for event in heard))
            so_far = len(heard)
            before = asyncio.get_running_loop().time()
            assert await process.stop() == 0
            assert asyncio.get_running_loop().time() - before < 3, "watchers are sent away"
            await process.start()
            await client.put_meta("web", ServiceMeta(data={"n": 1}))
            await until(lambda: len(heard) > so_far)
            assert [event.kind for event in heard[so_far:]] == [EventKind.SERVICE_META]
            listening.cancel()


@pytest.mark.slow
async def test_no_acknowledged_write_is_lost_by_kills_at_any_moment(place: Place) -> None:
    acknowledged = ServiceMeta(data=0)
    async with Process(place, "-notify", "") as process, place.client() as client:
        await client.create("counter", LeaderType.MANUAL)

        async def count() -> None:
            nonlocal acknowledged
            while True:
                try:
                    acknowledged = await client.put_meta("counter", replace(acknowledged, data=acknowledged.data + 1))
                except (PreconditionFailed, ObjectExists):
                    # The answer to a write that did succeed was lost: exactly one more than was acknowledged.
                    meta = await client.get_meta("counter")
                    assert meta is not None and meta.data == acknowledged.data + 1
                    acknowledged = meta

        counting = asyncio.ensure_future(count())
        for moment in (0.5, 0.31, 0.17):
            await until(lambda before=acknowledged.data: acknowledged.data > before + 10)  # type: ignore[misc]
            await asyncio.sleep(moment)
            await process.kill()
            await process.start()
        await until(lambda before=acknowledged.data: acknowledged.data > before + 10)  # type: ignore[misc]
        assert not counting.done()
        counting.cancel()


@pytest.mark.slow
async def test_the_host_is_told_and_told_again(place: Place) -> None:
    bridge = loopback_address()
    process = Process(place, environ={"FLYNN_APP_NAME": "discoverd"})
    async with process:
        async with fake_host(place.identity, place.address) as host:
            url_only = DiscoverdConfig(job_id="host0-discoverd", url=place.http_address)
            await until(lambda: host.status.discoverd == url_only)
            network = NetworkConfig(subnet=f"{bridge}/24", resolvers=[])
            host.status = replace(host.status, network=network)
            complete = replace(url_only, dns=f"{bridge}:53")
            await until(lambda: host.status.discoverd == complete)
            assert await _address_of("discoverd.discoverd", bridge) == place.address

            host.forget()
            await until(lambda: host.status.discoverd == complete)
            host.status = replace(host.status, network=network)
            told = len(host.told)
            await process.kill()
            await process.start(FLYNN_JOB_ID="host0-another")
            await until(lambda: host.status.discoverd == replace(complete, job_id="host0-another"))
            # The new process finds the network at once, and never takes the name server's address away.
            await asyncio.sleep(1)
            assert all(isinstance(config, DiscoverdConfig) and config.dns for config in host.told[told:])


async def _address_of(name: str, server: str) -> str:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect((server, 53))
        async with asyncio.timeout(10):
            while True:
                sock.send(DNSRecord.question(name).pack())
                reply = DNSRecord.parse(await loop.sock_recv(sock, 4096))
                if reply.rr:
                    return str(reply.rr[0].rdata)
                await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_the_hosts_key_opens_the_plain_door_on_loopback(place: Place) -> None:
    (place.directory / "host.key").write_text("the key\n")
    async with Process(place, "-notify", "", "-addr", f"{place.address}:21511"):
        url = "http://127.0.0.1:21511"
        async with HttpClient(url, auth=KeyAuth("the key")) as right, HttpClient(url, auth=KeyAuth("guess")) as wrong:
            async with asyncio.timeout(15):
                while True:
                    try:
                        await right.put("/services/web", {})
                        break
                    except Exception:
                        await asyncio.sleep(0.05)
            with pytest.raises(Unauthorized):
                await wrong.put("/services/more", {})


CONTAINER = {"EXTERNAL_IP": "10.0.0.1", "DISCOVERD_PEERS": "10.0.0.1:1111, 10.0.0.2:1111,", "FLYNN_JOB_ID": "j"}


def test_configuration_of_a_container() -> None:
    parsed = config.parse([], CONTAINER)
    assert (parsed.address, parsed.peers) == ("10.0.0.1:1111", ("10.0.0.1:1111", "10.0.0.2:1111"))
    assert (str(parsed.data_dir), parsed.job_id, parsed.follow_bridge) == ("/data", "j", True)
    assert parsed.host_url == "https://10.0.0.1:1113"


@pytest.mark.parametrize("spelling", (["-addr", ":4444"], ["-addr=:4444"], ["--addr", ":4444"]))
def test_flags_win_and_peers_take_their_port_from_them(spelling: list[str]) -> None:
    parsed = config.parse([*spelling, "-host", "10.0.0.9"], CONTAINER)
    assert (parsed.address, parsed.peers) == ("10.0.0.9:4444", ("10.0.0.1:4444", "10.0.0.2:4444"))


def test_alone_without_peers() -> None:
    assert config.parse(["-data-dir", "/d", "-host", "10.0.0.1"], {}).peers == ("10.0.0.1:1111",)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "-data-dir"),
        (["-data-dir", "/d"], "-host"),
        (["-data-dir", "/d", "-host", "h", "-peers", "10.0.0.1"], "-peers"),
        (["-data-dir", "/d", "-host", "h", "-surprise"], "-surprise"),
    ],
)
def test_what_cannot_start(arguments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        config.parse(arguments, {})
