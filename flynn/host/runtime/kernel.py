"""The system calls Python 3.11 does not offer, by ctypes on libc. No policy, no imports beyond what init can afford.

Every call raises OSError whose `filename` says what was attempted, so that its text can be shown to a user.
"""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_NOATIME = 1024
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_STRICTATIME = 1 << 24
MNT_DETACH = 2

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS = 0x02, 0x04
MOUNT_ATTR_RDONLY = 1

PR_SET_NAME = 15
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

# Since 2019 new system calls have the same number on every architecture.
SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_MOUNT_SETATTR = 442
SYS_OPENAT2 = 437
SYS_BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}[os.uname().machine]

BPF_PROG_LOAD, BPF_PROG_ATTACH = 5, 8
BPF_PROG_TYPE_CGROUP_DEVICE, BPF_CGROUP_DEVICE = 15, 6
BPF_F_ALLOW_MULTI = 2

_libc = ctypes.CDLL(None, use_errno=True)
_long, _int, _char_p = ctypes.c_long, ctypes.c_int, ctypes.c_char_p
_libc.mount.argtypes = (_char_p, _char_p, _char_p, ctypes.c_ulong, _char_p)
_libc.umount2.argtypes = (_char_p, _int)
_libc.prctl.argtypes = (_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_libc.syscall.restype = _long
_syscall = _libc.syscall


def _check(result: int, what: str) -> int:
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), what)
    return result


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    _check(_libc.setns(fd, kind), "setns")


def mount(source: str, target: str, fstype: str = "", flags: int = 0, options: str = "") -> None:
    result = _libc.mount(
        source.encode(), target.encode(), fstype.encode() or None, flags, options.encode() if options else None
    )
    _check(result, f"mount {fstype or source} on {target}")


