"""Formations against jobs: what is missing, what is too much, what is in the wrong place. Pure.

The answer is a list of decisions that make the difference vanish if carried out; asked again before they have taken
effect (a stop is under way, a start is pending), the same question has an empty answer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from flynn.scheduler.model import Formation, Host, HostID, Job, JobID, JobState
from flynn.types.formation import ScaleRequest


@dataclass(frozen=True, slots=True)
class Create:
    type: str
    count: int


@dataclass(frozen=True, slots=True)
class Stop:
    job: JobID
    reason: str


@dataclass(frozen=True, slots=True)
class CompleteScale:
    request: ScaleRequest


Decision = Create | Stop | CompleteScale


NO_EXTRA: Mapping[str, int] = {}


def reconcile(
    formation: Formation, jobs: Collection[Job], hosts: Mapping[HostID, Host], extra: Mapping[str, int] = NO_EXTRA
) -> list[Decision]:
    """Return what has to happen so that `jobs`, which are all of this formation, become what it asks for.

    `extra`: how many jobs of a type are to be there on top of that for now, because they take the place of others.
    """
    by_type: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        if job.in_formation and job.type and job.state.counts:
            by_type[job.type].append(job)
    targets = formation.targets(hosts.values())
    decisions: list[Decision] = []
    request = formation.scale_request
    if request is not None and _reached(targets, by_type):
        decisions.append(CompleteScale(request))
    for type in sorted({*targets, *by_type}):
        present = by_type.get(type, [])
        stops = misplaced(formation, type, present, hosts)
        stopped = {stop.job for stop in stops}
        left = [job for job in present if job.id not in stopped]
        difference = targets.get(type, 0) + extra.get(type, 0) - len(left)
        if difference > 0:
            decisions.append(Create(type, difference))
        elif difference < 0:
            stops += [Stop(job.id, "scaled down") for job in choose_to_stop(left, -difference, hosts)]
        decisions += stops
    return decisions


def _reached(targets: Mapping[str, int], by_type: Mapping[str, Collection[Job]]) -> bool:
    """Whether exactly the wanted jobs run. Jobs on their way out count as gone, jobs on their way in do not count."""
    running = {
        type: count
        for type, jobs in by_type.items()
        if (count := sum(1 for job in jobs if job.state is JobState.RUNNING))
    }
    return running == {type: count for type, count in targets.items() if count}


def misplaced(formation: Formation, type: str, jobs: Iterable[Job], hosts: Mapping[HostID, Host]) -> list[Stop]:
    """Jobs on hosts that lost their tags, and more of an omni type on one host than belong there."""
    tags = formation.tags_of(type)
    stops: list[Stop] = []
    on_host: dict[HostID, list[Job]] = defaultdict(list)
    for job in jobs:
        if job.host is None or not job.state.on_host:
            continue
        host = hosts.get(job.host)
        if host is not None and not host.fits(tags):
            stops.append(Stop(job.id, "host tags do not match"))
        else:
            on_host[job.host].append(job)
    if formation.process(type).omni:
        per_host = max(formation.wanted.get(type, 0), 0)
        if per_host:
            for together in on_host.values():
                if len(together) > per_host:
                    surplus = sorted(together, key=_newest_first)[: len(together) - per_host]
                    stops += [Stop(job.id, "more than its share on this host") for job in surplus]
    return stops


def choose_to_stop(jobs: Iterable[Job], count: int, hosts: Mapping[HostID, Host]) -> list[Job]:
    """The `count` jobs whose end does least harm.

    Those that do not run yet come first, then those on hosts that are going away anyway, then the ones still
    starting, then running ones; among these one on the host that has most of them, so that what stays is spread; among
    equals the newest.
    """

    def harm(job: Job) -> int:
        host = hosts.get(job.host) if job.host else None
        if job.state in (JobState.PENDING, JobState.BLOCKED):
            return 0
        if host is not None and host.shutting_down:
            return 1
        return 2 if job.state is JobState.STARTING else 3

    ranks: dict[int, list[Job]] = defaultdict(list)
    for job in jobs:
        if job.state.counts:
            ranks[harm(job)].append(job)
    chosen: list[Job] = []
    for rank in sorted(ranks):
        candidates = sorted(ranks[rank], key=_newest_first)
        chosen += candidates if rank < 3 else _levelled(candidates)
    return chosen[:count]


def _levelled(jobs: Iterable[Job]) -> list[Job]:
    """In which order to stop running jobs, the newest given first: always one of the fullest host next."""
    behind: Counter[HostID | None] = Counter()
    order = []
    for job in reversed(list(jobs)):
        behind[job.host] += 1
        order.append((-behind[job.host], job))  # it goes when so many are left on its host
    return [job for _, job in sorted(reversed(order), key=lambda item: item[0])]


def _newest_first(job: Job) -> float:
    return -job.age_mark.timestamp()


def load_by_host(jobs: Iterable[Job], type: str) -> Counter[HostID]:
    """How many jobs of a type each host has or is about to have."""
    return Counter(job.host for job in jobs if job.type == type and job.state.counts and job.host is not None)
