"""The container's file system, as init builds it inside its own mount namespace. Nothing here outlives the container.

Everything taken from the host is opened before `pivot_root` (as detached mounts) and attached afterwards: so the kernel
resolves all targets inside the container's root, whatever symbolic links an image contains. The one way out left is a
link of the image to /proc/self/fd/N, as init holds descriptors of the host: so no path of the image is followed through
such a magic link (`open_plain`), and /proc, /sys and /dev must be directories.
"""

from __future__ import annotations

import errno
import os
import stat

from flynn.host.runtime import kernel
from flynn.host.runtime.kernel import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY
from flynn.host.runtime.plan import Plan

#: Not for containers to see: hidden by /dev/null or an empty directory.
MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kpagecgroup",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/vmallocinfo",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
DEV_LINKS = (
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
)


def build(plan: Plan) -> None:
    """Make the container's root the root of this process. Runs in the new mount (and pid, net) namespaces."""
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    binds = [_open_bind(source, writable) for _, source, writable, fstype, _, _ in plan.mounts if not fstype]
    views = [_open_bind(directory, plan.cgroups_writable) for _, directory in plan.cgroup_views]
    resolv_conf = _open_bind(f"{plan.directory}/resolv.conf", False) if plan.resolv_conf else None
    _enter_root(plan)
    _mount_system(plan)
    _mount_cgroups(plan, views)
    _protect_proc()
    if resolv_conf is not None:
        _attach_over_file(resolv_conf, "/etc/resolv.conf")
    if plan.hosts is not None:
        _write_file("/etc/hosts", plan.hosts)
    if plan.hostname and plan.writable:
        _write_file("/etc/hostname", plan.hostname + "\n")
    for target, source, _, fstype, options, flags in plan.mounts:
        if fstype:
            place = _directory(target)
            kernel.mount(source, f"/proc/self/fd/{place}", fstype, flags, options)
            os.close(place)
        else:
            _attach(binds.pop(0), target)


def _open_bind(source: str, writable: bool) -> int:
    fd = kernel.clone_mount(source)
    if not writable:
        kernel.make_read_only(fd)
    return fd


