"""flannel on real machines (namespaces): blocks, VXLAN, packets; restarts and foreign hands."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import IPv4Interface
from pathlib import Path

import pytest

from flynn.identity.authority import ClusterCA
from tests.flannel.machines import Machine, ip, machines

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2"),
]


def subnet_of(bridge: str) -> str:
    return bridge.split("/")[0].rsplit(".", 1)[0]


async def until_reached(machine: Machine, address: str, source: str) -> None:
    async with asyncio.timeout(20):
        while not await machine.reaches(address, source):
            await asyncio.sleep(0.1)


async def test_two_machines_reach_each_others_containers(tmp_path: Path) -> None:
    async with machines(2, tmp_path, ClusterCA.create()) as (one, two), AsyncExitStack() as stack:
        await stack.enter_async_context(one.discoverd())
        for machine in (one, two):
            await stack.enter_async_context(machine.host())
            await stack.enter_async_context(machine.flannel(one.address))
        bridges = [await machine.subnet() for machine in (one, two)]
        network = one.status().network
        assert network is not None
        assert (network.mtu, network.network, network.job_id) == (1450, "100.100.0.0/16", f"{one.netns}-flannel")
        here, there = map(subnet_of, bridges)
        assert here != there
        for machine, bridge in zip((one, two), bridges, strict=True):
            machine.make_bridge(bridge)
        await until_reached(one, f"{there}.1", f"{here}.1")
        assert await two.reaches(f"{here}.1", f"{there}.1")

        assert f"100.100.0.0/16 dev flannel.1 proto kernel scope link src {here}.0" in one.shows("route")
        assert any(line.startswith(f"{there}.0/24 via {there}.0 dev flannel.1") for line in one.shows("route"))
        assert any(
            line.startswith(f"{there}.0 dev flannel.1 lladdr") and "PERMANENT" in line for line in one.shows("neigh")
        )
        assert any(f"dst {two.address} self permanent" in line for line in one.fdb())
        shown = "\n".join(one.shows("-d", "link", "show", "flannel.1"))
        assert "vxlan id 1 local 10.66.0.1 dev eth0" in shown and "dstport 8472 nolearning" in shown
        assert (one.directory / "subnet.env").read_text() == (
            f"FLANNEL_SUBNET={bridges[0]}\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
        )


async def test_a_restart_keeps_block_device_and_traffic_and_repairs_the_rest(tmp_path: Path) -> None:
    async with machines(2, tmp_path, ClusterCA.create()) as (one, two), AsyncExitStack() as stack:
        await stack.enter_async_context(one.discoverd())
        for machine in (one, two):
            await stack.enter_async_context(machine.host())
        await stack.enter_async_context(two.flannel(one.address))
        async with one.flannel(one.address):
            here, there = subnet_of(await one.subnet()), subnet_of(await two.subnet())
            one.make_bridge(f"{here}.1/24")
            two.make_bridge(f"{there}.1/24")
            await until_reached(one, f"{there}.1", f"{here}.1")
        mac = one.shows("-br", "link", "show", "flannel.1")
        # flannel is dead (kill -9): packets still flow.
        assert await one.reaches(f"{there}.1", f"{here}.1")
        # Somebody tidies up, and a route of a machine that left long ago is still there.
        ip("route", "del", f"{there}.0/24", netns=one.netns)
        ip("route", "add", "100.100.250.0/24", "via", f"{there}.0", "dev", "flannel.1", "onlink", netns=one.netns)
        ip("neigh", "del", f"{there}.0", "dev", "flannel.1", netns=one.netns)
        assert not await one.reaches(f"{there}.1", f"{here}.1")
        async with one.flannel(one.address):
            await until_reached(one, f"{there}.1", f"{here}.1")
            assert one.shows("-br", "link", "show", "flannel.1") == mac
            assert subnet_of(await one.subnet()) == here
            assert not any("100.100.250.0" in line for line in one.shows("route"))


async def test_a_device_that_somebody_deletes_comes_back_for_everybody(tmp_path: Path) -> None:
    async with machines(2, tmp_path, ClusterCA.create()) as (one, two), AsyncExitStack() as stack:
        await stack.enter_async_context(one.discoverd())
        for machine in (one, two):
            await stack.enter_async_context(machine.host())
        await stack.enter_async_context(two.flannel(one.address))
        async with one.flannel(one.address):
            here, there = subnet_of(await one.subnet()), subnet_of(await two.subnet())
            one.make_bridge(f"{here}.1/24")
            two.make_bridge(f"{there}.1/24")
            await until_reached(one, f"{there}.1", f"{here}.1")
        ip("link", "del", "flannel.1", netns=one.netns)
        async with one.flannel(one.address):
            # A new device has a new MAC: the other machine must learn it, too.
            await until_reached(one, f"{there}.1", f"{here}.1")
            assert subnet_of(await one.subnet()) == here


async def test_host_gw_routes_over_the_common_segment(tmp_path: Path) -> None:
    async with machines(2, tmp_path, ClusterCA.create()) as (one, two), AsyncExitStack() as stack:
        await stack.enter_async_context(one.discoverd())
        for machine in (one, two):
            await stack.enter_async_context(machine.host())
            await stack.enter_async_context(machine.flannel(one.address, BACKEND="host-gw", NETWORK="100.64.0.0/16"))
        here, there = subnet_of(await one.subnet()), subnet_of(await two.subnet())
        one.make_bridge(f"{here}.1/24")
        two.make_bridge(f"{there}.1/24")
        await until_reached(one, f"{there}.1", f"{here}.1")
        assert any(line.startswith(f"{there}.0/24 via {two.address} dev eth0") for line in one.shows("route"))
        assert here.startswith("100.64.")
        network = one.status().network
        assert network is not None and network.mtu == 1500


@asynccontextmanager
async def overlay(
    directory: Path, count: int, **environ: str
) -> AsyncIterator[tuple[list[Machine], list[IPv4Interface], list[AsyncExitStack], ClusterCA]]:
    """Machines in an overlay, each with a bridge; their bridges, and the stacks of their agents."""
    ca = ClusterCA.create()
    async with machines(count, directory, ca) as made, AsyncExitStack() as stack:
        await stack.enter_async_context(made[0].discoverd())
        agents = [await stack.enter_async_context(AsyncExitStack()) for _ in made]
        for machine, agent in zip(made, agents, strict=True):
            await stack.enter_async_context(machine.host())
            await agent.enter_async_context(machine.flannel(made[0].address, **environ))
        bridges = []
        for machine in made:
            machine.make_bridge(subnet := await machine.subnet())
            bridges.append(IPv4Interface(subnet))
        for bridge in bridges[1:]:
            await until_reached(made[0], str(bridge.ip), str(bridges[0].ip))
        yield made, bridges, agents, ca


@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
async def test_nothing_is_lost_while_the_agent_is_killed_and_started(tmp_path: Path, backend: str) -> None:
    async with overlay(tmp_path, 3, BACKEND=backend) as (made, bridges, agents, _):
        one, two, three = made
        async with two.echo(str(bridges[1].ip)), three.echo(str(bridges[2].ip)):
            async with (
                one.stream(str(bridges[0].ip), str(bridges[1].ip)) as first,
                one.stream(str(bridges[0].ip), str(bridges[2].ip)) as second,
            ):
                for machine, agent in ((one, agents[0]), (two, agents[1])):
                    await agent.aclose()  # kill -9
                    registered = len(machine.shows("route"))
                    await agent.enter_async_context(machine.flannel(one.address, BACKEND=backend))
                    await answers(machine)
                    assert len(machine.shows("route")) == registered
                await asyncio.sleep(1)
                for stream in (first, second):
                    sent, lost = await stream.ended()
                    print(f"{backend}: {sent} sent, {lost} lost")
                    assert (sent > 300, lost) == (True, 0)


async def answers(machine: Machine) -> None:
    """Returns when the agent's API listens, which is behind everything it does to the kernel at its start."""
    async with asyncio.timeout(20):
        while not any(":5002" in line for line in machine.run("ss", "-ltn").splitlines()):
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
async def test_what_a_foreign_hand_does_lasts_seconds(tmp_path: Path, backend: str) -> None:
    async with overlay(tmp_path, 2, BACKEND=backend) as ((one, two), (here, there), _, _):
        ip("route", "del", str(there.network), netns=one.netns)
        await until_reached(one, str(there.ip), str(here.ip))
        if backend == "host-gw":
            ip("route", "add", "100.100.249.77/32", "via", "10.66.0.99", netns=one.netns)  # not ours, so it stays
            ip("route", "add", "100.100.250.0/24", "via", two.address, "proto", "66", netns=one.netns)
        else:
            ip(
                "route",
                "add",
                "100.100.250.0/24",
                "via",
                str(there.network.network_address),
                "dev",
                "flannel.1",
                "onlink",
                netns=one.netns,
            )
            mac = next(line.split()[0] for line in one.fdb() if f"dst {two.address}" in line)
            one.run("bridge", "fdb", "del", mac, "dev", "flannel.1", "dst", two.address)
            one.run("bridge", "fdb", "append", "00:00:00:00:00:00", "dev", "flannel.1", "dst", "10.66.0.99")
            ip("neigh", "del", str(there.network.network_address), "dev", "flannel.1", netns=one.netns)
            ip("addr", "add", "100.100.251.1/24", "dev", "flannel.1", netns=one.netns)
            await until_reached(one, str(there.ip), str(here.ip))
            ip("link", "set", "flannel.1", "down", netns=one.netns)
            await until_reached(one, str(there.ip), str(here.ip))
        async with asyncio.timeout(20):
            while any("100.100.250.0" in line for line in one.shows("route")):
                await asyncio.sleep(0.1)
        if backend == "host-gw":
            assert any("10.66.0.99" in line for line in one.shows("route"))
        else:
            async with asyncio.timeout(20):
                while "100.100.251.1" in "\n".join(one.shows("addr")) or any(
                    "10.66.0.99" in line for line in one.fdb()
                ):
                    await asyncio.sleep(0.1)


