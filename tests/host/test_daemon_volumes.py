"""Two real hosts and their volumes: over HTTP, between the hosts, and with the transfer broken in the middle."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flynn.host.client import HostClient
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.identity.authority import ClusterCA
from flynn.types.errors import ApiError, Conflict, NotFound, ObjectExists, ValidationError
from flynn.types.host import (
    ContainerConfig,
    DiscoverdConfig,
    HostJob,
    JobStatus,
    Mountspec,
    NetworkConfig,
    VolumeBinding,
)
from flynn.types.volume import ProviderSpec, PullCoordinate, VolumeEvent, VolumeInfo, VolumeRequest

from .machine import BIN, META, TestMachine, ended, eventually, sweep

pytestmark = [pytest.mark.root, pytest.mark.slow]

MIB = 1 << 20
TRANSFER_MIB = 24  # four seconds on the cable between the hosts
CABLE = "50mbit"


@dataclass
class Pair:
    one: TestMachine
    two: TestMachine
    cable: str

    def cut(self) -> None:
        subprocess.check_call(["ip", "-n", self.one.name, "link", "set", self.cable, "down"])

    def mend(self) -> None:
        for machine, other in ((self.one, self.two), (self.two, self.one)):
            subprocess.check_call(["ip", "-n", machine.name, "link", "set", self.cable, "up"])
            subprocess.check_call(["ip", "-n", machine.name, "route", "replace", f"{other.ip}/32", "dev", self.cable])


@pytest.fixture(scope="module", params=["directory", "zfs"])
def pair(request: pytest.FixtureRequest, image: Mountspec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two hosts of one cluster with a slow cable between them, and the cluster's discoverd on the first."""
    if request.param == "zfs" and not (Path("/dev/zfs").exists() or shutil.which("zfs-fuse")):
        pytest.skip("no ZFS here")
    sweep()
    work = tmp_path_factory.mktemp("pair")
    one, two = (
        TestMachine(tmp_path_factory.mktemp(f"node{n}"), image, number=n, provider=request.param, id=f"node{n}")
        for n in (1, 2)
    )
    discoverd: subprocess.Popen[bytes] | None = None
    pair = Pair(one, two, f"hp{os.getpid() % 100000}")
    try:
        one.plug_in()
        (two.state / "identity").mkdir(parents=True)
        for name in ("ca.pem", "ca.key"):
            shutil.copy(one.state / "identity" / name, two.state / "identity" / name)
        two.plug_in()
        subprocess.check_call(
            ["ip", "link", "add", pair.cable, "netns", one.name, "type", "veth", "peer", "name", pair.cable,
             "netns", two.name]
        )  # fmt: skip
        pair.mend()
        for machine in (one, two):
            shaping = ["tc", "qdisc", "add", "dev", pair.cable, "root", "tbf", "rate", CABLE, "burst", "64kb"]
            subprocess.check_call(["nsenter", f"--net=/run/netns/{machine.name}", *shaping, "latency", "400ms"])
        ClusterCA.load(one.state / "identity").issue_job("discoverd", "app", "discoverd", [one.ip]).write(work / "id")
        discoverd = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", "nsenter", f"--net=/run/netns/{one.name}", BIN / "flynn-discoverd",
             "-data-dir", work / "data", "-host", one.ip],
            env={**os.environ, "FLYNN_IDENTITY": str(work / "id"), "FLYNN_HOST_KEY_FILE": str(work / "none")},
            stdout=subprocess.DEVNULL, stderr=(work / "discoverd.log").open("wb"),
        )  # fmt: skip
        one.start()
        two.start()
        yield pair
    finally:
        if discoverd is not None:
            discoverd.kill()
            discoverd.wait()
        for machine in (one, two):
            machine.remove()


@dataclass
class Hosts:
    one: HostClient
    two: HostClient


async def configured(pair: Pair, host: HostClient, number: int) -> bool:
    """Be flannel and discoverd."""
    subnet = f"100.102.{number}.1/24"
    await host.configure_network(NetworkConfig(subnet=subnet, mtu=1400, network="100.102.0.0/16"))
    await host.configure_discoverd(DiscoverdConfig(url=f"{pair.one.ip}:1111", dns="100.102.0.1:53"))
    return True


