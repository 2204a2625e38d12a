"""What a volume provider offers. Implementations: `zfs`, and `directory` for machines (and tests) without ZFS."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol


class VolumeError(Exception):
    """
    VolumeError            the file system refused; the text is its own
      VolumeBusy           someone still uses it
      VolumeGone           there is no such volume (any more)
      Unsupported          this provider cannot do that
    """


class VolumeBusy(VolumeError):
    pass


class VolumeGone(VolumeError):
    pass


class Unsupported(VolumeError):
    pass


class VolumeProvider(Protocol):
    """One kind of storage. A `place` is the provider's own name for a volume; the host keeps it with the volume."""

    kind: str

    async def open(self) -> None:
        """Find or make the storage, after a crash as well. Idempotent. Raises `VolumeError`."""

    async def close(self) -> None:
        """Let go of it without harming running jobs."""

    async def create(self, volume_id: str, *, quota_bytes: int | None = None) -> str:
        """Make an empty volume; one of that name left by a crash is adopted. Returns its place."""

    async def mount(self, place: str) -> Path:
        """Return the directory of a volume, mounting it if need be. Raises `VolumeGone`."""

    async def snapshot(self, place: str, snapshot_id: str) -> str:
        """Freeze the present content as a read-only volume of its own. Returns its place."""

    async def destroy(self, place: str) -> None:
        """Remove a volume and its data; one that is gone already is fine. Raises `VolumeBusy`."""

    def send(self, place: str, base: str | None) -> AsyncIterator[bytes]:
        """Stream a snapshot, as the difference to the snapshot at `base` if given."""

    async def receive(self, place: str, snapshot_id: str, stream: AsyncIterator[bytes]) -> str:
        """Apply a stream to the volume at `place`, overwriting local changes. Returns the new snapshot's place."""