def umount(target: str, flags: int = 0) -> None:
    _check(_libc.umount2(target.encode(), flags), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    _check(_syscall(_long(SYS_PIVOT_ROOT), _char_p(new.encode()), _char_p(old.encode())), "pivot_root")


def clone_mount(path: str) -> int:
    """Return a descriptor of a detached recursive copy of the mounts at `path`; attach it with `attach_mount`."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE
    call = (_long(SYS_OPEN_TREE), _long(AT_FDCWD), _char_p(path.encode()), _long(flags))
    return _check(int(_syscall(*call)), f"open {path} for mounting")


class _MountAttr(ctypes.Structure):
    _fields_ = [
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    ]


def make_read_only(mount_fd: int) -> None:
    """Make a detached mount and all below it read-only."""
    attributes = _MountAttr(attr_set=MOUNT_ATTR_RDONLY)
    flags = _long(AT_EMPTY_PATH | AT_RECURSIVE)
    size = _long(ctypes.sizeof(attributes))
    result = _syscall(_long(SYS_MOUNT_SETATTR), _long(mount_fd), _char_p(b""), flags, ctypes.byref(attributes), size)
    _check(result, "make mount read-only")


def attach_mount(mount_fd: int, target: str) -> None:
    call = (_long(SYS_MOVE_MOUNT), _long(mount_fd), _char_p(b""), _long(AT_FDCWD), _char_p(target.encode()))
    _check(_syscall(*call, _long(MOVE_MOUNT_F_EMPTY_PATH)), f"attach mount at {target}")


def attach_mount_at(mount_fd: int, target_fd: int, name: str) -> None:
    """Like `attach_mount`, on what `target_fd` refers to; `name` is for the error."""
    call = (_long(SYS_MOVE_MOUNT), _long(mount_fd), _char_p(b""), _long(target_fd), _char_p(b""))
    flags = _long(MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)
    _check(_syscall(*call, flags), f"attach mount at {name}")


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def open_plain(path: str, flags: int, *, symlinks: bool = True) -> int:
    """Open without passing through a magic link such as /proc/self/fd/3: those lead out of any root.

    Raises OSError with ELOOP where there is one (or, without `symlinks`, any symbolic link).
    """
    resolve = RESOLVE_NO_MAGICLINKS if symlinks else RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS
    how = _OpenHow(flags=flags | os.O_CLOEXEC, mode=0, resolve=resolve)
    call = (_long(SYS_OPENAT2), _long(AT_FDCWD), _char_p(path.encode()), ctypes.byref(how))
    result = int(_syscall(*call, _long(ctypes.sizeof(how))))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def sethostname(name: str) -> None:
    raw = name.encode()
    _check(_libc.sethostname(_char_p(raw), ctypes.c_size_t(len(raw))), "set hostname")


def prctl(option: int, value: int = 0, third: int = 0) -> None:
    _check(_libc.prctl(option, value, third, 0, 0), f"prctl {option}")


def set_process_name(name: str) -> None:
    """The name `ps` shows; at most 15 bytes count."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def install_seccomp(program: bytes) -> None:
    """Install a BPF program (8 bytes per instruction). Needs no_new_privs or CAP_SYS_ADMIN."""
    code = ctypes.create_string_buffer(program, len(program))
    header = _FilterProgram(length=len(program) // 8, filter=ctypes.addressof(code))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header))


class _ProgramToLoad(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_uint32), ("count", ctypes.c_uint32), ("instructions", ctypes.c_uint64),
        ("license", ctypes.c_uint64), ("log_level", ctypes.c_uint32), ("log_size", ctypes.c_uint32),
        ("log_buffer", ctypes.c_uint64), ("kernel_version", ctypes.c_uint32), ("flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16), ("interface", ctypes.c_uint32), ("attach_type", ctypes.c_uint32),
    ]  # fmt: skip


class _ProgramToAttach(ctypes.Structure):
    _fields_ = [
        ("target", ctypes.c_uint32), ("program", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32), ("flags", ctypes.c_uint32),
    ]  # fmt: skip


def _bpf(command: int, attributes: ctypes.Structure, what: str) -> int:
    size = _long(ctypes.sizeof(attributes))
    return _check(int(_syscall(_long(SYS_BPF), _long(command), ctypes.byref(attributes), size)), what)


def load_device_program(program: bytes) -> int:
    """Return a descriptor of a program made by `devices.program`. Needs CAP_SYS_ADMIN, or BPF and NET_ADMIN."""
    code, license = ctypes.create_string_buffer(program, len(program)), ctypes.create_string_buffer(b"GPL")
    wanted = _ProgramToLoad(
        kind=BPF_PROG_TYPE_CGROUP_DEVICE,
        count=len(program) // 8,
        instructions=ctypes.addressof(code),
        license=ctypes.addressof(license),
        name=b"flynn_devices",
        attach_type=BPF_CGROUP_DEVICE,
    )
    return _bpf(BPF_PROG_LOAD, wanted, "load the rules for devices")


def attach_device_program(group: str, program: bytes) -> None:
    """Hold all processes of a cgroup (v2) to a program. It goes with the group."""
    loaded = load_device_program(program)
    try:
        target = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # MULTI: the program of a group above (systemd's, say) is asked as well, and both must agree.
            wanted = _ProgramToAttach(
                target=target, program=loaded, attach_type=BPF_CGROUP_DEVICE, flags=BPF_F_ALLOW_MULTI
            )
            _bpf(BPF_PROG_ATTACH, wanted, f"attach the rules for devices to {group}")
        finally:
            os.close(target)
    finally:
        os.close(loaded)


_CAPABILITY_NAMES = (  # in the kernel's order: the index is the number
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
)
CAPABILITIES = _CAPABILITY_NAMES.split()


def capability_mask(names: tuple[str, ...]) -> int:
    """Raises ValueError for a name that does not exist."""
    mask = 0
    for name in names:
        bare = name.upper().removeprefix("CAP_")
        if bare not in CAPABILITIES:
            raise ValueError(f"unknown capability: {name}")
        mask |= 1 << CAPABILITIES.index(bare)
    return mask


def drop_bounding(mask: int) -> None:
    """Leave only the capabilities of `mask` in the bounding set. Needs SETPCAP: comes before `set_capabilities`."""
    for number in range(_last_capability() + 1):
        if not mask >> number & 1:
            prctl(PR_CAPBSET_DROP, number)


def set_capabilities(mask: int, *, ambient: bool) -> None:
    """Set effective, permitted and inheritable to `mask`; with `ambient` that set too, else clear it."""
    mask &= (2 << _last_capability()) - 1
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    data = (ctypes.c_uint32 * 6)(low, low, low, high, high, high)
    _check(_libc.capset(header, data), "set capabilities")
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(_last_capability() + 1):
        if ambient and mask >> number & 1:
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)


_last: list[int] = []


def _last_capability() -> int:
    if not _last:
        with open("/proc/sys/kernel/cap_last_cap") as file:
            _last.append(int(file.read()))
    return _last[0]
