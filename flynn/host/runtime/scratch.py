"""Write layers of limited size: sparse ext4 files mounted by loop, some of them ready before they are asked for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

DEFAULT_BYTES = 100 << 20


class ScratchPool:
    """Scratch file systems below `directory`. Formatting and mounting cost about 25 ms, so `ready` of each size wanted
    lately (and of the default size) wait mounted; refilling happens in the background.

        async with ScratchPool(directory) as pool:
            writable = await pool.take(size_bytes)    # for RootFS.writable
            await pool.release(writable)              # after the container was destroyed

    After a restart: `adopt` for every container taken over, then `collect`.
    """

    def __init__(self, directory: Path, *, ready: int = 2) -> None:
        raise NotImplementedError

    async def take(self, size_bytes: int = DEFAULT_BYTES) -> Path:
        """Return an empty mounted directory that holds at most about `size_bytes`."""
        raise NotImplementedError

    async def release(self, path: Path) -> None:
        """Unmount and delete. Idempotent; also for paths of an earlier daemon."""
        raise NotImplementedError

    def adopt(self, path: Path) -> None:
        """Keep this one: a container of an earlier daemon writes to it (`spec.rootfs.writable`)."""
        raise NotImplementedError

    async def collect(self) -> None:
        """Delete all that nobody took or adopted."""
        raise NotImplementedError

    async def __aenter__(self) -> ScratchPool:
        raise NotImplementedError

    async def __aexit__(self, *_: object) -> None:
        """Stop refilling and delete what is ready but unused; what is in use stays mounted."""
        raise NotImplementedError


def used(paths: Collection[str | None]) -> list[Path]:
    """The scratch directories among `spec.rootfs.writable` values."""
    return [Path(path) for path in paths if path]