def _enter_root(plan: Plan) -> None:
    root = f"{plan.directory}/rootfs"
    os.makedirs(root, exist_ok=True)
    # By descriptor, as the option string is limited to a page and layer ids are long.
    fds = [os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for directory in plan.lower]
    lower = ":".join(f"/proc/self/fd/{fd}" for fd in fds)
    nodev = MS_NODEV if plan.nodev else 0
    if plan.writable is not None:
        for name in ("upper", "work"):
            os.makedirs(f"{plan.writable}/{name}", mode=0o755, exist_ok=True)
            fds.append(os.open(f"{plan.writable}/{name}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        upper = f"upperdir=/proc/self/fd/{fds[-2]},workdir=/proc/self/fd/{fds[-1]}"
        # volatile: the write layer is thrown away with the job, so an fsync in it need not reach the disk.
        kernel.mount("overlay", root, "overlay", nodev, f"lowerdir={lower},{upper},volatile")
    elif len(plan.lower) == 1:
        kernel.attach_mount(_open_bind(plan.lower[0], False), root)
    else:
        kernel.mount("overlay", root, "overlay", nodev | MS_RDONLY, f"lowerdir={lower}")
    for fd in fds:
        os.close(fd)
    os.chdir(root)
    kernel.pivot_root(".", ".")  # the old root is now stacked on the new one, and "." is the old one
    kernel.umount(".", kernel.MNT_DETACH)
    os.chdir("/")


def _mount_system(plan: Plan) -> None:
    for directory in ("/proc", "/sys", "/dev"):
        try:
            os.close(kernel.open_plain(directory, os.O_PATH | os.O_DIRECTORY, symlinks=False))
        except FileNotFoundError:
            os.mkdir(directory, 0o755)
    kernel.mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    kernel.mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY)
    kernel.mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | kernel.MS_STRICTATIME, "mode=755,size=65536k")
    for directory in ("/dev/pts", "/dev/shm", "/dev/mqueue"):
        os.mkdir(directory, 0o755)
    kernel.mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5")
    shm = f"mode=1777,size={plan.shm_bytes}"
    kernel.mount("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, shm)
    kernel.mount("mqueue", "/dev/mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for target, link in DEV_LINKS:
        os.symlink(target, link)
    null = ("/dev/null", False, 1, 3, 0o666, 0, 0)  # whatever the spec says: masking and stdin need it
    for path, block, major, minor, mode, uid, gid in {device[0]: device for device in (null, *plan.devices)}.values():
        parent, name = _directory(os.path.dirname(path)), os.path.basename(path)
        kind = stat.S_IFBLK if block else stat.S_IFCHR
        os.mknod(name, mode | kind, os.makedev(major, minor), dir_fd=parent)
        os.chmod(name, mode, dir_fd=parent)  # mknod heeds the umask
        os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
        os.close(parent)


def _mount_cgroups(plan: Plan, views: list[int]) -> None:
    """v1: a directory per controller; v2: the container's group is the whole tree."""
    if plan.cgroup_views and plan.cgroup_views[0][0] == "":
        return kernel.attach_mount(views[0], "/sys/fs/cgroup")
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    kernel.mount("tmpfs", "/sys/fs/cgroup", "tmpfs", flags, "mode=755")
    for (name, _), fd in zip(plan.cgroup_views, views, strict=True):
        os.mkdir(f"/sys/fs/cgroup/{name}")
        kernel.attach_mount(fd, f"/sys/fs/cgroup/{name}")
        os.close(fd)
    if not plan.cgroups_writable:
        kernel.mount("", "/sys/fs/cgroup", flags=flags | kernel.MS_REMOUNT | kernel.MS_BIND | MS_RDONLY)
    return None


def _protect_proc() -> None:
    for path in READ_ONLY:
        if os.path.lexists(path):
            fd = _open_bind(path, False)
            kernel.attach_mount(fd, path)
            os.close(fd)
    for path in MASKED:
        if os.path.isdir(path):
            kernel.mount("tmpfs", path, "tmpfs", MS_RDONLY, "size=0k")
        elif os.path.lexists(path):
            kernel.mount("/dev/null", path, flags=kernel.MS_BIND)


def _directory(path: str) -> int:
    """Return a descriptor of a directory inside the root, making what is missing of it."""
    path = os.path.normpath(path)
    try:
        return kernel.open_plain(path, os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        parent = _directory(os.path.dirname(path) or "/")
    try:
        os.mkdir(os.path.basename(path), dir_fd=parent)
    finally:
        os.close(parent)
    return kernel.open_plain(path, os.O_PATH | os.O_DIRECTORY)


def _attach(fd: int, target: str) -> None:
    """Attach a detached mount, of a file or a directory, making what is missing of its target."""
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        return _attach_over_file(fd, target)
    place = _directory(target)
    kernel.attach_mount_at(fd, place, target)
    os.close(place)
    os.close(fd)
    return None


def _attach_over_file(fd: int, target: str) -> None:
    target = os.path.normpath(target)
    try:
        place = kernel.open_plain(target, os.O_PATH)
    except FileNotFoundError:
        os.close(_new_file(target))
        place = kernel.open_plain(target, os.O_PATH)
    kernel.attach_mount_at(fd, place, target)
    os.close(place)
    os.close(fd)


def _write_file(path: str, text: str) -> None:
    fd = _new_file(path)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _new_file(path: str) -> int:
    """Open a file for writing, empty; a symbolic link is replaced (resolv.conf of images made on systemd machines)."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    parent, name = _directory(os.path.dirname(path) or "/"), os.path.basename(path)
    try:
        return os.open(name, flags, 0o644, dir_fd=parent)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        os.unlink(name, dir_fd=parent)
        return os.open(name, flags | os.O_EXCL, 0o644, dir_fd=parent)
    finally:
        os.close(parent)
