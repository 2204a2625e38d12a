"""The flannel process: a block of container addresses for this machine, and ways to the blocks of the others."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

from flynn import daemon
from flynn.aio.clock import Clock, SystemClock
from flynn.aio.supervisor import supervisor
from flynn.daemon import ConfigError
from flynn.discoverd.client import Discoverd
from flynn.discoverd.instances import instance_from_environment
from flynn.discoverd.registry import Registry
from flynn.flannel import agent, health, hostlink, kernel
from flynn.flannel import config as configuration
from flynn.flannel.agent import Agent
from flynn.flannel.config import Config
from flynn.flannel.document import InvalidNetwork, Lease, proposal
from flynn.flannel.leases import NO_WISH, SERVICE, NetworkState
from flynn.host.client import HostClient
from flynn.http.client import HttpClient
from flynn.http.server import Api, listen
from flynn.identity import Identity
from flynn.types.errors import ApiError
from flynn.types.instance import Instance

log = logging.getLogger(__name__)

HOST_TIMEOUT = 30.0  # seconds: the host answers when the bridge is up


def main() -> None:
    daemon.run("flannel", lambda: running(configuration.parse(sys.argv[1:], os.environ), SystemClock()))


@asynccontextmanager
async def running(config: Config, clock: Clock) -> AsyncIterator[Agent]:
    """All of flannel. Leaving it leaves device, routes and lease: traffic goes on without this process."""
    identity = Identity.from_environment()
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(Discoverd.from_environment(os.environ))
        state = NetworkState(registry, clock, _proposal(config))
        here, mtu = await _set_up_network(config, state)
        http = await stack.enter_async_context(HttpClient(config.host_url, tls=identity, timeout=HOST_TIMEOUT))
        announced = hostlink.announcement(here.overlay, here.lease, mtu, config.job_id)
        await asyncio.to_thread(_write_subnet_file, config, announced.subnet, mtu)
        api = Api("flannel", status=health.Reachability(identity, lambda: _others(here)).status)
        await stack.enter_async_context(listen(api, config.external_ip, config.http_port, tls=identity))
        spawn = await stack.enter_async_context(supervisor())
        spawn("keep the host informed", hostlink.keep_informed(HostClient(http), announced))
        spawn("follow the network state", here.follow())
        spawn("reconcile the data path", here.reconcile())
        spawn("watch over the lease", here.watch_over())
        spawn("answer on the overlay", _listen_on_overlay(api, here.lease, config.http_port, identity))
        spawn(
            "stay registered",
            _stay_registered(registry, instance_from_environment(os.environ, config.http_port, "https")),
        )
        yield here


async def _set_up_network(config: Config, state: NetworkState) -> tuple[Agent, int]:
    """Device, lease, address; gives the agent, and the MTU for containers."""
    try:
        overlay = await state.overlay()
        underlay = await asyncio.to_thread(kernel.find_interface, config.interface)
    except (InvalidNetwork, kernel.NoInterface) as error:
        raise ConfigError(str(error)) from error
    device = config.device or f"flannel.{overlay.vni}"
    prepare = partial(agent.prepare_uplink, overlay, config.interface, device)
    uplink = await asyncio.to_thread(prepare)
    me = Lease(
        subnet=NO_WISH,
        public_ip=config.external_ip,
        http_port=str(config.http_port),
        backend="" if overlay.backend == "alloc" else overlay.backend,
        vtep_mac=uplink.device.mac if uplink else "",
        host_id=config.host_id,
    )
    lease = await state.ensure_lease(overlay, me)
    await asyncio.to_thread(agent.address_uplink, overlay, uplink, lease)
    mtu = uplink.device.mtu if uplink else underlay.mtu
    log.info("lease", extra={"subnet": lease.subnet, "backend": overlay.backend, "mtu": mtu})
    return Agent(state, overlay, prepare, lease), mtu


def _proposal(config: Config) -> dict[str, Any]:
    return proposal(
        config.network,
        config.backend,
        subnet_min=config.subnet_min,
        subnet_max=config.subnet_max,
        subnet_len=config.subnet_len,
        vni=config.vni,
        port=config.port,
    )


def _others(here: Agent) -> list[Lease]:
    return [lease for lease in here.leases if lease.subnet != here.lease.subnet]


def _write_subnet_file(config: Config, subnet: str, mtu: int) -> None:
    """For scripts of the machine; nothing of ours reads it."""
    path = config.subnet_file
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}")
        beside.write_text(f"FLANNEL_SUBNET={subnet}\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=false\n")
        beside.rename(path)
    except OSError as error:
        log.warning("could not write the subnet file", extra={"path": path, "error": error})


async def _listen_on_overlay(api: Api, lease: Lease, port: int, identity: Identity) -> None:
    """Best effort: with host-gw and alloc this address is on no device."""
    try:
        async with listen(api, str(lease.subnet.network_address), port, tls=identity):
            await asyncio.Event().wait()
    except OSError as error:
        log.info("no answers on the overlay address", extra={"error": error})
        await asyncio.Event().wait()


async def _stay_registered(registry: Registry, instance: Instance) -> None:
    while True:
        try:
            async with registry.registered(SERVICE, instance):
                await asyncio.Event().wait()
        except ApiError as error:
            log.warning("could not register", extra={"error": error})


if __name__ == "__main__":
    main()
