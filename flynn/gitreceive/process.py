"""One git child that speaks the stateless protocol: the request's body in, its answer out, both at the same time.

The child leads a process group of its own, with the hook and the receiver in it. When the client goes away the group is
told to end, which is how Ctrl-C cancels a build.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from flynn.gitreceive.matching import Service

log = logging.getLogger(__name__)

READ_BYTES = 64 << 10
END_SECONDS = 15.0  # the receiver stops its build job in that time; then the group is killed


def arguments(service: Service, repository: Path, *, advertise: bool = False) -> list[str]:
    """Return the command line of git's side of a service. Pure."""
    flags = ["--stateless-rpc"] + (["--advertise-refs"] if advertise else [])
    return ["git", service.removeprefix("git-"), *flags, str(repository)]


class GitFailed(Exception):
    """Git ended with a status other than 0."""


async def exchange(argv: list[str], body: AsyncIterator[bytes], environment: Mapping[str, str]) -> AsyncIterator[bytes]:
    """Yield what git answers to `body`. Leaving the iteration early ends the process group.

    Raises:
        GitFailed: after everything git said.
        ConnectionError: the client broke off in the middle of the body.
    """
    child = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
        start_new_session=True,
        limit=READ_BYTES,
    )
    assert child.stdout is not None
    feeding = asyncio.ensure_future(_feed(child, body))
    try:
        while chunk := await child.stdout.read(READ_BYTES):
            yield chunk
        await feeding
        if await child.wait():
            raise GitFailed(f"{' '.join(argv)} ended with status {child.returncode}")
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        await _end(child)


async def _feed(child: asyncio.subprocess.Process, body: AsyncIterator[bytes]) -> None:
    assert child.stdin is not None
    try:
        async for chunk in body:
            child.stdin.write(chunk)
            try:
                await child.stdin.drain()
            except (BrokenPipeError, ConnectionResetError):
                return  # git has heard enough; what it says about that comes out of its other end
    except ConnectionError:
        _signal_group(child, signal.SIGTERM)
        raise
    finally:
        child.stdin.close()


async def _end(child: asyncio.subprocess.Process) -> None:
    """See to it that nothing of the process group is left."""
    if child.returncode is None:
        _signal_group(child, signal.SIGTERM)
        try:
            async with asyncio.timeout(END_SECONDS):
                await child.wait()
        except TimeoutError:
            log.warning("git did not end in time", extra={"pid": child.pid})
    # The leader may be gone while the hook's children are not.
    for _ in range(int(END_SECONDS * 10)):
        if not _group_exists(child):
            return
        await asyncio.sleep(0.1)
    _signal_group(child, signal.SIGKILL)
    await child.wait()


def _signal_group(child: asyncio.subprocess.Process, number: signal.Signals) -> None:
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        pass


def _group_exists(child: asyncio.subprocess.Process) -> bool:
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    return True
