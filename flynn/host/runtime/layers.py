"""Squashfs layers: each mounted once per host, shared by all containers that use it, unmounted when none does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path


class LayerError(Exception):
    """A layer that cannot be mounted or is not what its hashes say."""


class LayerMounts:
    """Mounts below `<directory>/mnt/<layer id>`. Who uses what is kept in memory; what is mounted, the kernel knows.

    After a restart: `adopt` for every container taken over, then `collect`.
    """

    def __init__(self, directory: Path) -> None:
        raise NotImplementedError

    async def acquire(self, layer: str, image: Path, user: str) -> Path:
        """Mount `image` (a squashfs file) read-only unless it is already; return the directory for RootFS.lower.

        `user` is the job id. Safe to call concurrently and repeatedly.
        """
        raise NotImplementedError

    async def release(self, user: str) -> None:
        """Drop all uses of one user; layers without any other are unmounted. Idempotent."""
        raise NotImplementedError

    def adopt(self, user: str, lower: Collection[str]) -> None:
        """Count the layers of a container of an earlier daemon: pass `spec.rootfs.lower`."""
        raise NotImplementedError

    async def collect(self) -> list[str]:
        """Unmount all layers nobody uses (leftovers of an earlier daemon); return their ids."""
        raise NotImplementedError


def verify(path: Path, hashes: Mapping[str, str], length: int) -> None:
    """Read the file once and compare length and every known hash (sha256, sha512, sha512_256). Blocking: use a thread.

    Raises LayerError, also when no known hash is given.
    """
    raise NotImplementedError
