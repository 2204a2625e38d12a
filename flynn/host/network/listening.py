"""Which ports of this network somebody listens on, whoever it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

TABLES = ("tcp", "tcp6", "udp", "udp6")
LISTEN, UNCONNECTED = "0A", "07"  # states of the kernel's tables


def ports_in_use(directory: Path = Path("/proc/self/net")) -> set[int]:
    """Return the ports that are taken, of either protocol. Blocking, a few milliseconds on a busy host."""
    taken: set[int] = set()
    for name in TABLES:
        try:
            with (directory / name).open() as table:
                taken.update(listed(table))
        except OSError:
            continue  # no IPv6 here
    return taken


def listed(table: Iterable[str]) -> Iterator[int]:
    """Yield the ports of one table that nobody else can have."""
    for line in table:
        words = line.split()
        if len(words) > 3 and words[3] in (LISTEN, UNCONNECTED):
            yield int(words[1].rpartition(":")[2], 16)
