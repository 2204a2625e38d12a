"""Volumes as ZFS file systems: `<pool>/data/<id>`, snapshots as clones' origins, quotas, send and receive.

Works with the kernel module and with zfs-fuse (which cannot show `.zfs/snapshot`, so that a snapshot volume is a
read-only clone there). The pool lies on a sparse file unless the operator has made one on a device before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from uuid import UUID

from flynn.host.volumes import fuse, mounts
from flynn.host.volumes.commands import NoAnswer, end, failure, run
from flynn.host.volumes.patience import PatientThreads
from flynn.host.volumes.provider import BadStream, Condition, Unavailable, VolumeBusy, VolumeError, VolumeGone
from flynn.host.volumes.spool import spooled

log = logging.getLogger(__name__)

POOL_SHARE = 0.7  # of the file system that carries the pool's file
FREE_SHARE = 0.9
BUSY_TRIES = 5
LET_GO_SECONDS = 0.3
RECEIVE_SECONDS = 3600.0  # a large volume from a slow disk
SEND_SILENCE_SECONDS = 120.0
CHECK_SECONDS = 10.0
CHUNK_BYTES = 1 << 20
MAGIC = 0x2F5BACBAC
REPLACES = "flynn:replaces"  # a property: this file system was received to be the volume that lies there
REPLACED = "flynn:replaced"  # a property: this file system was a volume before one was received in its place


class ZfsProvider:
    """One pool. `directory` holds the pool's file and the mount points."""

    kind = "zfs"

    def __init__(self, pool: str, directory: Path) -> None:
        self._pool, self._directory = pool, directory
        self._file = directory / "vdev" / f"{pool}-zpool.vdev"
        self._mounts = directory / "mnt"
        self._threads = PatientThreads()
        self._silent: fuse.Vitals | None = None  # how zfs-fuse was when it did not answer for the first time

    async def open(self, *, create: bool) -> None:
        """Have the pool imported, creating it only where neither pool nor file exists, and `create` says so."""
        await self._with_daemon()
        await asyncio.to_thread(self._file.parent.mkdir, mode=0o700, parents=True, exist_ok=True)
        if not await self._imported():
            if self._file.exists():
                await self._import("-d", str(self._file.parent))
            elif create:
                await self._create_pool()
            else:
                await self._import()
        try:
            await run("zfs", "list", "-H", "-o", "name", f"{self._pool}/data")
        except VolumeGone:
            await run("zfs", "create", "-o", "mountpoint=none", f"{self._pool}/data")

    async def _with_daemon(self) -> None:
        """Have zfs-fuse running where it is needed; one that hangs is killed once that is certain."""
        if not fuse.needed():
            return
        try:
            await fuse.ensure_daemon(self._threads)
            self._silent = None
        except NoAnswer as error:
            silence = NoAnswer(f"zfs-fuse does not answer: {error}")
            now = await asyncio.to_thread(fuse.vitals)
            if now is None:
                raise silence from error
            if self._silent is None or self._silent.pid != now.pid:
                self._silent = now
            if not fuse.is_hung(self._silent, now):
                raise silence from error
            await fuse.kill(self._silent)
            self._silent = None
            await fuse.ensure_daemon(self._threads)

    async def close(self) -> None:
        """Nothing: the pool stays imported, jobs write to it."""

    async def check(self) -> Condition:
        await self._with_daemon()
        try:
            health = (await run("zpool", "list", "-H", "-o", "health", self._pool, seconds=CHECK_SECONDS)).strip()
        except VolumeGone as error:
            raise Unavailable(f"the pool {self._pool} is not imported") from error
        figures = await run("zfs", "get", "-Hp", "-o", "value", "used,available", self._pool, seconds=CHECK_SECONDS)
        used, free = (int(figure) for figure in figures.split())
        if health not in ("ONLINE", "DEGRADED"):
            return Condition(used + free, free, f"the pool {self._pool} is {health}")
        return Condition(used + free, free)

    async def _imported(self) -> bool:
        return self._pool in (await run("zpool", "list", "-H", "-o", "name")).split()

    async def _import(self, *where: str) -> None:
        # -f: the last user may have died without exporting; the state directory's lock keeps two daemons apart.
        try:
            await run("zpool", "import", "-f", *where, self._pool)
        except NoAnswer:
            raise
        except VolumeError as error:
            if where:
                text = f"the pool {self._pool} on {self._file} cannot be imported ({error})"
            else:
                text = f"the pool {self._pool} is missing: there is no {self._file}, and no device carries it ({error})"
            raise Unavailable(text) from error
        log.info("pool imported", extra={"pool": self._pool})

    async def _create_pool(self) -> None:
        usage = await asyncio.to_thread(shutil.disk_usage, self._file.parent)
        # More than is free would promise what the disk cannot hold: a pool whose writes fail stands still.
        size = int(min(usage.total * POOL_SHARE, usage.free * FREE_SHARE)) // (1 << 20) * (1 << 20)
        beside = self._file.with_suffix(".new")
        beside.unlink(missing_ok=True)
        with beside.open("wb") as file:
            file.truncate(size)
        beside.rename(self._file)
        try:
            await run("zpool", "create", "-f", "-m", "none", self._pool, str(self._file))
        except VolumeError:
            self._file.unlink(missing_ok=True)  # or the next start would take it for a pool
            raise
        log.info("pool created", extra={"pool": self._pool, "bytes": size})

    def _path(self, place: str) -> Path:
        return self._mounts / place.removeprefix(f"{self._pool}/")

    async def collect(self, volumes: Mapping[str, str]) -> list[str]:
        """Snapshots and clones of ours that no volume stands for, and what was replaced by something received.

        Only those with ids like ours, as the operator's own snapshots are nobody's leftovers.
        """
        if not volumes:
            return []
        known, places = set(volumes), set(volumes.values())
        collected: list[str] = []
        clones, parents, replaced = set(), set(places), []
        for name, origin, replaces, state in await self._listed("filesystem", f"name,origin,{REPLACES},{REPLACED}"):
            parent, _, snapshot_id = origin.partition("@")
            aborted = parent in places and _ours(snapshot_id) and name.rpartition("/")[2] == snapshot_id
            if name not in places and (aborted or replaces in places):
                collected += await self._discard("-r", name)
                continue
            if name not in places and state == "yes":
                parents.add(name)
                replaced.append(name)
            clones.add(origin)
        for name, _ in await self._listed("snapshot", "name,used"):
            parent, _, snapshot_id = name.partition("@")
            if parent in parents and _ours(snapshot_id) and snapshot_id not in known and name not in clones:
                collected += await self._discard(name)
        for name in replaced:
            collected += await self._discard(name)
        return collected

    async def _listed(self, kind: str, columns: str) -> list[list[str]]:
        listing = await run("zfs", "list", "-H", "-r", "-t", kind, "-o", columns, f"{self._pool}/data")
        return [line.split("\t") for line in listing.splitlines()]

    async def _discard(self, *what: str) -> list[str]:
        """Destroy something unless it is still needed: the last of `what` is its name."""
        try:
            await run("zfs", "destroy", *what)
        except (VolumeBusy, VolumeGone):
            return []
        except VolumeError as error:
            if "has children" not in str(error):
                raise
            return []  # a snapshot of it is still a volume
        await self._threads.run(_remove_empty, self._path(what[-1]))
        return [what[-1]]

    async def create(self, volume_id: str, *, quota_bytes: int | None = None) -> str:
        place = f"{self._pool}/data/{volume_id}"
        await self._make("create", place, *_quota(quota_bytes))
        return place

    async def _make(self, verb: str, place: str, *options: str, of: str | None = None) -> None:
        """Create or clone a file system and have it mounted; one that is there already is adopted."""
        path = self._path(place)
        await self._threads.run(_ensure_directory, path)
        try:
            await run("zfs", verb, "-o", f"mountpoint={path}", *options, *([of] if of else []), place)
        except VolumeError as error:
            if "already exists" not in str(error):
                await asyncio.to_thread(_remove_empty, path)
                raise
            for option in options:
                if option.startswith("quota="):
                    await run("zfs", "set", option, place)
        await self.mount(place)

    async def mount(self, place: str) -> Path:
        path = self._path(place)
        if await self._threads.run(_alive, path):
            return path
        if fuse.needed():
            await self._threads.run(fuse.unmount_dead)
        await self.open(create=False)
        await self._threads.run(_ensure_directory, path)
        mounted, wanted = (await run("zfs", "get", "-H", "-o", "value", "mounted,mountpoint", place)).split("\n")[:2]
        if wanted != str(path):
            await run("zfs", "set", f"mountpoint={path}", place)  # the state directory has moved
        elif mounted == "yes":
            await run("zfs", "umount", "-f", place)  # zfs believes it is, the kernel knows better
        if not await self._threads.run(_alive, path):
            await _patiently(lambda: run("zfs", "mount", place))
        if not await self._threads.run(_alive, path):
            raise VolumeError(f"{place} was mounted elsewhere: zfs-fuse runs in another mount namespace")
        return path

    async def snapshot(self, place: str, snapshot_id: str) -> str:
        await run("zfs", "snapshot", f"{place}@{snapshot_id}")
        return await self._shown(f"{place}@{snapshot_id}", snapshot_id)

    async def _shown(self, snapshot: str, snapshot_id: str) -> str:
        """Make a snapshot visible as a read-only volume."""
        place = f"{self._pool}/data/{snapshot_id}"
        await self._make("clone", place, "-o", "readonly=on", of=snapshot)
        return place

    async def clone(self, place: str, volume_id: str, *, quota_bytes: int | None = None) -> str:
        clone = f"{self._pool}/data/{volume_id}"
        await self._make("clone", clone, *_quota(quota_bytes), of=await self._origin(place))
        return clone

    async def _origin(self, place: str) -> str:
        """Return the snapshot behind a snapshot volume. Raises `VolumeError` for an ordinary volume."""
        origin = (await run("zfs", "get", "-H", "-o", "value", "origin", place)).strip()
        if origin in ("", "-"):
            raise VolumeError("can only send a snapshot")
        return origin

    async def destroy(self, place: str) -> None:
        """Destroy a volume. One with snapshots that are volumes of their own is busy until those are gone."""
        try:
            await _patiently(lambda: self._destroy_once(place))
        except VolumeGone:
            pass
        await self._threads.run(_remove_empty, self._path(place))

    async def _destroy_once(self, place: str) -> None:
        origin = (await run("zfs", "get", "-H", "-o", "value", "origin", place)).strip()
        await run("zfs", "destroy", "-r", place)
        if origin not in ("", "-"):
            try:
                await run("zfs", "destroy", origin)  # the snapshot a clone was made for
            except VolumeError as error:
                # Another clone begins there; the last one takes it along.
                log.info("snapshot kept", extra={"snapshot": origin, "reason": str(error)})

    async def send(self, place: str, base: str | None) -> AsyncGenerator[bytes, None]:
        origin = await self._origin(place)
        argv = ["zfs", "send"]
        if base is not None and (base_origin := await self._origin(base)).partition("@")[0] == origin.partition("@")[0]:
            argv += ["-i", "@" + base_origin.partition("@")[2]]
        argv.append(origin)
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, limit=CHUNK_BYTES
        )
        assert process.stdout is not None and process.stderr is not None
        try:
            while chunk := await asyncio.wait_for(process.stdout.read(CHUNK_BYTES), SEND_SILENCE_SECONDS):
                yield chunk
            errors = await process.stderr.read()
            if await process.wait() != 0:
                raise failure(argv, errors.decode(errors="replace").strip())
        finally:
            await end(process)

    async def receive(self, place: str, snapshot_id: str, stream: AsyncIterator[bytes]) -> tuple[str, str]:
        """Received into a file first: a stream that breaks off must not touch the volume, and zfs-fuse needs a file
        (it takes a short read from a pipe for an error, and cannot read from the socket that asyncio would give it)."""
        async with spooled(stream, self._directory) as spool:
            difference = _is_difference(spool.fileno())
            into = place
            if not difference and await self._has_snapshots(place):
                into = f"{self._pool}/data/{snapshot_id}-whole"  # a whole stream only goes where there is no snapshot
            else:
                await self._unmount(place)
            os.lseek(spool.fileno(), 0, os.SEEK_SET)
            try:
                await run(
                    "zfs", "receive", "-F", f"{into}@{snapshot_id}", stdin=spool.fileno(), seconds=RECEIVE_SECONDS
                )
            except VolumeError:
                if into != place:
                    await self._forget(into)
                raise
        if into != place:
            into = await self._replace(place, into)
        return into, await self._shown(f"{into}@{snapshot_id}", snapshot_id)

    async def _has_snapshots(self, place: str) -> bool:
        listing = await run("zfs", "list", "-H", "-r", "-t", "snapshot", "-o", "name", place)
        return bool(listing.strip())

    async def _replace(self, place: str, received: str) -> str:
        """Let a received file system be the volume. The old one goes as soon as its snapshots have gone."""
        limits = (await run("zfs", "get", "-H", "-p", "-o", "value", "quota", place)).strip()
        if limits not in ("", "-", "0", "none"):
            await run("zfs", "set", f"quota={limits}", received)
        await run("zfs", "set", f"{REPLACES}={place}", received)
        await run("zfs", "set", f"mountpoint={self._path(received)}", received)
        await self._unmount(place)
        await run("zfs", "set", f"{REPLACED}=yes", place)
        return received

    async def _forget(self, place: str) -> None:
        try:
            await run("zfs", "destroy", "-r", place)
        except VolumeError:
            pass  # it never came to be

    async def _unmount(self, place: str) -> None:
        """zfs-fuse cannot receive into a mounted file system, and lets go of it a moment after it was unmounted."""
        if not await self._threads.run(_alive, self._path(place)):
            return
        await run("zfs", "umount", place)
        if fuse.needed():
            await asyncio.sleep(LET_GO_SECONDS)


