"""flynn-host gets its subnet from us, and gets it again whenever it has forgotten it."""

from __future__ import annotations

import asyncio
import logging

from flynn.flannel.document import Lease, Overlay
from flynn.host.client import HostClient
from flynn.types.errors import ApiError
from flynn.types.host import NetworkConfig

log = logging.getLogger(__name__)

BOOT_INTERVAL = 0.2  # seconds while the host has not taken the network
INTERVAL = 1.0  # afterwards: how long a restarted host may wait


def announcement(overlay: Overlay, lease: Lease, mtu: int, job_id: str) -> NetworkConfig:
    """What the host is told: the first usable address of the block is the bridge's."""
    bridge = f"{lease.subnet.network_address + 1}/{lease.subnet.prefixlen}"
    return NetworkConfig(job_id=job_id, subnet=bridge, mtu=mtu, network=str(overlay.network))


async def keep_informed(host: HostClient, wanted: NetworkConfig) -> None:
    told = False
    while True:
        try:
            status = await host.status()
            if not _knows(status.network, wanted):
                await host.configure_network(wanted)
                log.info("the host has its network", extra={"subnet": wanted.subnet, "mtu": wanted.mtu})
            told = True
        except ApiError as error:
            if told:
                log.info("the host does not answer", extra={"error": error})
            told = False
        await asyncio.sleep(INTERVAL if told else BOOT_INTERVAL)


def _knows(known: NetworkConfig | None, wanted: NetworkConfig) -> bool:
    return known is not None and (known.job_id, known.subnet, known.mtu) == (wanted.job_id, wanted.subnet, wanted.mtu)