@pytest.fixture
async def hosts(pair: Pair) -> AsyncIterator[Hosts]:
    """Both APIs, once each host knows the other."""
    async with AsyncExitStack() as stack:
        clients = []
        for n, machine in enumerate((pair.one, pair.two)):
            client = await stack.enter_async_context(machine.client())
            await client.configure_network(
                NetworkConfig(subnet=f"100.102.{n}.1/24", mtu=1400, network="100.102.0.0/16")
            )
            await client.configure_discoverd(DiscoverdConfig(url=f"{pair.one.ip}:1111", dns="100.102.0.1:53"))
            clients.append(client)
        hosts = Hosts(*clients)

        async def acquainted() -> bool:
            try:
                await hosts.two.pull_snapshot("none", PullCoordinate(host_id="node1", snapshot_id="x"))
            except NotFound as error:
                assert "no volume" in str(error)
            probe = await hosts.two.create_volume(VolumeRequest())
            try:
                await hosts.two.pull_snapshot(probe.id, PullCoordinate(host_id="node1", snapshot_id="x"))
            except NotFound as error:
                return 'no host with id "node1"' not in str(error)
            finally:
                await hosts.two.destroy_volume(probe.id)
            return False

        await eventually(acquainted, seconds=30)
        yield hosts


def job(host_id: str, image: Mountspec, script: str, *volumes: VolumeInfo, **fields: Any) -> HostJob:
    bindings = [VolumeBinding(target=f"/v{n}", volume=v.id, writeable=True) for n, v in enumerate(volumes)]
    config = ContainerConfig(args=["sh", "-c", script], volumes=bindings)
    return HostJob(id=f"{host_id}-{uuid.uuid4()}", mountspecs=[image], metadata=META, config=config, **fields)


async def run(host: HostClient, wanted: HostJob) -> int | None:
    await host.add_job(wanted)
    await ended(host, wanted.id)
    return (await host.job(wanted.id)).exit_status


async def filled(host: HostClient, image: Mountspec, mib: int) -> VolumeInfo:
    """A snapshot of a new volume with so much in it."""
    volume = await host.create_volume(VolumeRequest())
    script = f"dd if=/dev/urandom of=/v0/big bs=1M count={mib} && echo first > /v0/word && sync"
    assert await run(host, job("node1", image, script, volume)) == 0
    return await host.snapshot_volume(volume.id)


