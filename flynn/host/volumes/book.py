"""The host's volumes: which there are, where they lie, and the events about them. spec/host.md section 12."""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeVar

from flynn.aio.broadcast import Broadcast
from flynn.aio.clock import Clock
from flynn.host import state, steps
from flynn.host.state import Change, KeptVolume, StateStore
from flynn.host.volumes.provider import (
    BadStream,
    Condition,
    Unavailable,
    Unsupported,
    VolumeBusy,
    VolumeError,
    VolumeGone,
    VolumeProvider,
)
from flynn.types.errors import (
    ApiError,
    Conflict,
    NotFound,
    ObjectExists,
    ServiceUnavailable,
    UnknownError,
    ValidationError,
)
from flynn.types.resources import MIB
from flynn.types.volume import (
    META_CLONE_OF,
    META_QUOTA,
    META_SNAPSHOT_OF,
    ProviderStatus,
    VolumeEvent,
    VolumeInfo,
    VolumeRequest,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,199}")  # it names a directory or a data set

START_SECONDS = 20.0  # the host does not wait longer for its storage: jobs without volumes can run
OPEN_SECONDS = 90.0  # importing a pool after a power cut replays its log
CHECK_SECONDS = 60.0
RETRY_SECONDS = 5.0  # who asks again sooner gets the last failure
TEND_SECONDS = 15.0
COLLECT_ROUNDS = 240  # of tending: once an hour
FULL_BYTES = 64 * MIB  # below, new volumes are refused and the host is unhealthy
SMALLEST_QUOTA = MIB


@dataclass(slots=True)
class _Shelf:
    """A provider, and how it is."""

    provider: VolumeProvider
    open: bool = False
    trouble: str = "not opened yet"
    failed_at: float = float("-inf")
    condition: Condition | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # one opening at a time


