"""The host as a member of the cluster: who it is, its configuration by discoverd and flannel, its tags, its peers."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from contextlib import aclosing
from ipaddress import IPv4Address
from typing import NoReturn
from urllib.parse import quote

from flynn.host import state
from flynn.host.config import Config
from flynn.host.discovery import Discovery
from flynn.host.disk import StateDisk
from flynn.host.networking import NodeNetwork
from flynn.host.services.announcement import Announcement
from flynn.host.state import StateStore
from flynn.host.update import Update
from flynn.host.volumes.book import VolumeBook
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.types.errors import ApiError, Conflict, NotFound, ServiceUnavailable, Unreachable, ValidationError
from flynn.types.host import DiscoverdConfig, HostStatus, NetworkConfig
from flynn.types.instance import EventKind, Instance
from flynn.types.status import Health, Status
from flynn.types.volume import PullCoordinate, VolumeInfo
from flynn.version import VERSION

log = logging.getLogger(__name__)

SERVICE = "flynn-host"
PULL_TRIES = 3
PULL_SILENCE_SECONDS = 20.0
SLOT_DISCOVERD, SLOT_FLANNEL = "discoverd", "flannel"


class Node:
    """One host. Configuration is on the disk before it is acknowledged, and used again by the next daemon."""

    def __init__(
        self,
        config: Config,
        store: StateStore,
        network: NodeNetwork,
        discovery: Discovery,
        volumes: VolumeBook,
        identity: Identity,
        boot_id: str,
        update: Update,
        disk: StateDisk,
    ) -> None:
        self._config, self._store, self._network, self._discovery = config, store, network, discovery
        self._volumes, self._identity, self._boot_id = volumes, identity, boot_id
        self._update, self._disk = update, disk
        self._tags = {**config.tags, **(store.setting("tags", dict[str, str]) or {})}
        self._tags = {key: value for key, value in self._tags.items() if value}
        self._draining = store.setting("draining", bool) or False
        self._slots = store.setting("slots", dict[str, str]) or {}
        self._hosts: dict[str, str] = {}
        address = f"{config.external_ip}:{config.http_port}"
        self.announcement = Announcement(discovery, SERVICE, Instance.at(address, "https", self._meta()))

    @property
    def hosts(self) -> dict[str, str]:
        """The addresses of the hosts that discoverd knows, by id; ourselves in any case."""
        return {**self._hosts, self._config.id: str(self._config.external_ip)}

    @property
    def slots(self) -> dict[str, str]:
        """The ids of the jobs that give this host discoverd and the network."""
        return dict(self._slots)

    def status(self) -> HostStatus:
        return HostStatus(
            id=self._config.id,
            tags=dict(self._tags),
            pid=os.getpid(),
            url=f"https://{self._config.external_ip}:{self._config.http_port}",
            discoverd=self._discovery.config,
            network=self._network.config,
            version=VERSION,
            flags=list(self._config.flags) or None,
            update=self._update.last,
            memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            volumes=self._volumes.status(),
            disk=self._disk.status(),
        )

    def health(self) -> Status:
        """Return whether this host can do all that is asked of hosts, and what it cannot."""
        disk, volumes = self._disk.status(), self._volumes.status()
        troubles = {f"volumes {store.id}": store.trouble for store in volumes if store.trouble}
        if disk.trouble:
            troubles["disk"] = disk.trouble
        status = Health.UNHEALTHY if troubles else Health.HEALTHY
        return Status(status=status, detail=troubles or None, version=VERSION)

    def metrics(self) -> str:
        """Return the host's own figures, in the format of Prometheus."""
        disk = self._disk.status()
        figures: list[tuple[str, str, int]] = [
            ("flynn_host_disk_size_bytes", "", disk.size_bytes),
            ("flynn_host_disk_free_bytes", "", disk.free_bytes),
            ("flynn_host_disk_reserve_bytes", "", disk.reserve_bytes),
            ("flynn_host_disk_low", "", int(bool(disk.trouble))),
        ]
        for store in self._volumes.status():
            label = f'{{provider="{store.id}",kind="{store.kind}"}}'
            figures += [
                ("flynn_host_volumes", label, store.volumes),
                ("flynn_host_volumes_size_bytes", label, store.size_bytes),
                ("flynn_host_volumes_free_bytes", label, store.free_bytes),
                ("flynn_host_volumes_available", label, int(not store.trouble)),
            ]
        lines = [line for name, label, value in figures for line in (f"# TYPE {name} gauge", f"{name}{label} {value}")]
        return "\n".join(lines) + "\n"

    async def restore(self, living: set[str]) -> None:
        """Use the last configurations again if those who gave them still run: jobs in `living`, or this same boot."""
        same_boot = self._store.setting("boot", str) == self._boot_id

        def still_true(job_id: str) -> bool:
            return job_id in living if job_id else same_boot

        network = self._store.setting("network", NetworkConfig)
        if network is not None and still_true(network.job_id):
            try:
                await self._network.configure(network)
            except (ApiError, OSError) as error:
                log.error("the last network configuration does not work any more", extra={"error": str(error)})
        discoverd = self._store.setting("discoverd", DiscoverdConfig)
        if discoverd is not None and still_true(discoverd.job_id):
            await self._discovery.configure(discoverd)
        await self._store.commit(state.save_setting("boot", self._boot_id))

    async def configure_discoverd(self, config: DiscoverdConfig) -> None:
        """Raises `ValidationError`."""
        merged = await self._discovery.configure(config)
        await self._keep("discoverd", merged, SLOT_DISCOVERD, merged.job_id)

    async def configure_network(self, config: NetworkConfig) -> None:
        """Returns once the bridge exists. Raises `ValidationError`."""
        done = await self._network.configure(config)
        await self._keep("network", done, SLOT_FLANNEL, done.job_id)

    async def _keep(self, name: str, value: object, slot: str, job_id: str) -> None:
        changes = [state.save_setting(name, value)]
        if job_id:
            self._slots[slot] = job_id
            changes.append(state.save_setting("slots", self._slots))
        await self._store.commit(*changes, durable=True)

    async def set_tags(self, tags: Mapping[str, str]) -> None:
        """Merge tags; an empty value deletes one."""
        for key, value in tags.items():  # all of them, before any is taken over
            if not key or not key.isprintable() or any(character in key for character in "=,"):
                raise ValidationError("tags", f"cannot have the key {key!r}")
            if not value.isprintable():
                raise ValidationError(key, f"cannot be tagged {value!r}")
        for key, value in tags.items():
            if value:
                self._tags[key] = value
            else:
                self._tags.pop(key, None)
        # What the command line gives would come back at the next start, so a deletion is kept as an empty value.
        kept = {**{key: "" for key in self._config.tags if key not in self._tags}, **self._tags}
        await self._store.commit(state.save_setting("tags", kept), durable=True)
        self.announcement.set_meta(self._meta())

    async def set_draining(self, draining: bool) -> None:
        """Get no more jobs from the scheduler, also after a restart, or get them again."""
        self._draining = draining
        await self._store.commit(state.save_setting("draining", draining), durable=True)
        self.announcement.set_meta(self._meta())

    def _meta(self) -> dict[str, str]:
        going = {"shutdown": "true"} if self._draining else {}
        return {"id": self._config.id, **going, **{f"tag:{key}": value for key, value in sorted(self._tags.items())}}

    async def follow_hosts(self) -> NoReturn:
        """Keep the packet filter informed about which addresses are hosts."""
        await self._discovery.connected.wait()
        known: dict[str, Instance] = {}
        while True:
            try:
                async with aclosing(self._discovery.registry.watch(SERVICE)) as events:
                    async for event in events:
                        if event.instance is None:
                            continue
                        if event.kind is EventKind.DOWN:
                            known.pop(event.instance.id, None)
                        else:
                            known[event.instance.id] = event.instance
                        self._hosts = {one.meta.get("id", one.id): one.host for one in known.values()}
                        await self._network.set_hosts([IPv4Address(one.host) for one in known.values()])
            except (ApiError, ValueError, OSError) as error:
                log.warning("lost sight of the other hosts", extra={"error": str(error)})
            await asyncio.sleep(1)

    async def pull_snapshot(self, volume_id: str, source: PullCoordinate) -> VolumeInfo:
        """Receive another host's snapshot into one of our volumes: as a difference if that fits, else whole.

        A transfer that breaks off has changed nothing and is begun again, `PULL_TRIES` times in all.

        Raises:
            NotFound: no such host, or it has no such snapshot.
            ServiceUnavailable: discoverd is not known yet, or does not answer.
            Unreachable: the transfer broke off each time.
        """
        for field, text in (("host_id", source.host_id), ("snapshot_id", source.snapshot_id)):
            if not text:
                raise ValidationError(field, "must be set")
        self._volumes.get(volume_id)
        try:
            hosts = await self._discovery.registry.instances(SERVICE)
        except Unreachable as error:
            raise ServiceUnavailable(f"discoverd does not say where hosts are: {error.message}") from error
        address = next((host.addr for host in hosts if host.meta.get("id") == source.host_id), None)
        if address is None:
            raise NotFound(f'no host with id "{source.host_id}"')
        haves = self._volumes.snapshots_of(volume_id)
        attempt = 1
        while True:
            try:
                return await self._pull(volume_id, address, source.snapshot_id, haves)
            except Conflict:
                if not haves:
                    raise
                haves = []  # what we have is not what the difference builds on
            except Unreachable as error:
                log.warning("transfer broke off", extra={"snapshot": source.snapshot_id, "error": str(error)})
                if attempt == PULL_TRIES:
                    raise
                await asyncio.sleep(attempt)
                attempt += 1

    async def _pull(self, volume_id: str, address: str, snapshot_id: str, haves: list[str]) -> VolumeInfo:
        async with HttpClient(f"https://{address}", tls=self._identity, server_name=f"{SERVICE}.discoverd") as http:
            headers = {"Accept": "application/vnd.zfs.snapshot-stream", "Content-Type": "application/json"}
            body = [{"snap_id": have} for have in haves]
            path = f"/storage/volumes/{quote(snapshot_id, safe='')}/send"
            async with http.download(path, headers=headers, body=body, silence=PULL_SILENCE_SECONDS) as (_, chunks):
                return await self._volumes.receive(volume_id, snapshot_id, chunks)
