"""The zfs-fuse daemon: one per machine, shared by all nodes on it, started by whoever finds it missing.

Its mounts appear in its own mount namespace, which must be the one the flynn-host daemons are in. When it dies, its
mounts stay behind and answer "transport endpoint is not connected" until they are unmounted.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from flynn.host.volumes.commands import NoDaemon, run
from flynn.host.volumes.provider import VolumeError

log = logging.getLogger(__name__)

DAEMON = "/usr/sbin/zfs-fuse"
LOCK = Path("/run/flynn-zfs-fuse.lock")
OUTPUT = Path("/var/log/zfs-fuse.log")
DIRECTORIES = ("/run/zfs", "/run/lock/zfs", "/var/lib/zfs")  # where it keeps socket, lock and pool cache; some on tmpfs
CACHE_MEGABYTES = 64  # of the ARC; the kernel's page cache holds the data a second time anyway
START_SECONDS = 15.0


def needed() -> bool:
    """Tell whether ZFS means zfs-fuse here: no kernel module, but the daemon is installed."""
    return not Path("/dev/zfs").exists() and Path(DAEMON).exists()


async def ensure_daemon() -> None:
    """Return once zfs-fuse answers. Raises `VolumeError` when it does not come up."""
    if await _answers():
        return
    async with _machine_wide(LOCK):
        if await _answers():
            return
        await asyncio.to_thread(unmount_dead)
        deadline = asyncio.get_running_loop().time() + START_SECONDS
        while asyncio.get_running_loop().time() < deadline:
            process = await asyncio.to_thread(_start)
            log.info("zfs-fuse started", extra={"pid": process.pid})
            while process.poll() is None and asyncio.get_running_loop().time() < deadline:
                if await _answers():
                    return
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.3)  # one that was just killed may still hold the devices
    raise VolumeError(f"zfs-fuse does not start; see {OUTPUT}")


async def _answers() -> bool:
    try:
        await run("zpool", "list", "-H", "-o", "name", seconds=10)
    except NoDaemon:
        return False
    return True


def _start() -> subprocess.Popen[bytes]:
    """Start the daemon in a session of its own: it must outlive us, as must the file systems jobs write to.

    In the foreground (`-n`), because daemonising hides why it fails; without /zfs-kstat, which nobody reads.
    """
    for directory in DIRECTORIES:
        Path(directory).mkdir(parents=True, exist_ok=True)
    argv = [DAEMON, "-n", "--no-kstat-mount", "--max-arc-size", str(CACHE_MEGABYTES), "--zfs-prefetch-disable"]
    with OUTPUT.open("ab") as output:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd="/"
        )
    try:
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("-900")  # everybody's data is behind it
    except OSError:
        pass
    return process


def unmount_dead() -> None:
    """Detach the mounts of a zfs-fuse that has died."""
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        fields = line.split()
        place, kind = fields[4], fields[fields.index("-") + 1]
        if kind == "fuse.zfs" or place == "/zfs-kstat":
            place = place.encode().decode("unicode_escape")
            if is_dead(place):
                subprocess.run(["umount", "-l", place], check=False, capture_output=True)
                log.info("unmounted after the death of zfs-fuse", extra={"path": place})


def is_dead(place: str) -> bool:
    """Tell whether a mount's server is gone."""
    try:
        os.stat(place)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


@asynccontextmanager
async def _machine_wide(path: Path) -> AsyncIterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await asyncio.to_thread(fcntl.flock, descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
