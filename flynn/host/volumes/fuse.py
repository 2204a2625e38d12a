"""The zfs-fuse daemon: one per machine, shared by all nodes on it, started by whoever finds it missing.

Its mounts appear in its own mount namespace, which must be the one the flynn-host daemons are in. When it dies, its
mounts stay behind and answer "transport endpoint is not connected" until they are unmounted. When it hangs, everything
that touches its mounts hangs with it, so that killing it is the only way out; what was synced is on the disk.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from flynn.host.volumes import mounts
from flynn.host.volumes.commands import NoAnswer, NoDaemon, run
from flynn.host.volumes.patience import PatientThreads
from flynn.host.volumes.provider import Unavailable

log = logging.getLogger(__name__)

DAEMON = "/usr/sbin/zfs-fuse"
LOCK = Path("/run/flynn-zfs-fuse.lock")
OUTPUT = Path("/var/log/zfs-fuse.log")
DIRECTORIES = ("/run/zfs", "/run/lock/zfs", "/var/lib/zfs")  # where it keeps socket, lock and pool cache; some on tmpfs
CACHE_MEGABYTES = 64  # of the ARC; the kernel's page cache holds the data a second time anyway
START_SECONDS = 15.0
ANSWER_SECONDS = 10.0
LOCK_SECONDS = 45.0
DEATH_SECONDS = 5.0
HUNG_AFTER = 60.0  # seconds of silence without work
WAITS_AFTER = 300.0  # seconds of silence while it waits for the disk: that may be a slow disk
IDLE_SHARE = 0.01  # of one CPU; a daemon that uses less while it owes an answer does not work on it
CONNECTIONS = Path("/sys/fs/fuse/connections")


@dataclass(frozen=True, slots=True)
class Vitals:
    """How a zfs-fuse process was at one moment."""

    pid: int
    at: float  # seconds, of the monotonic clock
    cpu_seconds: float
    waits_for_disk: bool


def is_hung(first: Vitals, now: Vitals) -> bool:
    """Tell whether a daemon that has not answered since `first` never will.

    A busy one is left alone however long it takes: killing it would only make it begin again.
    """
    if first.pid != now.pid:
        return False
    silent = now.at - first.at
    if silent < (WAITS_AFTER if now.waits_for_disk else HUNG_AFTER):
        return False
    return now.cpu_seconds - first.cpu_seconds < silent * IDLE_SHARE


def needed() -> bool:
    """Tell whether ZFS means zfs-fuse here: no kernel module, but the daemon is installed."""
    return not Path("/dev/zfs").exists() and Path(DAEMON).exists()


async def ensure_daemon(threads: PatientThreads) -> None:
    """Return once zfs-fuse answers. Raises `Unavailable` when it does not come up, `NoAnswer` when it hangs."""
    if await answers():
        return
    async with _machine_wide(LOCK):
        if await answers():
            return
        await threads.run(unmount_dead)
        deadline = asyncio.get_running_loop().time() + START_SECONDS
        while asyncio.get_running_loop().time() < deadline:
            process = await asyncio.to_thread(_start)
            log.info("zfs-fuse started", extra={"pid": process.pid})
            while process.poll() is None and asyncio.get_running_loop().time() < deadline:
                if await answers():
                    return
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.3)  # one that was just killed may still hold the devices
    raise Unavailable(f"zfs-fuse does not start; see {OUTPUT}")


async def answers() -> bool:
    """Tell whether the daemon runs. Raises `NoAnswer` when it does, and says nothing."""
    try:
        await run("zpool", "list", "-H", "-o", "name", seconds=ANSWER_SECONDS)
    except NoDaemon:
        return False
    return True


def vitals() -> Vitals | None:
    """Look at the zfs-fuse of this mount namespace; None when there is none."""
    own = os.readlink("/proc/self/ns/mnt")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "comm").read_text() != "zfs-fuse\n" or os.readlink(process / "ns/mnt") != own:
                continue
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if fields[0] in "ZX":
                continue
            cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in process.glob("task/*")]
            return Vitals(int(process.name), time.monotonic(), cpu, "D" in states)
        except (OSError, IndexError, ValueError):
            continue  # it ended this moment
    return None


async def kill(hung: Vitals) -> None:
    """End a daemon that hangs, and with it all that waits for it."""
    async with _machine_wide(LOCK):
        now = await asyncio.to_thread(vitals)
        if now is None or now.pid != hung.pid:
            return  # somebody else was quicker
        log.error("zfs-fuse hangs, killing it", extra={"pid": hung.pid, "idle_seconds": round(now.at - hung.at)})
        try:
            os.kill(hung.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        for attempt in (1, 2):
            deadline = asyncio.get_running_loop().time() + DEATH_SECONDS
            while asyncio.get_running_loop().time() < deadline:
                now = await asyncio.to_thread(vitals)
                if now is None or now.pid != hung.pid:
                    return
                await asyncio.sleep(0.1)
            if attempt == 1:
                await asyncio.to_thread(_abort_connections)  # it may be waiting for a file system of its own
    raise Unavailable("zfs-fuse hangs and cannot be killed")


def _abort_connections() -> None:
    for mount in mounts.parse(Path("/proc/self/mountinfo").read_text()):
        if mount.kind == mounts.FUSE_ZFS:
            try:
                (CONNECTIONS / mount.device.partition(":")[2] / "abort").write_text("1")
            except OSError:
                pass  # fusectl is not mounted, or the connection has ended


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
    """Detach the mounts of a zfs-fuse that has died. Blocks for as long as a living one hangs."""
    for mount in reversed(mounts.parse(Path("/proc/self/mountinfo").read_text())):
        if (mount.kind == mounts.FUSE_ZFS or mount.place == "/zfs-kstat") and is_dead(mount.place):
            subprocess.run(["umount", "-l", mount.place], check=False, capture_output=True, timeout=ANSWER_SECONDS)
            log.info("unmounted after the death of zfs-fuse", extra={"path": mount.place})


def is_dead(place: str) -> bool:
    """Tell whether a mount's server is gone. Blocks for as long as a living one hangs."""
    try:
        os.statvfs(place)  # not `stat`: the kernel remembers attributes of the dead
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


@asynccontextmanager
async def _machine_wide(path: Path) -> AsyncIterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = asyncio.get_running_loop().time() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise NoAnswer("another flynn-host is busy with zfs-fuse") from error
                await asyncio.sleep(0.05)
        yield
    finally:
        os.close(descriptor)
