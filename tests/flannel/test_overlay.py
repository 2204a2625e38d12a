"""flannel on real machines (namespaces): blocks, VXLAN, packets; restarts and foreign hands."""

from __future__ import annotations

import asyncio
import os
import shutil
from contextlib import AsyncExitStack
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
