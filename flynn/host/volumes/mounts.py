"""What is mounted, from the text of a mountinfo file: a question that no file system has to answer. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FUSE_ZFS = "fuse.zfs"


@dataclass(frozen=True, slots=True)
class Mounted:
    """One mount. `device` is the file system's number, `0:52`: two mounts of it have the same."""

    device: str
    place: str
    kind: str


def parse(mountinfo: str) -> list[Mounted]:
    """Read a mountinfo file, the oldest mount first."""
    found = []
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if separator and len(fields) >= 5:
            place = fields[4].encode("latin-1", "replace").decode("unicode_escape")  # spaces are written as \040
            found.append(Mounted(fields[2], place, after.split(" ", 1)[0]))
    return found


def at(place: str, mounts: Iterable[Mounted]) -> Mounted | None:
    """Return what is mounted at a place: the last one that was put there."""
    return next((mount for mount in reversed(list(mounts)) if mount.place == place), None)


def orphaned(inside: Iterable[Mounted], outside: Iterable[Mounted]) -> list[Mounted]:
    """Return the mounts inside a container whose zfs-fuse has died: nobody outside has that file system any more."""
    alive = {mount.device for mount in outside if mount.kind == FUSE_ZFS}
    return [mount for mount in inside if mount.kind == FUSE_ZFS and mount.device not in alive]
