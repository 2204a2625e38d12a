"""Where a new job goes: tags, spread, memory, ports, the volumes that tie it to a host. Pure; chance is an argument.

Memory decides little on purpose: limits are what the platform enforces, and most requests are a default that nobody
has thought about. A host that could not hold the job at all is no choice; among hosts that are equally good otherwise,
the one is better of whose memory less is asked for.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flynn.scheduler.model import Formation, Host, HostID, HostPort, JobID, Tags, Volume, VolumeID
from flynn.types.release import VolumeReq

NO_HOSTS = "no hosts found"
NO_MATCH = "no hosts found matching job tags"
HOST_DOWN = "host is down"
CANDIDATES = 4  # empty hosts compared for each job wanted: two would do, all would cost too much

NONE_RESERVED: Mapping[HostID, int] = {}


@dataclass(frozen=True, slots=True)
class Needs:
    """What a type asks of a host."""

    tags: Tags
    memory: int = 0  # bytes
    ports: frozenset[HostPort] = frozenset()  # of the host itself
    taken: frozenset[HostID] = frozenset()  # hosts where somebody has one of these ports
    alone: bool = False  # no two of its jobs fit on one host

    def met_by(self, host: Host) -> bool:
        return not host.shutting_down and host.fits(self.tags) and host.holds(self.memory) and host.id not in self.taken

    def refusal(self, hosts: Iterable[Host]) -> str:
        """Why none of `hosts` will do."""
        known = list(hosts)
        if not known:
            return NO_HOSTS
        tagged = [host for host in known if not host.shutting_down and host.fits(self.tags)]
        if not tagged:
            return NO_MATCH
        if not any(host.holds(self.memory) for host in tagged):
            return f"no host has the {self.memory / 2**30:.1f} GiB of memory that it asks for"
        return f"on every host that fits a job has port {' or '.join(str(port) for port in sorted(self.ports))}"


def rotated(hosts: Sequence[Host], start: int) -> Iterator[Host]:
    """All hosts once, beginning at `start`: a cheap way to a fresh random order of an already shuffled list."""
    for index in range(len(hosts)):
        yield hosts[(start + index) % len(hosts)]


def spread(
    hosts: Iterable[Host],
    load: Mapping[HostID, int],
    needs: Needs,
    count: int,
    *,
    reserved: Mapping[HostID, int] = NONE_RESERVED,
    avoid: HostID | None = None,
    prefer_healthy: bool = True,
) -> list[Host]:
    """Return hosts for `count` new jobs of one formation and type, always the one with the fewest next.

    `hosts` arrives shuffled: the caller owns the randomness, and the first of equals wins. `load` counts pending,
    blocked, starting and running jobs; a host without an entry counts as empty. Among equally loaded hosts a healthy
    one comes before one under suspicion, then one whose memory is `reserved` less, and `avoid` (it refused the job last
    time) comes after all others, whatever its load. Fewer than `count` if there are not enough, empty if no host will
    do. Stops looking as soon as enough empty hosts are found to choose from.
    """

    def asked_of(host: Host) -> float:
        return reserved.get(host.id, 0) / host.memory if host.memory else 0.0

    empty: list[tuple[float, int, Host]] = []
    heap: list[tuple[bool, int, bool, float, int, Host]] = []
    for position, host in enumerate(hosts):
        if not needs.met_by(host):
            continue
        jobs, suspect, avoided = load.get(host.id, 0), prefer_healthy and not host.healthy, host.id == avoid
        if jobs and needs.alone:
            continue
        if jobs == 0 and not suspect and not avoided:
            empty.append((asked_of(host), position, host))
            if len(empty) == CANDIDATES * count:
                break
        heap.append((avoided, jobs, suspect, asked_of(host), position, host))
    if len(empty) >= count:
        return [host for _, _, host in sorted(empty)[:count]]
    heapq.heapify(heap)
    chosen: list[Host] = []
    while heap and len(chosen) < count:
        avoided, jobs, suspect, asked, position, host = heapq.heappop(heap)
        chosen.append(host)
        if not needs.alone:
            heapq.heappush(heap, (avoided, jobs + 1, suspect, asked, position, host))
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
    needs: Needs,
    reserved: Mapping[HostID, int] = NONE_RESERVED,
    avoid: HostID | None = None,
    new_volume_id: Callable[[], VolumeID],
) -> Chosen | Refused:
    """Place one job: by its volumes if it has some to take over, else where its formation has the fewest jobs.

    `volumes` are those that jobs of this type may take over, the first being the best. A volume to take over pins the
    job to the volume's host; while that host is away the job waits for it, since starting elsewhere would mean starting
    with empty data. An omni type belongs on every host: there the host comes first, and the volume is looked for on it.
    Where jobs hand over to their successors themselves, the successor gets the volume that is still in use.
    """
    if not hosts:
        return Refused(NO_HOSTS)
    omni = formation.process(type).omni
    requests = formation.volume_requests(type)
    pinned = _pinned(requests, volumes, {host.id: host for host in hosts}, needs) if requests and not omni else None
    if isinstance(pinned, Refused):
        return pinned
    if pinned is None:
        found = spread(order, load, needs, 1, reserved=reserved, avoid=None if omni else avoid, prefer_healthy=not omni)
        if not found:
            return Refused(needs.refusal(hosts))
        pinned = found[0]
    return Chosen(pinned, _bind(formation, type, job, requests, volumes, pinned.id, new_volume_id))


def _pinned(
    requests: Sequence[VolumeReq], volumes: Sequence[Volume], hosts: Mapping[HostID, Host], needs: Needs
) -> Host | Refused | None:
    paths = {request.path for request in requests}
    candidates = [volume for volume in volumes if volume.reusable and volume.path in paths]
    if not candidates:
        return None
    refusal = Refused(f"{HOST_DOWN}: its volume is on {candidates[0].host}")
    for volume in candidates:
        host = hosts.get(volume.host)
        if host is None or host.shutting_down:
            continue
        if needs.met_by(host):
            return host
        refusal = Refused(needs.refusal([host]))
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
    here = [v for v in volumes if v.host == host and (v.reusable or (formation.hands_over and v.shareable))]
    bound = []
    for request in requests:
        found = next((v for v in here if v.path == request.path), None)
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
                size=request.size,
                job=job,
            )
        )
    return tuple(bound)
