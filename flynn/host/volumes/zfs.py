"""Volumes as ZFS file systems: `<pool>/data/<id>`, snapshots as clones' origins, quotas, send and receive.

Works with the kernel module and with zfs-fuse (which cannot show `.zfs/snapshot`, so that a snapshot volume is a
read-only clone there). The pool lies on a sparse file unless the operator has made one on a device before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from flynn.host.volumes import fuse
from flynn.host.volumes.commands import failure, run
from flynn.host.volumes.provider import Unsupported, VolumeBusy, VolumeError, VolumeGone

log = logging.getLogger(__name__)

POOL_SHARE = 0.7  # of the file system that carries the pool's file
DESTROY_TRIES = 5
LET_GO_SECONDS = 0.3
RECEIVE_SECONDS = 3600.0  # a large volume from a slow disk
CHUNK_BYTES = 1 << 20


class ZfsProvider:
    """One pool. `directory` holds the pool's file and the mount points."""

    kind = "zfs"

    def __init__(self, pool: str, directory: Path) -> None:
        self._pool, self._directory = pool, directory
        self._file = directory / "vdev" / f"{pool}-zpool.vdev"
        self._mounts = directory / "mnt"

    async def open(self) -> None:
        """Have the pool imported, creating it only where neither pool nor file exists."""
        if fuse.needed():
            await fuse.ensure_daemon()
        await asyncio.to_thread(self._file.parent.mkdir, mode=0o700, parents=True, exist_ok=True)
        if not await self._imported():
            if self._file.exists():
                await self._import()
            else:
                await self._create_pool()
        try:
            await run("zfs", "list", "-H", "-o", "name", f"{self._pool}/data")
        except VolumeGone:
            await run("zfs", "create", "-o", "mountpoint=none", f"{self._pool}/data")

    async def close(self) -> None:
        """Nothing: the pool stays imported, jobs write to it."""

    async def _imported(self) -> bool:
        return self._pool in (await run("zpool", "list", "-H", "-o", "name")).split()

    async def _import(self) -> None:
        # -f: the last user may have died without exporting; the state directory's lock keeps two daemons apart.
        await run("zpool", "import", "-f", "-d", str(self._file.parent), self._pool)
        log.info("pool imported", extra={"pool": self._pool})

    async def _create_pool(self) -> None:
        usage = await asyncio.to_thread(shutil.disk_usage, self._file.parent)
        size = int(usage.total * POOL_SHARE) // (1 << 20) * (1 << 20)
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

    async def create(self, volume_id: str, *, quota_bytes: int | None = None) -> str:
        place = f"{self._pool}/data/{volume_id}"
        path = self._path(place)
        await asyncio.to_thread(path.mkdir, parents=True, exist_ok=True)
        options = ["-o", f"mountpoint={path}"]
        if quota_bytes:
            options += ["-o", f"quota={quota_bytes}"]
        try:
            await run("zfs", "create", *options, place)
        except VolumeError as error:
            if "already exists" not in str(error):
                raise
        await self.mount(place)
        return place

    async def mount(self, place: str) -> Path:
        path = self._path(place)
        if await asyncio.to_thread(_mounted, path):
            return path
        if fuse.needed():
            await asyncio.to_thread(fuse.unmount_dead)
        await self.open()
        await asyncio.to_thread(path.mkdir, parents=True, exist_ok=True)
        mounted, wanted = (await run("zfs", "get", "-H", "-o", "value", "mounted,mountpoint", place)).split("\n")[:2]
        if wanted != str(path):
            await run("zfs", "set", f"mountpoint={path}", place)  # the state directory has moved
        elif mounted == "yes":
            await run("zfs", "umount", "-f", place)  # zfs believes it is, the kernel knows better
        if not await asyncio.to_thread(_mounted, path):
            await run("zfs", "mount", place)
        if not await asyncio.to_thread(_mounted, path):
            raise VolumeError(f"{place} was mounted elsewhere: zfs-fuse runs in another mount namespace")
        return path

    async def snapshot(self, place: str, snapshot_id: str) -> str:
        await run("zfs", "snapshot", f"{place}@{snapshot_id}")
        clone = f"{self._pool}/data/{snapshot_id}"
        path = self._path(clone)
        await asyncio.to_thread(path.mkdir, parents=True, exist_ok=True)
        await run("zfs", "clone", "-o", f"mountpoint={path}", "-o", "readonly=on", f"{place}@{snapshot_id}", clone)
        return clone

    async def destroy(self, place: str) -> None:
        """Destroy a volume. One with snapshots that are volumes of their own is busy until those are gone."""
        for attempt in range(1, DESTROY_TRIES + 1):
            try:
                await self._destroy_once(place)
                break
            except VolumeGone:
                break
            except VolumeBusy:
                if attempt == DESTROY_TRIES:
                    raise
                await asyncio.sleep(0.2 * attempt)
        await asyncio.to_thread(_remove_empty, self._path(place))

    async def _destroy_once(self, place: str) -> None:
        origin = (await run("zfs", "get", "-H", "-o", "value", "origin", place)).strip()
        await run("zfs", "destroy", "-r", place)
        if origin not in ("", "-"):
            try:
                await run("zfs", "destroy", origin)  # the snapshot a clone was made for
            except VolumeError as error:
                log.warning("snapshot left behind", extra={"snapshot": origin, "error": str(error)})

    async def send(self, place: str, base: str | None) -> AsyncIterator[bytes]:
        origin = (await run("zfs", "get", "-H", "-o", "value", "origin", place)).strip()
        if origin in ("", "-"):
            raise Unsupported("can only send a snapshot")
        argv = ["zfs", "send"]
        if base is not None:
            argv += ["-i", "@" + (await run("zfs", "get", "-H", "-o", "value", "origin", base)).strip().split("@")[1]]
        argv.append(origin)
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None and process.stderr is not None
        try:
            while chunk := await process.stdout.read(CHUNK_BYTES):
                yield chunk
            errors = await process.stderr.read()
            if await process.wait() != 0:
                raise failure(argv, errors.decode(errors="replace").strip())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def receive(self, place: str, snapshot_id: str, stream: AsyncIterator[bytes]) -> str:
        """Received into a file first: a stream that breaks off must not touch the volume, and zfs-fuse needs a file
        (it takes a short read from a pipe for an error, and cannot read from the socket that asyncio would give it)."""
        with tempfile.TemporaryFile(dir=self._directory) as spool:
            async for chunk in stream:
                await asyncio.to_thread(spool.write, chunk)
            await asyncio.to_thread(spool.flush)
            spool.seek(0)
            await self._unmount(place)
            await run("zfs", "receive", "-F", f"{place}@{snapshot_id}", stdin=spool.fileno(), seconds=RECEIVE_SECONDS)
        clone = f"{self._pool}/data/{snapshot_id}"
        path = self._path(clone)
        await asyncio.to_thread(path.mkdir, parents=True, exist_ok=True)
        await run("zfs", "clone", "-o", f"mountpoint={path}", "-o", "readonly=on", f"{place}@{snapshot_id}", clone)
        return clone

    async def _unmount(self, place: str) -> None:
        """zfs-fuse cannot receive into a mounted file system, and lets go of it a moment after it was unmounted."""
        if not await asyncio.to_thread(_mounted, self._path(place)):
            return
        await run("zfs", "umount", place)
        if fuse.needed():
            await asyncio.sleep(LET_GO_SECONDS)


async def destroy_pool(pool: str) -> None:
    """Remove a pool with everything in it (for uninstalling, and for clusters that were an experiment)."""
    for attempt in range(1, DESTROY_TRIES + 1):
        try:
            await run("zpool", "destroy", "-f", pool)
            return
        except VolumeGone:
            return
        except VolumeBusy:
            if attempt == DESTROY_TRIES:
                raise
            await asyncio.sleep(0.2 * attempt)


def _mounted(path: Path) -> bool:
    """Tell whether something alive is mounted at `path`."""
    try:
        return os.path.ismount(path) and not fuse.is_dead(str(path))
    except OSError:
        return False


def _remove_empty(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        pass
