"""The host's volumes: which there are, where they lie, and the events about them. spec/host.md section 12."""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

from flynn.aio.broadcast import Broadcast
from flynn.aio.clock import Clock
from flynn.host import state, steps
from flynn.host.state import KeptVolume, StateStore
from flynn.host.volumes.provider import Unsupported, VolumeBusy, VolumeError, VolumeGone, VolumeProvider
from flynn.types.errors import Conflict, NotFound, ObjectExists, ServiceUnavailable, UnknownError, ValidationError
from flynn.types.volume import VolumeEvent, VolumeInfo, VolumeRequest

log = logging.getLogger(__name__)

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,199}")  # it names a directory or a data set
META_SNAPSHOT_OF = "flynn.snapshot-of"
META_QUOTA = "flynn.quota"  # bytes; what a creator may ask for


class VolumeBook:
    """All volumes of a host. Every change is on the disk before it is acknowledged."""

    def __init__(
        self,
        store: StateStore,
        providers: Mapping[str, VolumeProvider],
        clock: Clock,
        in_use: Callable[[], set[str]],
        new_id: Callable[[], str],
    ) -> None:
        self._store, self._providers, self._clock = store, providers, clock
        self._in_use, self._new_id = in_use, new_id
        self._volumes: dict[str, KeptVolume] = {}
        self._open: set[str] = set()  # providers that have been found or made
        self._locks: dict[str, asyncio.Lock] = {}  # one creation, mount or destruction per volume at a time
        self.events: Broadcast[VolumeEvent] = Broadcast()

    async def open(self) -> None:
        """Open the providers and recall the volumes. A provider that fails is tried again when it is needed."""
        self._volumes = {volume.info.id: volume for volume in self._store.volumes()}
        for name in self._providers:
            try:
                await self._opened(name)
            except VolumeError as error:
                log.error("volume provider not available", extra={"provider": name, "error": str(error)})

    async def _opened(self, name: str) -> VolumeProvider:
        """Return a provider that is open. Raises `NotFound` for an unknown one, or `VolumeError`."""
        provider = self._provider(name)
        if name not in self._open:
            await provider.open()
            self._open.add(name)
        return provider

    def all(self) -> list[VolumeInfo]:
        return [volume.info for volume in self._volumes.values()]

    def get(self, volume_id: str) -> VolumeInfo:
        """Raises `NotFound`."""
        return self._kept(volume_id).info

    def _kept(self, volume_id: str) -> KeptVolume:
        try:
            return self._volumes[volume_id]
        except KeyError:
            raise NotFound(f'no volume with id "{volume_id}"') from None

    def _provider(self, name: str) -> VolumeProvider:
        try:
            return self._providers[name]
        except KeyError:
            raise NotFound(f'no volume provider with id "{name}"') from None

    async def create(self, provider_name: str, request: VolumeRequest) -> VolumeInfo:
        """Make an empty data volume.

        Raises:
            NotFound: no such provider.
            ObjectExists: the id is taken.
        """
        provider = await _translated(self._opened(provider_name))
        volume_id = request.id or self._new_id()
        if _ID.fullmatch(volume_id) is None:
            raise ValidationError("id", "must be a plain name of up to 200 letters, digits, dots, dashes, underscores")
        quota = request.meta.get(META_QUOTA, "")
        if quota and not quota.isdigit():
            raise ValidationError("meta", f"{META_QUOTA} must be a number of bytes")
        async with self._lock(volume_id):
            if volume_id in self._volumes:
                raise ObjectExists(f'volume "{volume_id}" exists')
            place = await _translated(provider.create(volume_id, quota_bytes=int(quota) if quota else None))
            info = VolumeInfo(id=volume_id, type="data", meta=request.meta, created_at=self._clock.now())
            return await self._record(KeptVolume(info, provider_name, place))

    async def _record(self, volume: KeptVolume) -> VolumeInfo:
        try:
            await self._store.commit(state.save_volume(volume), durable=True)
        except sqlite3.Error as error:
            raise ServiceUnavailable(f"the volume could not be recorded: {error}") from error
        self._volumes[volume.info.id] = volume
        self.events.send(VolumeEvent(type="create", volume=volume.info))
        return volume.info

    async def mounted(self, volume_id: str) -> Path:
        """Return the directory of a volume. Raises `VolumeError`."""
        volume = self._volumes.get(volume_id)
        if volume is None:
            raise VolumeGone(f"volume {volume_id} does not exist")
        async with self._lock(volume_id):
            return await (await self._opened(volume.provider)).mount(volume.place)

    async def destroy(self, volume_id: str) -> None:
        """Destroy a volume and its data. Raises `NotFound`, or `Conflict` while a job or a snapshot needs it."""
        if volume_id in self._in_use():
            raise Conflict(f"volume {volume_id} is in use by a job")
        async with self._lock(volume_id):
            volume = self._kept(volume_id)
            provider = await _translated(self._opened(volume.provider))
            await _translated(provider.destroy(volume.place))
            steps.reach("volume-destroyed")
            await self._store.commit(state.forget_volume(volume_id), durable=True)
            self._volumes.pop(volume_id, None)
            self.events.send(VolumeEvent(type="destroy", volume=volume.info))
        self._locks.pop(volume_id, None)

    async def snapshot(self, volume_id: str) -> VolumeInfo:
        """Freeze a volume's present content as a new volume."""
        volume = self._kept(volume_id)
        snapshot_id = self._new_id()
        async with self._lock(volume_id):
            place = await _translated(self._provider(volume.provider).snapshot(volume.place, snapshot_id))
            return await self._record(self._as_snapshot(volume, snapshot_id, place))

    async def send(self, volume_id: str, haves: list[str]) -> AsyncGenerator[bytes, None]:
        """Stream a snapshot, as a difference when the receiver's last snapshot is one of ours."""
        volume = self._kept(volume_id)
        base = self._volumes.get(haves[-1]) if haves else None
        chunks = self._provider(volume.provider).send(volume.place, base.place if base else None)
        while chunk := await _translated(anext(chunks, b"")):
            yield chunk

    async def receive(self, volume_id: str, snapshot_id: str, stream: AsyncIterator[bytes]) -> VolumeInfo:
        """Apply another host's snapshot to a volume no job uses; returns the snapshot as it exists here now."""
        volume = self._kept(volume_id)
        if volume_id in self._in_use():
            raise Conflict(f"volume {volume_id} is in use by a job")
        async with self._lock(volume_id):
            place = await _translated(self._provider(volume.provider).receive(volume.place, snapshot_id, stream))
            return await self._record(self._as_snapshot(volume, snapshot_id, place))

    def _as_snapshot(self, volume: KeptVolume, snapshot_id: str, place: str) -> KeptVolume:
        meta = {**volume.info.meta, META_SNAPSHOT_OF: volume.info.id}
        info = VolumeInfo(id=snapshot_id, type=volume.info.type, meta=meta, created_at=self._clock.now())
        return KeptVolume(info, volume.provider, place)

    def _lock(self, volume_id: str) -> asyncio.Lock:
        return self._locks.setdefault(volume_id, asyncio.Lock())


async def _translated(work: Awaitable[T]) -> T:
    """Turn a provider's refusal into one the caller of the API can act on."""
    try:
        return await work
    except VolumeBusy as error:
        raise Conflict(str(error)) from error
    except VolumeGone as error:
        raise NotFound(str(error)) from error
    except Unsupported as error:
        raise ValidationError("", str(error)) from error
    except VolumeError as error:
        raise UnknownError(str(error)) from error
