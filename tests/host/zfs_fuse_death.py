"""Run by `unshare --mount`: a machine of its own as far as zfs-fuse can see, whose zfs-fuse dies or stands still.

Prints the content of a file that was synced before the death and read after it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from flynn.host.volumes import fuse, zfs
from flynn.host.volumes.provider import Unavailable
from flynn.host.volumes.zfs import ZfsProvider

POOL = f"fhtdeath{os.getpid()}"


def daemon() -> int:
    """The zfs-fuse of this mount namespace."""
    own = Path("/proc/self/ns/mnt").readlink()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "comm").read_text() == "zfs-fuse\n" and (process / "ns/mnt").readlink() == own:
                return int(process.name)
        except OSError:
            continue
    raise RuntimeError("there is no zfs-fuse")


def hide_the_real_one() -> None:
    for place in ("/run/zfs", "/var/lib/zfs", "/var/lock/zfs"):
        Path(place).mkdir(parents=True, exist_ok=True)
        subprocess.check_call(["mount", "-t", "tmpfs", "zfs", place])


async def main(directory: Path, how: str) -> None:
    fuse.LOCK, fuse.OUTPUT = directory / "lock", directory / "output"
    fuse.ANSWER_SECONDS, fuse.HUNG_AFTER = 2.0, 5.0
    provider = ZfsProvider(POOL, directory)
    try:
        await provider.open(create=True)
        place = await provider.create("v1")
        path = await provider.mount(place)
        file = os.open(path / "file", os.O_WRONLY | os.O_CREAT)
        os.write(file, b"kept")
        os.fsync(file)
        if how == "killed":
            os.kill(daemon(), signal.SIGKILL)
            await asyncio.sleep(0.3)
            assert fuse.is_dead(str(path))
        else:
            os.close(file)  # or closing it in a child would wait for the daemon
            os.kill(daemon(), signal.SIGSTOP)
            refused = 0
            while True:  # as the host looks after its storage
                try:
                    await provider.check()
                    break
                except Unavailable:
                    refused += 1
                    assert refused < 10
                    await provider_opened(provider)
            assert refused, "it was killed before its time"
        print((await provider.mount(place) / "file").read_text())
    finally:
        await zfs.destroy_pool(POOL)
        os.kill(daemon(), signal.SIGTERM)


async def provider_opened(provider: ZfsProvider) -> None:
    try:
        await provider.open(create=False)
    except Unavailable:
        pass  # it still hangs


if __name__ == "__main__":
    hide_the_real_one()
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
