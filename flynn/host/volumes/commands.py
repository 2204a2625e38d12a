"""Running zfs and zpool: off the event loop, with a time limit, errors as exceptions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from flynn.host.volumes.provider import BadStream, Unavailable, VolumeBusy, VolumeError, VolumeGone

COMMAND_SECONDS = 60.0
REAP_SECONDS = 2.0  # a process that waits for the kernel dies only when that answers


class NoDaemon(Unavailable):
    """zfs-fuse is installed but does not run."""


class NoAnswer(Unavailable):
    """The command was given up: zfs-fuse, or the kernel, did not answer in time."""


async def run(*argv: str, stdin: int = asyncio.subprocess.DEVNULL, seconds: float = COMMAND_SECONDS) -> str:
    """Run a command and return its standard output.

    Raises:
        VolumeError, VolumeBusy, VolumeGone, NoDaemon, BadStream: by what it said on standard error.
        NoAnswer: it took longer than `seconds`.
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
        await end(process)
        raise NoAnswer(f"{' '.join(argv[:3])} took more than {seconds:.0f} s") from error
    except asyncio.CancelledError:
        if process.returncode is None:
            process.kill()
        raise
    if process.returncode == 0:
        return output.decode(errors="replace")
    raise failure(argv, errors.decode(errors="replace").strip())


async def end(process: asyncio.subprocess.Process) -> None:
    """Kill a process; one that the kernel does not let go is left to die later."""
    if process.returncode is not None:
        return
    try:
        process.kill()
        async with asyncio.timeout(REAP_SECONDS):
            await process.wait()
    except (TimeoutError, ProcessLookupError):
        pass


def failure(argv: Sequence[str], text: str) -> VolumeError:
    """Return the error for what zfs or zpool said. They have one exit status for everything, so the text decides."""
    message = f"{' '.join(argv[:2])}: {text.splitlines()[0] if text else 'failed'}"
    if "make sure that the zfs-fuse daemon is running" in text:
        return NoDaemon(message)
    if "invalid stream" in text or "incomplete stream" in text or "invalid backup stream" in text:
        return BadStream(message)
    if "does not exist" in text or "no such pool" in text:
        return VolumeGone(message)
    if "busy" in text or "has dependent clones" in text:
        return VolumeBusy(message)
    if "out of space" in text or "No space left" in text:
        return Unavailable(f"{message}: the pool is full")
    return VolumeError(message)
