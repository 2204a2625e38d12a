"""Mounting an image file through a loop device that goes away with the mount."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path

from flynn.host.runtime import kernel

_LOOP_CTL_ADD, _LOOP_CTL_REMOVE, _LOOP_CTL_GET_FREE = 0x4C80, 0x4C81, 0x4C82
_LOOP_CONFIGURE, _LOOP_CLR_FD = 0x4C0A, 0x4C01
MAJOR = 7
#: An empty file per device that belongs to a job, for all hosts on the machine: nobody of us may mount by it.
GIVEN_AWAY = Path("/run/flynn-loop")
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
_TRIES = 50  # another process may take the free device first; all nodes of a machine share the devices


class _LoopInfo(ctypes.Structure):
    _fields_ = [
        ("device", ctypes.c_uint64), ("inode", ctypes.c_uint64), ("rdevice", ctypes.c_uint64),
        ("offset", ctypes.c_uint64), ("size_limit", ctypes.c_uint64), ("number", ctypes.c_uint32),
        ("encrypt_type", ctypes.c_uint32), ("encrypt_key_size", ctypes.c_uint32), ("flags", ctypes.c_uint32),
        ("file_name", ctypes.c_char * 64), ("crypt_name", ctypes.c_char * 64), ("encrypt_key", ctypes.c_ubyte * 32),
        ("init", ctypes.c_uint64 * 2),
    ]  # fmt: skip


class _LoopConfig(ctypes.Structure):
    _fields_ = [
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", _LoopInfo),
        ("reserved", ctypes.c_uint64 * 8),
    ]


def mount_image(image: Path, target: Path, fstype: str, *, read_only: bool) -> None:
    """Mount a file. The loop device is released by the kernel at the last unmount."""
    backing = os.open(image, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        device, name = _attach(backing, str(image), read_only)
        try:
            flags = kernel.MS_RDONLY if read_only else kernel.MS_NOATIME
            kernel.mount(name, str(target), fstype, flags | kernel.MS_NODEV * (not read_only))
        finally:
            os.close(device)
    finally:
        os.close(backing)


def _attach(backing: int, name: str, read_only: bool) -> tuple[int, str]:
    """Return an open loop device carrying the file; with autoclear it lives until the last user closes it."""
    flags = _AUTOCLEAR | (_READ_ONLY if read_only else 0)
    config = _LoopConfig(fd=backing, info=_LoopInfo(flags=flags, file_name=name.encode()[-63:]))
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            if (GIVEN_AWAY / str(number)).exists():
                number = fcntl.ioctl(control, _LOOP_CTL_ADD, -1)
            path = f"/dev/loop{number}"
            device = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
                return device, path
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise
        raise OSError(errno.EBUSY, "no free loop device", name)
    finally:
        os.close(control)


def give_away() -> int:
    """Make a loop device for a job alone; returns its minor number. `take_back` ends it."""
    GIVEN_AWAY.mkdir(mode=0o700, exist_ok=True)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        number = fcntl.ioctl(control, _LOOP_CTL_ADD, -1)
    finally:
        os.close(control)
    (GIVEN_AWAY / str(number)).touch()
    return number


def take_back(number: int) -> None:
    """Detach what a job has left on its device and remove that. Idempotent; not for devices of anyone else."""
    if not (GIVEN_AWAY / str(number)).exists():
        return
    try:
        device = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, _LOOP_CLR_FD)
        finally:
            os.close(device)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.ENOENT):  # it carries nothing, or is gone
            raise
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(control, _LOOP_CTL_REMOVE, number)
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.EBUSY):  # a mount of it goes on: the device waits to be free again
            raise
    finally:
        os.close(control)
    (GIVEN_AWAY / str(number)).unlink(missing_ok=True)


def mount_points(below: Path) -> list[Path]:
    """What is mounted below a directory in this mount namespace, the newest first."""
    prefix = f"{below}/"
    found = []
    with open("/proc/self/mountinfo") as file:
        for line in file:
            path = line.split(" ", 5)[4].encode().decode("unicode_escape")  # spaces are written as \040
            if path.startswith(prefix):
                found.append(Path(path))
    return found[::-1]


def unmount(target: Path) -> None:
    """Idempotent. Lazy: a container being set up this moment may hold a copy of the mount for some milliseconds."""
    try:
        kernel.umount(str(target), kernel.MNT_DETACH)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