async def test_every_operation_over_http(pair: Pair, hosts: Hosts, image: Mountspec) -> None:
    host, machine = hosts.one, pair.one
    identity = Identity.load(machine.state / "identity")
    async with HttpClient(f"https://{machine.ip}:1113", tls=identity) as http:
        async with http.subscribed("/storage/volumes", VolumeEvent) as events:
            volume = await host.create_volume(VolumeRequest(meta={"a": "b"}))
            event = await asyncio.wait_for(anext(events), 10)
            assert (event.type, event.volume) == ("create", volume)
    assert await host.volume(volume.id) == volume
    with pytest.raises(ObjectExists):
        await host.create_volume(VolumeRequest(id=volume.id))
    with pytest.raises(NotFound, match='no volume provider with id "x"'):
        await host.create_volume(VolumeRequest(), provider="x")
    with pytest.raises(ValidationError, match="kind must not be blank"):
        await host.create_provider(ProviderSpec())
    assert await run(host, job("node1", image, "echo first > /v0/word", volume)) == 0
    holder = job("node1", image, "while :; do sleep 1; done", volume)
    await host.add_job(holder)
    with pytest.raises(Conflict, match="in use by a job"):
        await host.destroy_volume(volume.id)
    with pytest.raises(Conflict, match="volumes in use"):
        await host.add_job(job("node1", image, "true", volume))
    await host.stop_job(holder.id)
    frozen = await host.snapshot_volume(volume.id)
    assert frozen.created_at > volume.created_at
    with pytest.raises(ValidationError, match="only a snapshot can be cloned"):
        await host.clone_volume(volume.id, VolumeRequest())
    clone = await host.clone_volume(frozen.id, VolumeRequest(meta={"c": "d"}))
    script = "test first = $(cat /v0/word) && ! touch /v0/x && test first = $(cat /v1/word) && echo second > /v1/word"
    assert await run(host, job("node1", image, script, frozen, clone)) == 0, "a snapshot is read-only, a clone is not"
    assert await run(host, job("node1", image, "test first = $(cat /v0/word)", volume)) == 0
    refused = machine.tool("volume", "delete", "nothing", check=False)
    assert refused.returncode == 1
    assert "could not delete volume nothing: volume not found" in refused.stderr
    made = machine.tool("volume", "create", "--size", "20M", "node1").stdout.split()
    assert made[:2] == ["created", "volume"]
    data = await host.create_volume(VolumeRequest(meta={"flynn-controller.app": "x"}))
    others = [await host.create_volume(VolumeRequest()) for _ in range(2)]
    others.append(await host.snapshot_volume(others[0].id))
    held = job("node1", image, "sleep 1000", volume)
    await host.add_job(held)
    collected = machine.tool("volume", "gc")
    assert {f"Deleted data volume {one.id}" for one in [*others, clone, frozen]} <= set(collected.stdout.splitlines())
    left = {info.id for info in await host.volumes()}
    assert {volume.id, data.id} <= left
    assert not left & {made[2], *(one.id for one in others)}
    assert f"Deleted data volume {data.id}" in machine.tool("volume", "gc", "--all").stdout
    await host.stop_job(held.id)
    await host.destroy_volume(volume.id)
    with pytest.raises(NotFound):
        await host.volume(volume.id)
    status = await host.status()
    assert [(one.id, one.kind, one.trouble) for one in status.volumes] == [("default", machine.provider, "")]


async def test_a_reader_of_events_that_stands_still_stalls_nobody(pair: Pair, hosts: Hosts) -> None:
    if pair.one.provider == "zfs":
        pytest.skip("the same book, only slower")
    identity, machine = Identity.load(pair.one.state / "identity"), pair.one
    context = identity.client_context()
    context.check_hostname = False
    stuck_reader, stuck = await asyncio.open_connection(machine.ip, 1113, ssl=context, limit=1024)
    stuck.write(b"GET /storage/volumes HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n")
    assert b"200" in await stuck_reader.readline()  # and never reads again
    rounds, padding = 150, "x" * 8000  # two megabytes of events: more than the sockets between them hold
    try:
        async with HttpClient(f"https://{machine.ip}:1113", tls=identity) as http:
            async with http.subscribed("/storage/volumes", VolumeEvent) as events:
                seen: list[str] = []

                async def follow() -> None:
                    async for event in events:
                        seen.append(event.type)
                        if len(seen) == 2 * rounds:
                            return

                following = asyncio.ensure_future(follow())
                async with asyncio.timeout(120):
                    for _ in range(rounds):
                        made = await hosts.one.create_volume(VolumeRequest(meta={"padding": padding}))
                        await hosts.one.destroy_volume(made.id)
                    await following
        assert seen == ["create", "destroy"] * rounds
    finally:
        stuck.transport.abort()


async def test_a_volume_keeps_to_its_size(pair: Pair, hosts: Hosts, image: Mountspec) -> None:
    if pair.one.provider != "zfs":
        pytest.skip("directories cannot be limited")
    volume = await hosts.one.create_volume(VolumeRequest(meta={"flynn.quota": str(16 * MIB)}))
    assert await run(hosts.one, job("node1", image, "dd if=/dev/urandom of=/v0/x bs=1M count=8", volume)) == 0
    wanted = job("node1", image, "dd if=/dev/urandom of=/v0/y bs=1M count=16 && sync", volume)
    assert await run(hosts.one, wanted) not in (0, None)


