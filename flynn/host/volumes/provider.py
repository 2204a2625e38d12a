"""What a volume provider offers. Implementations: `zfs`, and `directory` for machines (and tests) without ZFS."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class VolumeError(Exception):
    """
    VolumeError            the file system refused; the text is its own
      VolumeBusy           someone still uses it
      VolumeGone           there is no such volume (any more)
      Unsupported          this provider cannot do that
      Unavailable          the storage cannot be used now: missing, full, or it does not answer
      BadStream            what was received is not a whole snapshot
    """


class VolumeBusy(VolumeError):
    pass


class VolumeGone(VolumeError):
    pass


class Unsupported(VolumeError):
    pass


class Unavailable(VolumeError):
    pass


class BadStream(VolumeError):
    pass


@dataclass(frozen=True, slots=True)
class Condition:
    """How a provider's storage is. `trouble` is empty while all is well."""

    size_bytes: int
    free_bytes: int
    trouble: str = ""


class VolumeProvider(Protocol):
    """One kind of storage. A `place` is the provider's own name for a volume; the host keeps it with the volume."""

    kind: str

    async def open(self, *, create: bool) -> None:
        """Find the storage, after a crash as well; `create` allows to make it where there is none. Idempotent.

        Raises:
            VolumeError: it is missing, or cannot be used. What is there is never overwritten.
        """

    async def close(self) -> None:
        """Let go of it without harming running jobs."""

    async def check(self) -> Condition:
        """Look at open storage, within seconds. Raises `VolumeError` when it does not answer or is gone."""

    async def collect(self, volumes: Mapping[str, str]) -> list[str]:
        """Remove what aborted snapshots and transfers of these volumes (place by id) have left; return its names.

        Nothing is touched that does not descend from a volume named here.
        """

    async def create(self, volume_id: str, *, quota_bytes: int | None = None) -> str:
        """Make an empty volume; one of that name left by a crash is adopted. Returns its place."""

    async def mount(self, place: str) -> Path:
        """Return the directory of a volume, mounting it if need be. Raises `VolumeGone`."""

    async def snapshot(self, place: str, snapshot_id: str) -> str:
        """Freeze the present content as a read-only volume of its own. Returns its place."""

    async def clone(self, place: str, volume_id: str, *, quota_bytes: int | None = None) -> str:
        """Make a writable volume that begins as the snapshot at `place`. Returns its place."""

    async def destroy(self, place: str) -> None:
        """Remove a volume and its data; one that is gone already is fine. Raises `VolumeBusy`."""

    def send(self, place: str, base: str | None) -> AsyncGenerator[bytes, None]:
        """Stream a snapshot, as the difference to the snapshot at `base` if given."""

    async def receive(self, place: str, snapshot_id: str, stream: AsyncIterator[bytes]) -> tuple[str, str]:
        """Apply a stream to the volume at `place`, overwriting local changes.

        A stream that breaks off changes nothing. Returns the places of the volume (it may have moved) and of the
        snapshot. Raises `BadStream` for one that is cut short or of another kind.
        """
