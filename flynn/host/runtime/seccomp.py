"""The system calls containers may not make: a deny list, compiled to a BPF program. Pure.

Written by hand rather than with libseccomp, because init has to stay small: it only gets the finished bytes.
The list follows what container engines refuse by default; calls a capability gates by itself are refused all the same,
unless the container was given that capability.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_EAFNOSUPPORT = 97
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24  # offsets in struct seccomp_data (low words)
_CLONE_NEW_ANY = 0x7E020000  # all CLONE_NEW* flags: namespaces are how most kernel holes are reached


@dataclass(frozen=True, slots=True)
class Architecture:
    audit: int
    numbers: Mapping[str, int]
    socket: int
    socketpair: int
    ioctl: int
    x32: bool = False  # also refuse the numbers with bit 30, a second set of the same calls


_NEW = {  # the same everywhere
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "mount_setattr": 442, "quotactl_fd": 443, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "clone3": 435, "pidfd_getfd": 438,
}  # fmt: skip

ARCHITECTURES: Mapping[str, Architecture] = {
    "x86_64": Architecture(
        0xC000003E,
        {
            **_NEW,
            "clone": 56, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155,
            "swapon": 167, "swapoff": 168, "reboot": 169, "settimeofday": 164, "clock_settime": 227,
            "clock_adjtime": 305, "adjtimex": 159, "acct": 163, "iopl": 172, "ioperm": 173, "create_module": 174,
            "init_module": 175, "delete_module": 176, "get_kernel_syms": 177, "query_module": 178, "quotactl": 179,
            "nfsservctl": 180,
            "finit_module": 313, "kexec_load": 246, "kexec_file_load": 320, "add_key": 248, "request_key": 249,
            "keyctl": 250, "lookup_dcookie": 212, "open_by_handle_at": 304, "name_to_handle_at": 303, "bpf": 321,
            "perf_event_open": 298, "userfaultfd": 323, "uselib": 134, "ustat": 136, "sysfs": 139, "syslog": 103,
            "vhangup": 153, "_sysctl": 156, "move_pages": 279, "migrate_pages": 256, "fanotify_init": 300,
            "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "ptrace": 101, "modify_ldt": 154,
            "sethostname": 170, "setdomainname": 171,
        },
        socket=41,
        socketpair=53,
        ioctl=16,
        x32=True,
    ),
    "aarch64": Architecture(
        0xC00000B7,
        {
            **_NEW,
            "clone": 220, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41, "swapon": 224,
            "swapoff": 225, "reboot": 142, "settimeofday": 170, "clock_settime": 112, "clock_adjtime": 266,
            "adjtimex": 171, "acct": 89, "init_module": 105, "delete_module": 106, "quotactl": 60, "nfsservctl": 42,
            "finit_module": 273,
            "kexec_load": 104, "kexec_file_load": 294, "add_key": 217, "request_key": 218, "keyctl": 219,
            "lookup_dcookie": 18, "open_by_handle_at": 265, "name_to_handle_at": 264, "bpf": 280,
            "perf_event_open": 241, "userfaultfd": 282, "syslog": 116, "vhangup": 58, "move_pages": 239,
            "migrate_pages": 238, "fanotify_init": 262, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272,
            "ptrace": 117, "sethostname": 161, "setdomainname": 162,
        },
        socket=198,
        socketpair=199,
        ioctl=29,
    ),
}  # fmt: skip

#: What sockets of applications are of: UNIX, IPv4, IPv6, netlink, packet. The rest is holes (AF_ALG, RDS ...) or, like
#: AF_VSOCK, the hypervisor, which no namespace hides. Jobs with NET_ADMIN or SYS_ADMIN may use any.
FAMILIES = (1, 2, 10, 16, 17)
#: Typing on behalf of the terminal's owner: TIOCSTI, TIOCLINUX.
REFUSED_IOCTLS = (0x5412, 0x541C)

#: Calls that come back with a capability.
GRANTED_BY: Mapping[str, Collection[str]] = {
    "SYS_ADMIN": (
        "mount", "umount2", "pivot_root", "unshare", "setns", "open_tree", "move_mount", "fsopen", "fsconfig",
        "fsmount", "fspick", "mount_setattr", "quotactl", "quotactl_fd", "clone", "clone3", "bpf", "perf_event_open",
        "fanotify_init",
        "lookup_dcookie", "sethostname", "setdomainname", "name_to_handle_at", "syslog",
    ),
    "SYS_MODULE": ("init_module", "finit_module", "delete_module", "create_module", "query_module"),
    "SYS_BOOT": ("reboot", "kexec_load", "kexec_file_load"),
    "SYS_TIME": ("settimeofday", "clock_settime", "clock_adjtime", "adjtimex"),
    "SYS_PTRACE": ("ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd"),
    "SYS_RAWIO": ("iopl", "ioperm"),
    "SYS_PACCT": ("acct",),
    "SYS_NICE": ("move_pages", "migrate_pages"),
    "SYSLOG": ("syslog",),
    "BPF": ("bpf",),
    "PERFMON": ("perf_event_open",),
    "DAC_READ_SEARCH": ("open_by_handle_at", "name_to_handle_at"),
}  # fmt: skip

#: Debuggers and tracers of one's own processes are ordinary tools, and since Linux 4.8 cannot get around this filter.
ALLOWED_ANYWAY = frozenset({"ptrace", "name_to_handle_at"})


def denied(capabilities: Collection[str], architecture: Architecture) -> frozenset[str]:
    granted = {call for name in capabilities for call in GRANTED_BY.get(name, ())}
    return frozenset(architecture.numbers) - granted - ALLOWED_ANYWAY


def program(capabilities: Collection[str], machine: str) -> bytes:
    """Return the BPF program for `os.uname().machine`; empty for a machine this module has no numbers of.

    Refused calls fail with EPERM; clone3 with ENOSYS, as its flags are out of a filter's sight and libc then falls back
    to clone, which is refused only with namespace flags. Calls of a foreign architecture (32 bit) kill the process.
    """
    architecture = ARCHITECTURES.get(machine)
    if architecture is None:
        return b""
    refused = denied(capabilities, architecture)
    simple = sorted(architecture.numbers[call] for call in refused - {"clone", "clone3"})
    code = [_instruction(_LOAD, _ARCHITECTURE), _instruction(_JUMP_EQUAL, architecture.audit, 1, 0)]
    code += [_instruction(_RETURN, _KILL), _instruction(_LOAD, _NUMBER)]
    if architecture.x32:
        code += [_instruction(_JUMP_GREATER_EQUAL, 0x40000000, 0, 1), _instruction(_RETURN, _ERRNO | _ENOSYS)]
    for number in simple:
        code += [_instruction(_JUMP_EQUAL, number, 0, 1), _instruction(_RETURN, _ERRNO | _EPERM)]
    if "clone3" in refused:
        code += [
            _instruction(_JUMP_EQUAL, architecture.numbers["clone3"], 0, 1),
            _instruction(_RETURN, _ERRNO | _ENOSYS),
        ]
    if "clone" in refused:
        code += [
            _instruction(_JUMP_EQUAL, architecture.numbers["clone"], 0, 3),
            _instruction(_LOAD, _FIRST_ARGUMENT),
            _instruction(_JUMP_SET, _CLONE_NEW_ANY, 0, 1),
            _instruction(_RETURN, _ERRNO | _EPERM),
        ]
    if not {"NET_ADMIN", "SYS_ADMIN"} & set(capabilities):
        code += _by_argument(architecture.socket, _FIRST_ARGUMENT, FAMILIES, allow=True, error=_EAFNOSUPPORT)
        code += _by_argument(architecture.socketpair, _FIRST_ARGUMENT, FAMILIES, allow=True, error=_EAFNOSUPPORT)
    code += _by_argument(architecture.ioctl, _SECOND_ARGUMENT, REFUSED_IOCTLS, allow=False, error=_EPERM)
    code.append(_instruction(_RETURN, _ALLOW))
    return b"".join(code)


def _by_argument(number: int, argument: int, values: Sequence[int], *, allow: bool, error: int) -> list[bytes]:
    """Code that decides on one call by an argument: `values` are those allowed, or else those refused."""
    refuse, accept = _instruction(_RETURN, _ERRNO | error), _instruction(_RETURN, _ALLOW)
    listed, others = (accept, refuse) if allow else (refuse, accept)
    checks = [_instruction(_JUMP_EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)]
    body = [_instruction(_LOAD, argument), *checks, others, listed]
    return [_instruction(_JUMP_EQUAL, number, 0, len(body)), *body]


def _instruction(operation: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, operand)
