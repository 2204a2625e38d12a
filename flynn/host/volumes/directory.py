"""Volumes as plain directories: for machines without ZFS. No quotas, snapshots are copies, nothing can be sent."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from flynn.host.volumes.provider import Unsupported, VolumeGone


class DirectoryProvider:
    """A directory per volume below `directory`."""

    kind = "directory"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def open(self) -> None:
        await asyncio.to_thread(self._directory.mkdir, mode=0o700, parents=True, exist_ok=True)

    async def close(self) -> None:
        """Nothing is open."""

    async def create(self, volume_id: str, *, quota_bytes: int | None = None) -> str:
        await asyncio.to_thread((self._directory / volume_id).mkdir, exist_ok=True)
        return volume_id

    async def mount(self, place: str) -> Path:
        path = self._directory / place
        if not await asyncio.to_thread(path.is_dir):
            raise VolumeGone(f"{path} is gone")
        return path

    async def snapshot(self, place: str, snapshot_id: str) -> str:
        await asyncio.to_thread(
            shutil.copytree, self._directory / place, self._directory / snapshot_id, symlinks=True, dirs_exist_ok=True
        )
        return snapshot_id

    async def destroy(self, place: str) -> None:
        await asyncio.to_thread(shutil.rmtree, self._directory / place, ignore_errors=True)

    async def send(self, place: str, base: str | None) -> AsyncIterator[bytes]:
        raise Unsupported("volumes of the provider directory cannot be sent")
        yield b""

    async def receive(self, place: str, snapshot_id: str, stream: AsyncIterator[bytes]) -> str:
        raise Unsupported("volumes of the provider directory cannot be received")
