"""Write layers of limited size: sparse ext4 files mounted by loop, some of them ready before they are asked for.

A size is formatted once; after that an empty file system of it is a handful of blocks, written to where they belong.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import subprocess
import uuid
from collections import defaultdict, deque
from collections.abc import Collection
from pathlib import Path

from flynn.host import steps
from flynn.host.runtime import loop

DEFAULT_BYTES = 100 << 20
_MINIMUM_BYTES = 8 << 20  # below, ext4 has hardly room for itself
_BLANK_BYTES = 4 << 20  # 50 KiB are usual for 100 MiB; much more is not what we think it is
_SIZES_KEPT = 4  # so many sizes wanted lately are kept ready
#: No journal and no reserved blocks: the content is thrown away with the job, a crash of the machine included.
_FORMAT = ("mkfs.ext4", "-q", "-F", "-m0", "-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard")


Blank = tuple[tuple[int, bytes], ...]
"""An empty file system: offsets, and what is there. The rest of the file is a hole."""


class ScratchError(Exception):
    """No write layer could be made: disk full, no mkfs.ext4, no loop device."""


class ScratchPool:
    """Scratch file systems below `directory`. Making one takes some milliseconds, so `ready` of each size wanted lately
    (and of the default size) wait mounted; refilling happens in the background.

        async with ScratchPool(directory) as pool:
            writable = await pool.take(size_bytes)    # for RootFS.writable
            await pool.release(writable)              # after the container was destroyed

    After a restart: `adopt` for every container taken over, then `collect`.
    """

    def __init__(self, directory: Path, *, ready: int = 2) -> None:
        self._directory = directory.resolve()
        self._wanted = ready
        self._ready: defaultdict[int, deque[Path]] = defaultdict(deque)
        self._sizes: deque[int] = deque([DEFAULT_BYTES], maxlen=_SIZES_KEPT)  # most recently wanted first
        self._used: set[Path] = set()
        self._making: set[Path] = set()
        self._blanks: dict[int, Blank] = {}  # of the sizes wanted lately
        self._short = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None

    async def take(self, size_bytes: int = DEFAULT_BYTES) -> Path:
        """Return an empty mounted directory that holds at most about `size_bytes`.

        Raises ScratchError.
        """
        size = max(size_bytes, _MINIMUM_BYTES)
        if size != self._sizes[0]:
            with contextlib.suppress(ValueError):
                self._sizes.remove(size)
            self._sizes.appendleft(size)
        path = self._ready[size].popleft() if self._ready[size] else await self._make(size)
        self._used.add(path)
        self._short.set()
        steps.reach("scratch-taken")
        return path

    async def release(self, path: Path) -> None:
        """Unmount and delete. Idempotent; also for paths of an earlier daemon."""
        if path.parent.parent == self._directory:
            await asyncio.to_thread(_remove, path)
        self._used.discard(path)

    def adopt(self, path: Path) -> None:
        """Keep this one: a container of an earlier daemon writes to it (`spec.rootfs.writable`)."""
        self._used.add(path)

    async def collect(self) -> None:
        """Delete all that nobody took or adopted."""
        keep = self._used | self._making | {path for paths in self._ready.values() for path in paths}
        # Listed here, not in the thread: what is made from now on must not be taken for a leftover.
        found = list(self._directory.iterdir()) if self._directory.exists() else []
        await asyncio.to_thread(_remove_leftovers, set(found) - {path.parent for path in keep})

    async def __aenter__(self) -> ScratchPool:
        self._tasks = await asyncio.TaskGroup().__aenter__()
        self._refiller = self._tasks.create_task(self._refill(), name="refill scratch pool")
        self._short.set()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop refilling and delete what is ready but unused; what is in use stays mounted."""
        assert self._tasks is not None
        self._refiller.cancel()
        await self._tasks.__aexit__(None, None, None)
        for paths in self._ready.values():
            while paths:
                await asyncio.to_thread(_remove, paths.pop())

    async def _refill(self) -> None:
        while True:
            await self._short.wait()
            self._short.clear()
            for size in list(self._sizes):
                while len(self._ready[size]) < self._wanted:
                    try:
                        self._ready[size].append(await self._make(size))
                    except ScratchError:  # whoever takes next gets the error itself; try again when someone does
                        break
            for size in set(self._blanks) - set(self._sizes):
                self._blanks.pop(size, None)
            for size in set(self._ready) - set(self._sizes):
                for path in self._ready.pop(size):
                    await asyncio.to_thread(_remove, path)

    async def _make(self, size: int) -> Path:
        path = self._directory / uuid.uuid4().hex[:16] / "fs"
        self._making.add(path)
        work = asyncio.get_running_loop().run_in_executor(None, _make, path, size, self._blanks)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])  # a thread cannot be stopped; what it makes must not stay behind
            await asyncio.to_thread(_remove, path)
            raise
        except (OSError, subprocess.CalledProcessError) as error:
            await asyncio.to_thread(_remove, path)
            raise ScratchError(f"cannot make a write layer of {size} bytes: {error}") from error
        finally:
            self._making.discard(path)
        return path


def _make(path: Path, size: int, blanks: dict[int, Blank]) -> None:
    path.mkdir(parents=True)
    image = path.parent / "image"
    fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.truncate(fd, size)
        blank = blanks.get(size)
        if blank is not None:
            for offset, content in blank:
                if os.pwrite(fd, content, offset) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(image))
        else:
            subprocess.run([*_FORMAT, str(image)], check=True, stdout=subprocess.DEVNULL, timeout=60)
            formatted = _content(fd, size)
            if formatted is not None:
                blanks[size] = formatted
    finally:
        os.close(fd)
    steps.reach("scratch-formatted")
    loop.mount_image(image, path, "ext4", read_only=False)
    (path / "lost+found").rmdir()


def _content(fd: int, size: int) -> Blank | None:
    """Read what a sparse file holds; None where a file system does not know holes, or if it is too much to keep."""
    found: list[tuple[int, bytes]] = []
    position = total = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole behind
                break
            return None
        position = os.lseek(fd, start, os.SEEK_HOLE)
        total += position - start
        if total > _BLANK_BYTES:
            return None
        found.append((start, os.pread(fd, position - start, start)))
    return tuple(found)


def _remove(path: Path) -> None:
    loop.unmount(path)
    steps.reach("scratch-unmounted")
    shutil.rmtree(path.parent, ignore_errors=True)


def _remove_leftovers(entries: Collection[Path]) -> None:
    for entry in entries:
        loop.unmount(entry / "fs")
        if not os.path.ismount(entry / "fs"):
            shutil.rmtree(entry, ignore_errors=True)
