"""Whether a job has room on this machine: its write layer, the layers to be fetched, its memory. Pure.

Part of the disk that carries the host's state is held in reserve: jobs are refused before they eat it. User jobs leave
all of it alone; the platform's own may use half, or a full disk would also keep away what makes room.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flynn.types.host import HostJob
from flynn.types.resources import MIB, Limit

MOST_RESERVED = 2 << 30
RESERVED_SHARE = 20  # one part in so many
SYSTEM = "system"


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system with the host's state. All in bytes; `free_bytes` without what is root's alone."""

    path: str
    total_bytes: int
    free_bytes: int
    reserve_bytes: int

    @property
    def low(self) -> bool:
        """Less is free than is to be held in reserve."""
        return self.free_bytes < self.reserve_bytes

    @property
    def trouble(self) -> str:
        if not self.low:
            return ""
        return (
            f"{self.path} has {mib(self.free_bytes)} free, less than its reserve of {mib(self.reserve_bytes)}:"
            " no new jobs"
        )


def default_reserve(total_bytes: int) -> int:
    """Return what is held in reserve unless the operator says something else."""
    return min(MOST_RESERVED, total_bytes // RESERVED_SHARE)


def mib(count: int) -> str:
    return f"{count // MIB} MiB"


def impossible(job: HostJob, memory_bytes: int) -> str:
    """Say why a job can never run on a machine with so much memory; nothing when it can.

    What other jobs may use is not counted: limits are no reservations.
    """
    wanted = job.resources.get("memory", Limit())
    memory = wanted.request if wanted.request is not None else wanted.limit
    if memory is not None and memory > memory_bytes:
        return f"cannot be {mib(memory)}: this host has {mib(memory_bytes)}"
    return ""


def refusal(job: HostJob, scratch_bytes: int, missing_layers: Mapping[str, int], disk: Disk) -> str:
    """Say why a job cannot run here now, what it needs, and what there is; nothing when it can.

    Args:
        scratch_bytes: how much its write layer may hold.
        missing_layers: sizes of the layers that would have to be fetched, by id.
    """
    fetched = sum(missing_layers.values())
    reserve = disk.reserve_bytes // 2 if job.partition == SYSTEM else disk.reserve_bytes
    if disk.free_bytes - scratch_bytes - fetched >= reserve:
        return ""
    needs = [f"{mib(scratch_bytes)} of temporary disk"]
    if missing_layers:
        count = len(missing_layers)
        needs.append(f"{mib(fetched)} for {'a layer' if count == 1 else f'{count} layers'} to be fetched")
    return (
        f"no room for the job: it needs {' and '.join(needs)}, and {disk.path} has {mib(disk.free_bytes)} free,"
        f" of which {mib(reserve)} are held in reserve"
    )
