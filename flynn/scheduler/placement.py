"""Where a new job goes: tags, spread, and the volumes that tie it to a host. Pure; randomness is the caller's order.

Not considered: memory, cpu and disk requests, jobs of other formations.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flynn.scheduler.model import Formation, Host, HostID, JobID, Tags, Volume, VolumeID
from flynn.types.release import VolumeReq

NO_HOSTS = "no hosts found"
NO_MATCH = "no hosts found matching job tags"
HOST_DOWN = "host is down"


def rotated(hosts: Sequence[Host], start: int) -> Iterator[Host]:
    """All hosts once, beginning at `start`: a cheap way to a fresh random order of an already shuffled list."""
    for index in range(len(hosts)):
        yield hosts[(start + index) % len(hosts)]


def spread(
    hosts: Iterable[Host],
    load: Mapping[HostID, int],
    wanted: Tags,
    count: int,
    *,
    avoid: HostID | None = None,
    prefer_healthy: bool = True,
) -> list[Host]:
    """Return hosts for `count` new jobs of one formation and type, always the one with the fewest next.

    `hosts` arrives shuffled: the caller owns the randomness, and the first of equals wins. `load` counts pending,
    blocked, starting and running jobs; a host without an entry counts as empty. Among equally loaded hosts a healthy
    one comes before one under suspicion, and `avoid` (it refused the job last time) comes after all others, whatever
    its load. Empty if no host carries the tags. Stops looking as soon as enough empty hosts are found.
    """
    chosen: list[Host] = []
    heap: list[tuple[bool, int, bool, int, Host]] = []
    for position, host in enumerate(hosts):
        if host.shutting_down or not host.fits(wanted):
            continue
        jobs, suspect, avoided = load.get(host.id, 0), prefer_healthy and not host.healthy, host.id == avoid
        if jobs == 0 and not suspect and not avoided:
            chosen.append(host)
            if len(chosen) == count:
                return chosen
            jobs = 1
        heap.append((avoided, jobs, suspect, position, host))
    if not heap:
        return []
    heapq.heapify(heap)
    while len(chosen) < count:
        avoided, jobs, suspect, position, host = heap[0]
        chosen.append(host)
        heapq.heapreplace(heap, (avoided, jobs + 1, suspect, position, host))
    return chosen


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str


@dataclass(frozen=True, slots=True)
class Chosen:
    host: Host
    volumes: tuple[Volume, ...] = ()


def place(
    formation: Formation,
    type: str,
    job: JobID,
    hosts: Sequence[Host],
    order: Iterable[Host],
    load: Mapping[HostID, int],
    volumes: Sequence[Volume],
    *,
    avoid: HostID | None = None,
    new_volume_id: Callable[[], VolumeID],
) -> Chosen | Refused:
    """Place one job: by its volumes if it has some to take over, else where its formation has the fewest jobs.

    `volumes` are those that jobs of this type may take over, the first being the best. A volume to take over pins the
    job to the volume's host; while that host is away the job waits for it, since starting elsewhere would mean starting
    with empty data. An omni type belongs on every host: there the host comes first, and the volume is looked for on it.
    """
    if not hosts:
        return Refused(NO_HOSTS)
    tags = formation.tags_of(type)
    omni = formation.process(type).omni
    requests = formation.volume_requests(type)
    pinned = _pinned(requests, volumes, {host.id: host for host in hosts}, tags) if requests and not omni else None
    if isinstance(pinned, Refused):
        return pinned
    if pinned is None:
        found = spread(order, load, tags, 1, avoid=None if omni else avoid, prefer_healthy=not omni)
        if not found:
            return Refused(NO_MATCH)
        pinned = found[0]
    return Chosen(pinned, _bind(formation, type, job, requests, volumes, pinned.id, new_volume_id))


def _pinned(
    requests: Sequence[VolumeReq], volumes: Sequence[Volume], hosts: Mapping[HostID, Host], tags: Tags
) -> Host | Refused | None:
    paths = {request.path for request in requests}
    candidates = [volume for volume in volumes if volume.reusable and volume.path in paths]
    if not candidates:
        return None
    refusal = Refused(HOST_DOWN)
    for volume in candidates:
        host = hosts.get(volume.host)
        if host is None or host.shutting_down:
            continue
        if host.fits(tags):
            return host
        refusal = Refused(NO_MATCH)
    return refusal


def _bind(
    formation: Formation,
    type: str,
    job: JobID,
    requests: Sequence[VolumeReq],
    volumes: Sequence[Volume],
    host: HostID,
    new_volume_id: Callable[[], VolumeID],
) -> tuple[Volume, ...]:
    bound = []
    for request in requests:
        found = next((v for v in volumes if v.reusable and v.path == request.path and v.host == host), None)
        bound.append(
            found
            or Volume(
                id=new_volume_id(),
                host=host,
                app=formation.app.id,
                release=formation.release.id,
                type=type,
                path=request.path,
                delete_on_stop=request.delete_on_stop,
                job=job,
            )
        )
    return tuple(bound)