async def test_a_machine_that_gets_another_address_keeps_its_block(tmp_path: Path) -> None:
    async with overlay(tmp_path, 3) as (made, bridges, agents, ca):
        one, two, three = made
        await agents[2].aclose()
        three.move("10.66.0.77", ca)
        await agents[2].enter_async_context(three.flannel(one.address))
        for machine, bridge in ((one, bridges[0]), (two, bridges[1])):
            await until_reached(machine, str(bridges[2].ip), str(bridge.ip))
            assert await three.reaches(str(bridge.ip), str(bridges[2].ip))
            assert not any("dst 10.66.0.3 " in line for line in machine.fdb())
        assert IPv4Interface(await three.subnet()) == bridges[2]


async def test_an_interface_that_is_another_one_now(tmp_path: Path) -> None:
    """Of the same name and address: a driver was loaded anew, or a network manager thought it knew better."""
    async with overlay(tmp_path, 2) as ((one, two), (here, there), _, _):
        two.replace_interface()
        await until_reached(one, str(there.ip), str(here.ip))


async def test_small_blocks_and_a_small_network_are_honoured_to_the_end(tmp_path: Path) -> None:
    settings = {"NETWORK": "100.70.0.0/20", "FLANNELD_SUBNET_LEN": "26", "FLANNELD_PORT": "4789", "FLANNELD_VNI": "7"}
    async with overlay(tmp_path, 2, **settings, FLANNELD_DEVICE="flannel.1") as ((one, two), bridges, _, _):
        assert all(str(bridge).startswith("100.70.") and bridge.network.prefixlen == 26 for bridge in bridges)
        network = one.status().network
        assert network is not None and (network.mtu, network.network) == (1450, "100.70.0.0/20")
        shown = "\n".join(one.shows("-d", "link", "show", "flannel.1"))
        assert "vxlan id 7" in shown and "dstport 4789" in shown
        assert any(line.startswith(f"{bridges[1].network} via") for line in one.shows("route"))
        assert await two.reaches(str(bridges[0].ip), str(bridges[1].ip))