def _quota(quota_bytes: int | None) -> list[str]:
    return ["-o", f"quota={quota_bytes}"] if quota_bytes else []


def _ours(name: str) -> bool:
    try:
        return str(UUID(name)) == name
    except ValueError:
        return False


def _is_difference(stream: int) -> bool:
    """Tell whether a stream builds on another snapshot: it names the one. Raises `BadStream` if it is no ZFS stream.

    struct dmu_replay_record: type, length, magic, version and flags, creation time, type and flags, to-id, from-id.
    """
    head = os.pread(stream, 56, 0)
    if len(head) == 56 and MAGIC in (int.from_bytes(head[8:16], "little"), int.from_bytes(head[8:16], "big")):
        return any(head[48:56])
    raise BadStream("this is not a snapshot of the provider zfs")


async def destroy_pool(pool: str) -> None:
    """Remove a pool with everything in it (for uninstalling, and for clusters that were an experiment)."""
    try:
        await _patiently(lambda: run("zpool", "destroy", "-f", pool))
    except VolumeGone:
        pass


async def _patiently(act: Callable[[], Awaitable[object]]) -> None:
    """Do something that may find its object busy for a moment: zfs-fuse lets go of file systems late."""
    for attempt in range(1, BUSY_TRIES + 1):
        try:
            await act()
            return
        except VolumeBusy:
            if attempt == BUSY_TRIES:
                raise
            await asyncio.sleep(0.2 * attempt)


def _alive(path: Path) -> bool:
    """Tell whether something alive is mounted at `path`. Blocks while a zfs-fuse hangs."""
    mounted = mounts.at(str(path), mounts.parse(Path("/proc/self/mountinfo").read_text()))
    return mounted is not None and not fuse.is_dead(str(path))


def _ensure_directory(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


def _remove_empty(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        pass
