"""What discoverd and the flynn-host of its machine owe each other.

The host is told where the directory and the name server are (`POST /host/discoverd`); it tells where the containers'
bridge is, which is where the name server belongs. Either may start first and either may be restarted, so this is a
loop over "what should be true": it looks at the host's status and repeats what the host does not know.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

from flynn.discoverd.nameserver import Address
from flynn.host.client import HostClient
from flynn.types.errors import ApiError
from flynn.types.host import DiscoverdConfig, HostStatus, NetworkConfig

log = logging.getLogger(__name__)

BOOT_INTERVAL = 0.2  # seconds between looks while the machine is coming up
INTERVAL = 1.0  # afterwards: how long a restarted host may wait for what it forgot
DNS_PORT = 53

ServeNames = Callable[[Address, Sequence[str]], AbstractAsyncContextManager[Address]]
"""Serve DNS on an address, with these resolvers for names outside the zone."""


class HostLink:
    def __init__(self, host: HostClient, job_id: str, url: str) -> None:
        self._host = host
        self._job_id = job_id
        self._url = url
        self.silent = False  # while another process speaks for this node

    async def keep_informed(self, dns: str) -> None:
        """Tell the host for ever, for name servers whose address is fixed by configuration."""
        while True:
            status = await self._status()
            await self._tell(status, dns)
            await asyncio.sleep(INTERVAL if status is not None else BOOT_INTERVAL)

    async def follow_bridge(self, serve_names: ServeNames) -> None:
        """Serve names on the bridge as soon as, and as long as, the host has one, and keep the host informed.

        Until then the host is told without a name server; where there is a bridge already, only with it, so that a
        restart does not take an address away that answers again in a moment.
        """
        while True:
            status = await self._status()
            network = status.network if status is not None else None
            if network is None or not network.subnet:
                await self._tell(status, dns="")
                await asyncio.sleep(BOOT_INTERVAL)
                continue
            try:
                await self._serve_on(network, serve_names)
            except OSError as error:
                log.warning("cannot serve names on the bridge yet", extra={"subnet": network.subnet, "error": error})
                await self._tell(status, dns="")
                await asyncio.sleep(1)

    async def _serve_on(self, network: NetworkConfig, serve_names: ServeNames) -> None:
        """Returns when the host's network is another one."""
        bridge = str(ipaddress.ip_interface(network.subnet).ip)
        resolvers = [resolver for resolver in network.resolvers or () if resolver != bridge]
        async with serve_names((bridge, DNS_PORT), resolvers) as (ip, port):
            log.info("serving names", extra={"address": f"{ip}:{port}", "resolvers": resolvers})
            while True:
                status = await self._status()
                await self._tell(status, dns=f"{ip}:{port}")
                if status is not None and _moved(status.network, network):
                    return
                await asyncio.sleep(INTERVAL if status is not None else BOOT_INTERVAL)

    async def _status(self) -> HostStatus | None:
        """None while the host does not answer."""
        try:
            return await self._host.status()
        except ApiError as error:
            log.debug("the host does not answer", extra={"error": error})
            return None

    async def _tell(self, status: HostStatus | None, dns: str) -> None:
        """Tell the host what its status says it does not know."""
        wanted = DiscoverdConfig(job_id=self._job_id, url=self._url, dns=dns)
        if status is None or status.discoverd == wanted or self.silent:
            return
        try:
            await self._host.configure_discoverd(wanted)
            log.info("told the host", extra={"url": self._url, "dns": dns})
        except ApiError as error:
            log.warning("the host refuses to be told", extra={"error": error})


def _moved(now: NetworkConfig | None, before: NetworkConfig) -> bool:
    """A restarted host knows no network until flannel tells it; the bridge itself stays meanwhile."""
    return now is not None and bool(now.subnet) and (now.subnet, now.resolvers) != (before.subnet, before.resolvers)
