"""Named sets of devices and rights: `zfs`, `kvm`, `loop`. spec/host.md section 10."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flynn.host.runtime import loop
from flynn.host.runtime.spec import Device, Mount


class ProfileError(Exception):
    """The profile is unknown, or this machine cannot offer it."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What profiles add to a container."""

    devices: tuple[Device, ...] = ()
    mounts: tuple[Mount, ...] = ()
    capabilities: tuple[str, ...] = ()

    def __add__(self, other: Extras) -> Extras:
        return Extras(self.devices + other.devices, self.mounts + other.mounts, self.capabilities + other.capabilities)


def extras(
    profiles: Sequence[str], devices: Path = Path("/dev"), loop_device: Callable[[], int] = loop.give_away
) -> Extras:
    """Return what the profiles add. Raises `ProfileError`.

    `loop_device` makes one for the job and returns its minor number: it is the job's until `loop.take_back`.
    """
    total = Extras()
    for name in profiles:
        match name:
            case "zfs":
                zvol = Mount(target="/dev/zvol", source=str(devices / "zvol"), writable=True)
                blocks = Device(type="b", major=230, minor=-1)
                mounts = (zvol,) if (devices / "zvol").exists() else ()  # before the first zvol there is no such place
                total += Extras((_device(name, devices, "zfs"), blocks), mounts)
            case "kvm":
                both = (_device(name, devices, "kvm"), _device(name, devices, "net/tun"))
                total += Extras(both, capabilities=("NET_ADMIN",))
            case "loop":
                # One device, not the major number: the others carry the layers and write layers of all jobs.
                try:
                    minor = loop_device()
                except OSError as error:
                    raise ProfileError(f"error applying {name} profile: {error}") from error
                total += Extras((Device(type="b", major=loop.MAJOR, minor=minor, path="/dev/loop0"),))
            case _:
                raise ProfileError(f"unknown job profile: {name}")
    return total


def _device(profile: str, devices: Path, name: str) -> Device:
    try:
        status = (devices / name).stat()
    except OSError as error:
        raise ProfileError(f"error applying {profile} profile: {error}") from error
    kind = "b" if stat.S_ISBLK(status.st_mode) else "c"
    number = status.st_rdev
    return Device(type=kind, major=os.major(number), minor=os.minor(number), path=f"/dev/{name}")
