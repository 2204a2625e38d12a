"""Waiting for raw non-blocking descriptors (pipes, ptys) without threads, one read or write at a time.

One at a time is what gives backpressure: nothing is read before the last chunk was passed on.
"""

from __future__ import annotations

import asyncio
import os

CHUNK_BYTES = 64 << 10


class Duplicate:
    """A descriptor of our own for what a container's descriptor is open on: valid however long the container lasts."""

    def __init__(self, descriptor: int) -> None:
        self.number = os.dup(descriptor)

    def close(self) -> None:
        """Idempotent."""
        if self.number >= 0:
            os.close(self.number)
            self.number = -1

    def __enter__(self) -> int:
        return self.number

    def __exit__(self, *exc: object) -> None:
        self.close()


async def read(descriptor: int) -> bytes:
    """Return what there is as soon as there is something, b"" at the end (for a pty: when its last user is gone)."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return os.read(descriptor, CHUNK_BYTES)
        except BlockingIOError:
            pass
        except OSError:
            return b""  # EIO is how a pty says that it has been hung up; EBADF: the container was destroyed
        ready = loop.create_future()
        loop.add_reader(descriptor, _wake, ready)
        try:
            await ready
        finally:
            loop.remove_reader(descriptor)


async def write(descriptor: int, data: bytes) -> bool:
    """Write all of it; False when nobody reads any more."""
    loop = asyncio.get_running_loop()
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
            continue
        except BlockingIOError:
            pass
        except OSError:
            return False
        ready = loop.create_future()
        loop.add_writer(descriptor, _wake, ready)
        try:
            await ready
        finally:
            loop.remove_writer(descriptor)
    return True


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class Drain:
    """Reads descriptors and forgets what it read, so that a job nobody listens to does not block on a full pipe."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def add(self, descriptor: int) -> None:
        self._open.add(descriptor)
        asyncio.get_running_loop().add_reader(descriptor, self._readable, descriptor)

    def _readable(self, descriptor: int) -> None:
        try:
            if os.read(descriptor, CHUNK_BYTES):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self.remove(descriptor)

    def remove(self, descriptor: int) -> None:
        if descriptor in self._open:
            self._open.discard(descriptor)
            asyncio.get_running_loop().remove_reader(descriptor)

    def close(self) -> None:
        for descriptor in list(self._open):
            self.remove(descriptor)
