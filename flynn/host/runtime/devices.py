"""Which devices a container may use, on cgroup v2: the rules as a BPF program that the kernel asks. Pure.

v1 has files for these rules; on v2 a program of the type CGROUP_DEVICE is attached to the group. It is handed
`struct bpf_cgroup_dev_ctx` (access << 16 | type, major, minor: three 32-bit words) and says 1 for yes. The rules mean
the same as v1's: everything is forbidden but what one of the allowed devices covers whole.

Written by hand, as the deny list of system calls is: init only gets the finished bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from flynn.host.runtime.spec import Device

BLOCK, CHARACTER = 1, 2
MKNOD, READ, WRITE = 1, 2, 4
_ACCESS = {"m": MKNOD, "r": READ, "w": WRITE}
_LOAD, _AND, _SHIFT_RIGHT, _COPY, _SET, _JUMP_UNEQUAL, _EXIT = 0x61, 0x54, 0x74, 0xBC, 0xB7, 0x55, 0x95
_R0, _R1, _TYPE, _WANTED, _MAJOR, _MINOR, _LEFT = 0, 1, 2, 3, 4, 5, 6  # registers

Instruction = tuple[int, int, int, int, int]  # code, destination, source, offset, immediate value


def unrestricted(allowed: Sequence[Device]) -> bool:
    """Tell whether the rules allow everything; then there is nothing to attach."""
    return any(device.type == "a" for device in allowed)


def program(allowed: Sequence[Device]) -> bytes:
    """Return the program that admits these devices and no others (8 bytes per instruction)."""
    instructions: list[Instruction] = [
        (_LOAD, _TYPE, _R1, 0, 0),
        (_COPY, _WANTED, _TYPE, 0, 0),
        (_AND, _TYPE, 0, 0, 0xFFFF),
        (_SHIFT_RIGHT, _WANTED, 0, 0, 16),
        (_LOAD, _MAJOR, _R1, 4, 0),
        (_LOAD, _MINOR, _R1, 8, 0),
    ]
    for device in allowed:
        if device.allow:
            instructions += _rule(device)
    instructions += [(_SET, _R0, 0, 0, 0), (_EXIT, 0, 0, 0, 0)]
    return b"".join(
        struct.pack("<BBhi", code, destination | source << 4, offset, value)
        for code, destination, source, offset, value in instructions
    )


def _rule(device: Device) -> list[Instruction]:
    """Say yes to what one device covers, else go on behind the rule."""
    covered = sum(_ACCESS[letter] for letter in set(device.permissions))
    tests: list[tuple[list[Instruction], int, int]] = [
        ([], _TYPE, BLOCK if device.type == "b" else CHARACTER),
        ([(_COPY, _LEFT, _WANTED, 0, 0), (_AND, _LEFT, 0, 0, ~covered & 7)], _LEFT, 0),
    ]
    if device.major >= 0:
        tests.append(([], _MAJOR, device.major))
    if device.minor >= 0:
        tests.append(([], _MINOR, device.minor))
    yes: list[Instruction] = [(_SET, _R0, 0, 0, 1), (_EXIT, 0, 0, 0, 0)]
    rule = yes
    for before, register, value in reversed(tests):
        rule = [*before, (_JUMP_UNEQUAL, register, 0, len(rule), value), *rule]
    return rule
