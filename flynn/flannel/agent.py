"""The agent of one machine: keeps kernel and lease in step with the network state in discoverd.

Level-triggered: every change of the state, and every few seconds without one, the whole wanted data path is compared
with the whole present one. A missed event, a hand in the kernel or a restart of this process leaves nothing to repair.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface

from flynn.flannel import datapath, kernel
from flynn.flannel.document import BackendType, Document, Lease, Overlay, leases_of
from flynn.flannel.kernel import Device, VxlanDevice
from flynn.flannel.leases import NetworkState
from flynn.flannel.subnets import RENEW_EVERY
from flynn.types.errors import ApiError

log = logging.getLogger(__name__)

RECONCILE_EVERY = 5.0  # how long the work of a foreign hand lasts; a look costs a few milliseconds
LOOK_EVERY = 30.0
LOOKS_PER_RENEWAL = round(RENEW_EVERY.total_seconds() / LOOK_EVERY)


@dataclass(frozen=True, slots=True)
class Uplink:
    """The device that traffic for other machines leaves by; its own MTU is what containers may use."""

    device: Device
    layer2: bool


Prepare = Callable[[], Uplink | None]


class Agent:
    """`prepare` brings the device of the backend about (anew, if somebody removed it); it blocks."""

    def __init__(self, state: NetworkState, overlay: Overlay, prepare: Prepare, lease: Lease) -> None:
        self.overlay = overlay
        self.lease = lease
        self.leases: list[Lease] = [lease]
        self._state = state
        self._prepare = prepare
        self._changed = asyncio.Event()
        self._changed.set()

    async def follow(self) -> None:
        """Take over what the others publish."""
        async for document in self._state.documents():
            await self._take(document)

    async def watch_over(self) -> None:
        """Renew the lease every hour, and look every half minute whether it is still there.

        A directory that lost everything has no metadata to send an event about, so following is not enough.
        """
        for look in itertools.count(1):
            # At random, so that the machines of a cluster that started together do not race for every renewal.
            await asyncio.sleep(LOOK_EVERY * random.uniform(0.8, 1.2))
            try:
                if look % LOOKS_PER_RENEWAL == 0:
                    await self._renew()
                else:
                    await self._take(await self._state.document())
            except ApiError as error:
                log.debug("cannot look after the lease", extra={"error": error})

    async def reconcile(self) -> None:
        while True:
            try:
                await self._reconcile()
            except (OSError, kernel.NetlinkError, kernel.NoInterface) as error:
                log.error("cannot bring the routes up to date", extra={"error": error})
            try:
                async with asyncio.timeout(RECONCILE_EVERY):
                    await self._changed.wait()
            except TimeoutError:
                continue
            self._changed.clear()

    async def _reconcile(self) -> None:
        uplink = await asyncio.to_thread(self._prepare)
        if uplink is None:
            return
        await asyncio.to_thread(address_uplink, self.overlay, uplink, self.lease)
        if uplink.layer2 and uplink.device.mac != self.lease.vtep_mac:
            log.warning("the device is a new one", extra={"mac": uplink.device.mac})
            self.lease = replace(self.lease, vtep_mac=uplink.device.mac)
            await self._renew()
        await asyncio.to_thread(self._bring_up_to_date, uplink)

    def _bring_up_to_date(self, uplink: Uplink) -> None:
        wanted = datapath.wanted(self.overlay, self.leases, self.lease)
        present = kernel.read_datapath(uplink.device.index, layer2=uplink.layer2)
        add, remove = wanted.minus(present), present.minus(wanted)
        if add or remove:
            refused = kernel.change_datapath(uplink.device.index, add=add, remove=remove, layer2=uplink.layer2)
            log.info(
                "routes changed",
                extra={"machines": len(wanted.routes), "added": len(add.routes), "removed": len(remove.routes)},
            )
            for text in refused:
                log.error("the kernel refused", extra={"change": text})

    async def _take(self, document: Document) -> None:
        leases = leases_of(document)
        if leases != self.leases:
            self.leases = leases
            self._changed.set()
        if not self._is_ours_in(leases):
            log.warning("our lease is not in the network state", extra={"subnet": self.lease.subnet})
            await self._renew()

    async def _renew(self) -> None:
        renewed = await self._state.ensure_lease(self.overlay, self.lease)
        if renewed.subnet != self.lease.subnet:
            # The bridge and its containers have addresses of the old block: only a fresh start gets out of this.
            raise LostSubnet(f"{self.lease.subnet} was given away, {renewed.subnet} is the new one")
        self.lease = renewed

    def _is_ours_in(self, leases: list[Lease]) -> bool:
        ours = {lease.subnet: lease for lease in leases}.get(self.lease.subnet)
        return ours is not None and replace(ours, renewed_at=None) == replace(self.lease, renewed_at=None)


class LostSubnet(Exception):
    """Somebody else holds this machine's block; the process ends and starts with another one."""


def prepare_uplink(overlay: Overlay, interface: str, name: str) -> Uplink | None:
    """The device of the backend, without an address yet: its MAC is part of the lease. Blocks.

    The interface it runs over is looked up each time: it may be another one of the same name or address by now.
    """
    underlay = kernel.find_interface(interface)
    match overlay.backend:
        case BackendType.VXLAN:
            wanted = VxlanDevice(name=name, vni=overlay.vni, port=overlay.port, underlay=underlay)
            return Uplink(kernel.ensure_vxlan(wanted), layer2=True)
        case BackendType.HOST_GW:
            return Uplink(Device(underlay.index, "", underlay.mtu), layer2=False)
        case BackendType.ALLOC:
            return None


def address_uplink(overlay: Overlay, uplink: Uplink | None, lease: Lease) -> None:
    """Give our VXLAN device its address: the block's own, with the whole overlay as its network. Blocks."""
    if uplink is not None and uplink.layer2:
        address = IPv4Interface((lease.subnet.network_address, overlay.network.prefixlen))
        kernel.ensure_only_address(uplink.device.index, address)
