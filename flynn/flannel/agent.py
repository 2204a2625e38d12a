"""The agent of one machine: keeps kernel and lease in step with the network state in discoverd.

Level-triggered: every change of the state, and every half minute without one, the whole wanted data path is compared
with the whole present one. A missed event, a hand in the kernel or a restart of this process leaves nothing to repair.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface

from flynn.flannel import datapath, kernel
from flynn.flannel.document import BackendType, Document, Lease, Overlay, leases_of
from flynn.flannel.kernel import Device, Interface, VxlanDevice
from flynn.flannel.leases import NetworkState, pause_until_renewal

log = logging.getLogger(__name__)

RECONCILE_EVERY = 30.0


@dataclass(frozen=True, slots=True)
class Uplink:
    """The device that traffic for other machines leaves by; its own MTU is what containers may use."""

    device: Device
    layer2: bool


class Agent:
    def __init__(self, state: NetworkState, overlay: Overlay, uplink: Uplink | None, lease: Lease) -> None:
        self.overlay = overlay
        self.lease = lease
        self.leases: list[Lease] = [lease]
        self._state = state
        self._uplink = uplink
        self._changed = asyncio.Event()
        self._changed.set()

    async def follow(self) -> None:
        """Take over what the others publish; publish our own lease again if somebody removed or changed it."""
        async for document in self._state.documents():
            self.leases = leases_of(document)
            self._changed.set()
            if not self._is_ours_in(document):
                log.warning("our lease is gone from the network state", extra={"subnet": self.lease.subnet})
                await self._renew()

    async def renew(self) -> None:
        while True:
            await pause_until_renewal()
            await self._renew()

    async def reconcile(self) -> None:
        if self._uplink is None:
            await asyncio.Event().wait()
            return
        while True:
            try:
                await asyncio.to_thread(self._reconcile, self._uplink)
            except (OSError, kernel.NetlinkError) as error:
                log.error("cannot bring the routes up to date", extra={"error": error})
            try:
                async with asyncio.timeout(RECONCILE_EVERY):
                    await self._changed.wait()
            except TimeoutError:
                continue
            self._changed.clear()

    def _reconcile(self, uplink: Uplink) -> None:
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

    async def _renew(self) -> None:
        renewed = await self._state.ensure_lease(self.overlay, self.lease)
        if renewed.subnet != self.lease.subnet:
            # The bridge and its containers have addresses of the old block: only a fresh start gets out of this.
            raise LostSubnet(f"{self.lease.subnet} was given away, {renewed.subnet} is the new one")
        self.lease = renewed

    def _is_ours_in(self, document: Document) -> bool:
        ours = {lease.subnet: lease for lease in leases_of(document)}.get(self.lease.subnet)
        return ours is not None and replace(ours, renewed_at=None) == replace(self.lease, renewed_at=None)


class LostSubnet(Exception):
    """Somebody else holds this machine's block; the process ends and starts with another one."""


def prepare_uplink(overlay: Overlay, underlay: Interface, name: str) -> Uplink | None:
    """The device of the backend, without an address yet: its MAC is part of the lease. Blocks."""
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
