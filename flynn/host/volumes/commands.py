"""Running zfs and zpool: off the event loop, with a time limit, errors as exceptions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from flynn.host.volumes.provider import VolumeBusy, VolumeError, VolumeGone

COMMAND_SECONDS = 60.0


class NoDaemon(VolumeError):
    """zfs-fuse is installed but does not run."""


async def run(*argv: str, stdin: int = asyncio.subprocess.DEVNULL, seconds: float = COMMAND_SECONDS) -> str:
    """Run a command and return its standard output.

    Raises:
        VolumeError, VolumeBusy, VolumeGone, NoDaemon: by what it said on standard error.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except FileNotFoundError as error:
        raise VolumeError(f"{argv[0]} is not installed") from error
    try:
        async with asyncio.timeout(seconds):
            output, errors = await process.communicate()
    except TimeoutError as error:
        process.kill()
        await process.wait()
        raise VolumeError(f"{' '.join(argv[:3])} took more than {seconds:.0f} s") from error
    except asyncio.CancelledError:
        process.kill()
        raise
    if process.returncode == 0:
        return output.decode(errors="replace")
    raise failure(argv, errors.decode(errors="replace").strip())


def failure(argv: Sequence[str], text: str) -> VolumeError:
    """Return the error for what zfs or zpool said. They have one exit status for everything, so the text decides."""
    message = f"{' '.join(argv[:2])}: {text.splitlines()[0] if text else 'failed'}"
    if "make sure that the zfs-fuse daemon is running" in text:
        return NoDaemon(message)
    if "does not exist" in text or "no such pool" in text:
        return VolumeGone(message)
    if "busy" in text or "has dependent clones" in text:
        return VolumeBusy(message)
    return VolumeError(message)
