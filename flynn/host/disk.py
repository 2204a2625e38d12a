"""The disk under the host's state: who may still have some of it, and what is given up when it runs low.

Two things keep the daemon going on a disk that is full to the last byte: the state file has room inside itself
(`StateStore.hold_room`), and a file of ballast beside it is thrown overboard when a daemon starts on such a disk.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, Protocol

from flynn.host.jobs import room
from flynn.host.jobs.container import scratch_bytes
from flynn.host.jobs.room import Disk
from flynn.host.layers import LayerStore
from flynn.host.logs.files import LogDirectory
from flynn.types.errors import ServiceUnavailable, ValidationError
from flynn.types.host import DiskStatus, HostJob

log = logging.getLogger(__name__)

LOOK_EVERY = timedelta(seconds=5)
FORGET_EVERY = timedelta(hours=1)
BALLAST_BYTES = 8 << 20
BALLAST_SHARE = 16  # of a small disk, one part in so many
BALLAST = "ballast"


class State(Protocol):
    async def hold_room(self) -> None:
        """Have room in the state file for changes on a full disk. Raises `OSError` or `sqlite3.Error`."""


class StateDisk:
    """`in_use` names the layers of jobs that are not down, `apps` the apps that have listed jobs."""

    def __init__(
        self,
        directory: Path,
        reserve_bytes: int | None,
        layers: LayerStore,
        logs: LogDirectory,
        *,
        in_use: Callable[[], Collection[str]],
        apps: Callable[[], Collection[str]],
    ) -> None:
        self._directory, self._reserve = directory, reserve_bytes
        self._layers, self._logs, self._in_use, self._apps = layers, logs, in_use, apps
        self._memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._was_low = False

    def look(self) -> Disk:
        """Return how the disk is now."""
        found = os.statvfs(self._directory)
        total = found.f_blocks * found.f_frsize
        reserve = room.default_reserve(total) if self._reserve is None else self._reserve
        return Disk(str(self._directory), total, found.f_bavail * found.f_frsize, reserve)

    def admit(self, job: HostJob) -> None:
        """Let a job in.

        Raises:
            ServiceUnavailable: there is no room for it now.
            ValidationError: there never will be.
        """
        missing = {spec.id: spec.size for spec in job.mountspecs if not self._layers.path(spec.id).exists()}
        if never := room.impossible(job, self._memory):
            raise ValidationError("resources.memory", never)
        if why := room.refusal(job, scratch_bytes(job.resources), missing, self.look()):
            raise ServiceUnavailable(why)

    def status(self) -> DiskStatus:
        disk = self.look()
        return DiskStatus(
            path=disk.path,
            size_bytes=disk.total_bytes,
            free_bytes=disk.free_bytes,
            reserve_bytes=disk.reserve_bytes,
            trouble=disk.trouble,
        )

    async def watch(self, store: State) -> NoReturn:
        """Make room when there is little, for ever."""
        forget_at = 0.0
        while True:
            try:
                await self._look_after(store)
                if time.monotonic() > forget_at:
                    forget_at = time.monotonic() + FORGET_EVERY.total_seconds()
                    for app_id in self._logs.collect(self._apps(), time.time()):
                        log.info("log deleted, its app is gone", extra={"app": app_id})
            except Exception as error:  # The edge: a disk in trouble must not end the host that looks after it.
                log.error("disk", extra={"path": str(self._directory), "error": str(error)})
            await asyncio.sleep(LOOK_EVERY.total_seconds())

    async def _look_after(self, store: State) -> None:
        disk = self.look()
        if disk.low:
            if not self._was_low:
                log.error("disk is low", extra={"path": disk.path, "trouble": disk.trouble})
            self._was_low = True
            await self.make_room()
            return
        if self._was_low:
            log.info("disk has room again", extra={"path": disk.path, "free": room.mib(disk.free_bytes)})
        self._was_low = False
        await store.hold_room()
        await asyncio.to_thread(take_ballast, self._directory)

    async def make_room(self) -> None:
        """Delete what can be had again (layers no job uses), then what is old (rotated logs), until there is enough."""
        for candidates, what in ((self._layers.unused(self._in_use()), "layer"), (self._logs.old_files(), "log")):
            for file in candidates:
                if not self.look().low:
                    return
                if what == "layer" and file.stem in self._in_use():
                    continue  # a job has come meanwhile
                try:
                    size = file.stat().st_size
                    file.unlink()
                except FileNotFoundError:
                    continue
                log.warning("deleted to make room", extra={"kind": what, "path": str(file), "size": room.mib(size)})
                await asyncio.sleep(0)


def take_ballast(directory: Path) -> None:
    """Have the file of ballast, unless it would leave hardly anything else. Blocking."""
    ballast = directory / BALLAST
    found = os.statvfs(directory)
    size = min(BALLAST_BYTES, found.f_blocks * found.f_frsize // BALLAST_SHARE)
    if ballast.exists() or found.f_bavail * found.f_frsize < 4 * size:
        return
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        ballast.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def drop_ballast_if_full(directory: Path) -> bool:
    """Throw the ballast overboard when the disk has no room for a daemon to start. Tells whether it has. Blocking."""
    try:
        found = os.statvfs(directory)
    except FileNotFoundError:
        return False  # the first start
    if found.f_bavail * found.f_frsize >= BALLAST_BYTES or not (directory / BALLAST).exists():
        return False
    (directory / BALLAST).unlink(missing_ok=True)
    return True