async def test_snapshots_travel_between_hosts_whole_and_as_differences(
    pair: Pair, hosts: Hosts, image: Mountspec
) -> None:
    first = await filled(hosts.one, image, 4)
    source = first.meta["flynn.snapshot-of"]
    target = await hosts.two.create_volume(VolumeRequest())
    assert await run(hosts.two, job("node2", image, "echo mine > /v0/local", target)) == 0
    pulled = await hosts.two.pull_snapshot(target.id, PullCoordinate(host_id="node1", snapshot_id=first.id))
    assert (pulled.id, pulled.meta["flynn.snapshot-of"]) == (first.id, target.id)
    check = "test first = $(cat /v0/word) && test ! -e /v0/local && test 4194304 = $(stat -c %s /v0/big)"
    assert await run(hosts.two, job("node2", image, check, target)) == 0
    with pytest.raises(ApiError):
        await hosts.two.pull_snapshot(target.id, PullCoordinate(host_id="node1", snapshot_id=first.id))
    assert await run(hosts.one, job("node1", image, "echo second > /v0/word", VolumeInfo(id=source))) == 0
    second = await hosts.one.snapshot_volume(source)
    before = cable_bytes(pair)
    await hosts.two.pull_snapshot(target.id, PullCoordinate(host_id="node1", snapshot_id=second.id))
    travelled = cable_bytes(pair) - before
    if pair.one.provider == "zfs":
        assert travelled < MIB, "only the difference travels"
    check = "test second = $(cat /v0/word) && test first = $(cat /v1/word)"
    assert await run(hosts.two, job("node2", image, check, target, VolumeInfo(id=first.id))) == 0
    # What is here is not what a difference builds on: the whole is fetched.
    await hosts.two.snapshot_volume(target.id)
    third = await hosts.one.snapshot_volume(source)
    await hosts.two.pull_snapshot(target.id, PullCoordinate(host_id="node1", snapshot_id=third.id))
    assert await run(hosts.two, job("node2", image, "test second = $(cat /v0/word)", target)) == 0


def cable_bytes(pair: Pair) -> int:
    shown = subprocess.check_output(["ip", "-n", pair.two.name, "-s", "-j", "link", "show", pair.cable], text=True)
    return int(json.loads(shown)[0]["stats64"]["rx"]["bytes"])


async def begun(pair: Pair, pulling: asyncio.Future[Any]) -> None:
    """Wait until a part has come over."""
    before = cable_bytes(pair)
    async with asyncio.timeout(20):
        while cable_bytes(pair) - before < 2 * MIB:
            assert not pulling.done(), pulling
            await asyncio.sleep(0.02)


