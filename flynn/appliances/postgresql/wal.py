"""Log positions (LSNs): `16/B374D848` is two hexadecimal halves of a 64-bit number. Pure."""

from __future__ import annotations

ZERO = "0/00000000"


def parse(position: str) -> int:
    """Raises ValueError for what is no position."""
    high, slash, low = position.partition("/")
    if not slash or len(high) > 8 or len(low) > 8:
        raise ValueError(f"not a log position: {position!r}")
    return int(high, 16) << 32 | int(low, 16)


def compare(a: str, b: str) -> int:
    first, second = parse(a), parse(b)
    return (first > second) - (first < second)


def later(a: str, b: str) -> str:
    return b if compare(a, b) < 0 else a