class VolumeBook:
    """All volumes of a host. Every change is on the disk before it is acknowledged."""

    def __init__(
        self,
        store: StateStore,
        providers: Mapping[str, VolumeProvider],
        clock: Clock,
        in_use: Callable[[], set[str]],
        new_id: Callable[[], str],
        *,
        default_quota: int = 0,
    ) -> None:
        """`default_quota` is the size limit, in bytes, of volumes whose creator names none; 0 is no limit."""
        self._store, self._clock = store, clock
        self._shelves = {name: _Shelf(provider) for name, provider in providers.items()}
        self._in_use, self._new_id, self._default_quota = in_use, new_id, default_quota
        self._volumes: dict[str, KeptVolume] = {}
        self._doomed: list[str] = []  # to be destroyed, but something still needed them
        self._locks: dict[str, asyncio.Lock] = {}  # one creation, mount or destruction per volume at a time
        self.events: Broadcast[VolumeEvent] = Broadcast()

    # The storage

    async def open(self) -> None:
        """Recall the volumes and open the providers. One that fails, or takes long, is tried again later."""
        self._volumes = {volume.info.id: volume for volume in self._store.volumes()}
        self._doomed = [one for one in self._store.setting("doomed volumes", list[str]) or [] if one in self._volumes]
        for name in self._shelves:
            try:
                async with asyncio.timeout(START_SECONDS):
                    await self._opened(name)
            except VolumeError:
                pass  # `_opened` has logged it
            except TimeoutError:
                self._failed(name, Unavailable(f"not open after {START_SECONDS:.0f} s"))

    async def _opened(self, name: str) -> VolumeProvider:
        """Return a provider that is open. Raises `NotFound` for an unknown one, or `VolumeError`."""
        shelf = self._shelf(name)
        if shelf.open:
            return shelf.provider
        async with shelf.turn:
            if shelf.open:
                return shelf.provider
            if self._clock.monotonic() - shelf.failed_at < RETRY_SECONDS:
                raise Unavailable(shelf.trouble)
            # Where volumes are recorded there was storage: an empty pool in its place would hide that it is missing.
            fresh = all(volume.provider != name for volume in self._volumes.values())
            try:
                async with asyncio.timeout(OPEN_SECONDS):
                    await shelf.provider.open(create=fresh)
            except TimeoutError as error:
                raise self._failed(name, Unavailable(f"not open after {OPEN_SECONDS:.0f} s")) from error
            except VolumeError as error:
                raise self._failed(name, error) from error
            shelf.open, shelf.trouble = True, ""
            return shelf.provider

    def _failed(self, name: str, error: VolumeError) -> Unavailable:
        shelf = self._shelf(name)
        if shelf.open or shelf.trouble != str(error):
            log.error("volumes not available", extra={"provider": name, "error": str(error)})
        shelf.open, shelf.trouble, shelf.condition = False, str(error), None
        shelf.failed_at = self._clock.monotonic()
        return Unavailable(f"volumes of the provider {name} are not available: {error}")

    def _shelf(self, name: str) -> _Shelf:
        try:
            return self._shelves[name]
        except KeyError:
            raise NotFound(f'no volume provider with id "{name}"') from None

    async def tend(self, after: Callable[[], Awaitable[None]]) -> NoReturn:
        """Look after the storage, for ever; `after` is called each time it has been looked at."""
        rounds = 0
        while True:
            for name in self._shelves:
                await self._look_at(name)
            await after()
            await self._destroy_doomed()
            if rounds % COLLECT_ROUNDS == 0:
                await self.collect()
            rounds += 1
            await asyncio.sleep(TEND_SECONDS)

    async def _look_at(self, name: str) -> None:
        shelf = self._shelf(name)
        for _ in range(2):  # found closed: opened again at once
            try:
                provider = await self._opened(name)
                async with asyncio.timeout(CHECK_SECONDS):
                    condition = await provider.check()
            except TimeoutError:
                self._failed(name, Unavailable(f"no answer in {CHECK_SECONDS:.0f} s"))
                return
            except VolumeError as error:
                if shelf.open:
                    self._failed(name, error)
                    shelf.failed_at = float("-inf")
                    continue
                return
            shelf.condition = condition
            trouble = condition.trouble or _fullness(condition)
            if trouble and trouble != shelf.trouble:
                log.error("volumes in trouble", extra={"provider": name, "trouble": trouble})
            shelf.trouble = trouble
            return

    def status(self) -> list[ProviderStatus]:
        """Return how the storage is."""
        return [
            ProviderStatus(
                id=name,
                kind=shelf.provider.kind,
                volumes=sum(1 for volume in self._volumes.values() if volume.provider == name),
                size_bytes=shelf.condition.size_bytes if shelf.condition else 0,
                free_bytes=shelf.condition.free_bytes if shelf.condition else 0,
                trouble=shelf.trouble,
            )
            for name, shelf in self._shelves.items()
        ]

    # The volumes

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

    async def create(self, provider_name: str, request: VolumeRequest) -> VolumeInfo:
        """Make an empty data volume.

        Raises:
            NotFound: no such provider.
            ObjectExists: the id is taken.
            ServiceUnavailable: the storage is missing, full, or does not answer.
        """
        self._shelf(provider_name)
        volume_id, quota = self._named(request), self._quota(request.meta)
        async with self._lock(volume_id):
            if volume_id in self._volumes:
                raise ObjectExists(f'volume "{volume_id}" exists')
            provider = await self._with_room(provider_name)
            place = await _translated(provider.create(volume_id, quota_bytes=quota))
            info = VolumeInfo(id=volume_id, type="data", meta=request.meta, created_at=self._clock.now())
            return await self._record_new(KeptVolume(info, provider_name, place), fresh=not request.id)

    def _named(self, request: VolumeRequest) -> str:
        volume_id = request.id or self._new_id()
        if _ID.fullmatch(volume_id) is None:
            raise ValidationError("id", "must be a plain name of up to 200 letters, digits, dots, dashes, underscores")
        return volume_id

    def _quota(self, meta: Mapping[str, str]) -> int | None:
        text = meta.get(META_QUOTA, "")
        if not text:
            return self._default_quota or None
        if not text.isdigit() or (0 < int(text) < SMALLEST_QUOTA):
            raise ValidationError("meta", f"{META_QUOTA} must be a number of bytes, of at least {SMALLEST_QUOTA}")
        return int(text) or None

    async def _with_room(self, name: str) -> VolumeProvider:
        provider = await _translated(self._opened(name))
        condition = self._shelf(name).condition
        if condition is not None and (fullness := _fullness(condition)):
            raise ServiceUnavailable(f"no new volumes: {fullness}")
        return provider

    async def _record_new(self, volume: KeptVolume, *, fresh: bool) -> VolumeInfo:
        """Record a volume just made. If that fails, one whose id nobody else knows (`fresh`) is destroyed again."""
        try:
            return await self._record(volume)
        except ServiceUnavailable:
            if fresh:
                try:
                    await self._shelf(volume.provider).provider.destroy(volume.place)
                except VolumeError as error:
                    log.warning("volume left behind", extra={"place": volume.place, "error": str(error)})
            raise

    async def _record(self, volume: KeptVolume, *others: Change) -> VolumeInfo:
        await self._commit(state.save_volume(volume), *others)
        self._volumes[volume.info.id] = volume
        self.events.send(VolumeEvent(type="create", volume=volume.info))
        return volume.info

    async def _commit(self, *changes: Change) -> None:
        try:
            await self._store.commit(*changes, durable=True)
        except sqlite3.Error as error:
            raise ServiceUnavailable(f"the change of the volume could not be recorded: {error}") from error

    async def mounted(self, volume_id: str) -> Path:
        """Return the directory of a volume. Raises `VolumeError`."""
        volume = self._volumes.get(volume_id)
        if volume is None:
            raise VolumeGone(f"volume {volume_id} does not exist")
        async with self._lock(volume_id):
            return await (await self._opened(volume.provider)).mount(volume.place)

    def read_only(self, volume_id: str) -> bool:
        """Tell whether nobody may write to a volume: it is a snapshot."""
        volume = self._volumes.get(volume_id)
        return volume is not None and META_SNAPSHOT_OF in volume.info.meta

    async def destroy(self, volume_id: str) -> None:
        """Destroy a volume and its data. Raises `NotFound`, or `Conflict` while a job or a snapshot needs it."""
        if volume_id in self._in_use():
            raise Conflict(f"volume {volume_id} is in use by a job")
        async with self._lock(volume_id):
            volume = self._kept(volume_id)
            provider = await _translated(self._opened(volume.provider))
            try:
                await _translated(provider.destroy(volume.place))
            except NotFound:
                pass  # an earlier daemon has died in between
            steps.reach("volume-destroyed")
            await self._commit(state.forget_volume(volume_id))
            self._volumes.pop(volume_id, None)
            self.events.send(VolumeEvent(type="destroy", volume=volume.info))
        self._locks.pop(volume_id, None)

    async def discard(self, volume_id: str) -> None:
        """Destroy a volume that its job has left, now or as soon as nothing needs it any more."""
        try:
            await self.destroy(volume_id)
        except NotFound:
            return
        except ApiError as error:
            if volume_id not in self._doomed:
                log.info("volume to be destroyed later", extra={"volume": volume_id, "reason": error.message})
                self._doomed.append(volume_id)
                await self._keep_doomed()

    async def _destroy_doomed(self) -> None:
        for volume_id in list(self._doomed):
            try:
                if volume_id in self._volumes:
                    await self.destroy(volume_id)
            except ApiError:
                continue  # not yet
            self._doomed.remove(volume_id)
            await self._keep_doomed()

    async def _keep_doomed(self) -> None:
        try:
            await self._store.commit(state.save_setting("doomed volumes", self._doomed))
        except sqlite3.Error:
            pass  # logged by the store; `volume gc` finds it in any case

    async def collect(self) -> list[str]:
        """Remove what aborted snapshots and transfers have left. Names what was removed."""
        removed: list[str] = []
        for name, shelf in self._shelves.items():
            if not shelf.open or any(lock.locked() for lock in self._locks.values()):
                continue  # a snapshot that is being made is not a leftover; the next round comes
            volumes = {one.info.id: one.place for one in self._volumes.values() if one.provider == name}
            try:
                removed += await shelf.provider.collect(volumes)
            except VolumeError as error:
                log.warning("leftovers of volumes", extra={"provider": name, "error": str(error)})
        if removed:
            log.info("removed what aborted transfers have left", extra={"names": " ".join(removed)})
        return removed

    # Snapshots

    async def snapshot(self, volume_id: str) -> VolumeInfo:
        """Freeze a volume's present content as a new volume."""
        volume = self._kept(volume_id)
        snapshot_id = self._new_id()
        async with self._lock(volume_id):
            provider = await _translated(self._opened(volume.provider))
            place = await _translated(provider.snapshot(volume.place, snapshot_id))
            return await self._record_new(self._as_snapshot(volume, snapshot_id, place), fresh=True)

    async def clone(self, snapshot_id: str, request: VolumeRequest) -> VolumeInfo:
        """Make a writable volume that begins as a snapshot.

        Raises:
            NotFound: no such snapshot.
            ValidationError: it is an ordinary volume, or the request makes no sense.
            ObjectExists: the id is taken.
        """
        snapshot = self._snapshot(snapshot_id, "cloned")
        volume_id, quota = self._named(request), self._quota(request.meta)
        # Not what the snapshot's volume says of itself: a clone is no app's until its maker says so.
        meta = {**request.meta, META_CLONE_OF: snapshot_id}
        async with self._lock(volume_id):
            if volume_id in self._volumes:
                raise ObjectExists(f'volume "{volume_id}" exists')
            provider = await self._with_room(snapshot.provider)
            place = await _translated(provider.clone(snapshot.place, volume_id, quota_bytes=quota))
            info = VolumeInfo(id=volume_id, type=snapshot.info.type, meta=meta, created_at=self._clock.now())
            return await self._record_new(KeptVolume(info, snapshot.provider, place), fresh=not request.id)

    def _snapshot(self, volume_id: str, what: str) -> KeptVolume:
        volume = self._kept(volume_id)
        if META_SNAPSHOT_OF not in volume.info.meta:
            raise ValidationError("id", f"must be that of a snapshot: only a snapshot can be {what}")
        return volume

    def snapshots_of(self, volume_id: str) -> list[str]:
        """Return the ids of a volume's snapshots, oldest first."""
        found = [one.info for one in self._volumes.values() if one.info.meta.get(META_SNAPSHOT_OF) == volume_id]
        return [info.id for info in sorted(found, key=lambda info: info.created_at)]

    async def send(self, volume_id: str, haves: list[str]) -> AsyncGenerator[bytes, None]:
        """Stream a snapshot, as a difference when the receiver's last snapshot is one of ours.

        Raises:
            NotFound, ValidationError: before the first byte.
        """
        volume = self._snapshot(volume_id, "sent")
        base = self._volumes.get(haves[-1]) if haves else None
        if base is not None and (base.provider != volume.provider or META_SNAPSHOT_OF not in base.info.meta):
            base = None
        provider = await _translated(self._opened(volume.provider))
        async with aclosing(provider.send(volume.place, base.place if base else None)) as chunks:
            while chunk := await _translated(anext(chunks, b"")):
                yield chunk

    async def receive(self, volume_id: str, snapshot_id: str, stream: AsyncIterator[bytes]) -> VolumeInfo:
        """Apply another host's snapshot to a volume no job uses; returns the snapshot as it exists here now.

        Raises:
            Conflict: a job uses the volume, or the snapshot is here already, or the difference does not fit.
            ValidationError: this is not a whole snapshot.
        """
        volume = self._kept(volume_id)
        if volume_id in self._in_use():
            raise Conflict(f"volume {volume_id} is in use by a job")
        async with self._lock(volume_id):
            if snapshot_id in self._volumes:
                raise ObjectExists(f'volume "{snapshot_id}" exists')
            provider = await self._with_room(volume.provider)
            moved, place = await _translated(provider.receive(volume.place, snapshot_id, stream))
            volume = KeptVolume(volume.info, volume.provider, moved)
            info = await self._record(self._as_snapshot(volume, snapshot_id, place), state.save_volume(volume))
            self._volumes[volume_id] = volume
            return info

    def _as_snapshot(self, volume: KeptVolume, snapshot_id: str, place: str) -> KeptVolume:
        meta = {**volume.info.meta, META_SNAPSHOT_OF: volume.info.id}
        info = VolumeInfo(id=snapshot_id, type=volume.info.type, meta=meta, created_at=self._clock.now())
        return KeptVolume(info, volume.provider, place)

    def _lock(self, volume_id: str) -> asyncio.Lock:
        return self._locks.setdefault(volume_id, asyncio.Lock())


def _fullness(condition: Condition) -> str:
    if condition.free_bytes >= min(FULL_BYTES, condition.size_bytes // 20):
        return ""
    return f"the storage is full: {condition.free_bytes // MIB} of {condition.size_bytes // MIB} MiB are free"


async def _translated(work: Awaitable[T]) -> T:
    """Turn a provider's refusal into one the caller of the API can act on."""
    try:
        return await work
    except VolumeBusy as error:
        raise Conflict(str(error)) from error
    except VolumeGone as error:
        raise NotFound(str(error)) from error
    except (Unsupported, BadStream) as error:
        raise ValidationError("", str(error)) from error
    except Unavailable as error:
        raise ServiceUnavailable(str(error)) from error
    except VolumeError as error:
        raise UnknownError(str(error)) from error