def export(machine: TestMachine) -> None:
    """What a power cut does to a pool, as the next boot finds it. zfs-fuse lets go of file systems late."""
    for _ in range(20):
        done = subprocess.run(["zpool", "export", "-f", machine.name], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        time.sleep(0.3)
    raise AssertionError(done.stderr)


def storage(machine: TestMachine) -> set[str]:
    """What there is of volumes on a machine, under whatever name; open files without a name too."""
    if machine.provider == "zfs":
        listing = ["zfs", "list", "-H", "-r", "-t", "all", "-o", "name", machine.name]
        names = set(subprocess.check_output(listing, text=True).split())
    else:
        names = {path.name for path in (machine.state / "volumes" / "directory").iterdir()}
    assert machine.process is not None
    children = Path(f"/proc/{machine.process.pid}/task/{machine.process.pid}/children")
    daemon = [machine.process.pid, *map(int, children.read_text().split())]
    for pid in daemon:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                name = os.readlink(descriptor)
            except OSError:
                continue
            if name.startswith(str(machine.state / "volumes")):
                names.add(name)
    return names


async def test_a_cable_cut_in_the_middle_leaves_nothing(pair: Pair, hosts: Hosts, image: Mountspec) -> None:
    first = await filled(hosts.one, image, TRANSFER_MIB)
    target = await hosts.two.create_volume(VolumeRequest())
    assert await run(hosts.two, job("node2", image, "echo mine > /v0/local", target)) == 0
    before, known = storage(pair.two), await hosts.two.volumes()
    pulling = asyncio.ensure_future(
        hosts.two.pull_snapshot(target.id, PullCoordinate(host_id="node1", snapshot_id=first.id))
    )
    await begun(pair, pulling)
    pair.cut()
    try:
        with pytest.raises(ApiError) as refused:
            await asyncio.wait_for(pulling, 120)
        assert refused.value.retry
        assert await run(hosts.two, job("node2", image, "test mine = $(cat /v0/local)", target)) == 0
        assert storage(pair.two) == before
        assert await hosts.two.volumes() == known
    finally:
        pair.mend()
    await asyncio.wait_for(
        hosts.two.pull_snapshot(target.id, PullCoordinate(host_id="node1", snapshot_id=first.id)), 120
    )
    assert await run(hosts.two, job("node2", image, "test first = $(cat /v0/word)", target)) == 0


async def test_a_source_killed_in_the_middle_is_asked_again(pair: Pair, hosts: Hosts, image: Mountspec) -> None:
    first = await filled(hosts.one, image, TRANSFER_MIB)
    target = await hosts.two.create_volume(VolumeRequest())
    pulling = asyncio.ensure_future(
        hosts.two.pull_snapshot(target.id, PullCoordinate(host_id="node1", snapshot_id=first.id))
    )
    await begun(pair, pulling)
    pair.one.end(signal.SIGKILL)
    pair.one.start()  # not in a thread: the daemon is to die with the one that has started it
    try:
        await asyncio.wait_for(pulling, 120)
    except ApiError:  # it took too long to come back
        await asyncio.wait_for(
            hosts.two.pull_snapshot(target.id, PullCoordinate(host_id="node1", snapshot_id=first.id)), 120
        )
    check = f"test first = $(cat /v0/word) && test {TRANSFER_MIB * MIB} = $(stat -c %s /v0/big)"
    assert await run(hosts.two, job("node2", image, check, target)) == 0


async def test_volumes_survive_a_reboot(pair: Pair, hosts: Hosts, image: Mountspec) -> None:
    volume = await hosts.two.create_volume(VolumeRequest())
    assert await run(hosts.two, job("node2", image, "echo kept > /v0/word && sync", volume)) == 0
    pair.two.end(signal.SIGKILL)
    pair.two.kill_containers()
    if pair.two.provider == "zfs":
        export(pair.two)
    pair.two.start()
    await eventually(lambda: configured(pair, hosts.two, 1))  # the first call may meet the last daemon's connection
    assert (await hosts.two.volume(volume.id)) == volume
    assert await run(hosts.two, job("node2", image, "test kept = $(cat /v0/word)", volume)) == 0


async def test_a_host_without_its_storage_runs_what_needs_none(pair: Pair, hosts: Hosts, image: Mountspec) -> None:
    """The last test: it breaks the second host, and mends it."""
    machine = pair.two
    volume = await hosts.two.create_volume(VolumeRequest())
    assert await run(hosts.two, job("node2", image, "echo kept > /v0/word && sync", volume)) == 0
    machine.end()
    if machine.provider == "zfs":
        export(machine)
    storage_place = machine.state / "volumes" / ("zfs/vdev" if machine.provider == "zfs" else "directory")
    away = machine.directory / "away"
    storage_place.rename(away)
    machine.start()
    await eventually(lambda: configured(pair, hosts.two, 1))  # the first call may meet the last daemon's connection
    assert "is missing" in (await hosts.two.status()).volumes[0].trouble
    assert await run(hosts.two, job("node2", image, "true")) == 0
    needing = job("node2", image, "true", volume)
    await hosts.two.add_job(needing)
    assert await ended(hosts.two, needing.id) == JobStatus.FAILED
    assert "is missing" in ((await hosts.two.job(needing.id)).error or "")
    with pytest.raises(ApiError, match="is missing"):
        await hosts.two.create_volume(VolumeRequest())
    shown = machine.tool("status")
    assert "is missing" in shown.stdout
    storage_place.rmdir() if storage_place.exists() else None
    away.rename(storage_place)

    async def mended() -> bool:
        return not (await hosts.two.status()).volumes[0].trouble

    await eventually(mended, seconds=60)
    assert await run(hosts.two, job("node2", image, "test kept = $(cat /v0/word)", volume)) == 0
