"""What processes cost, from /proc."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def pss_mb(pid: int) -> float:
    """Proportional set size. Raises `OSError` for a process that is gone."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"no Pss of process {pid}")


def cpu_seconds(*pids: int) -> float:
    """Time that the threads of processes have been running; those that have ended meanwhile are left out."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def below(pid: int) -> Iterable[int]:
    """A process and all its descendants."""
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        yield one
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                waiting += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
