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


def reconcile(formation: Formation, jobs: Collection[Job], hosts: Mapping[HostID, Host]) -> list[Decision]:
    """Return what has to happen so that `jobs`, which are all of this formation, become what it asks for."""
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
        difference = targets.get(type, 0) - len(left)
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
    starting, then running ones; among equals the newest.
    """

    def harm(job: Job) -> tuple[int, float]:
        host = hosts.get(job.host) if job.host else None
        if job.state in (JobState.PENDING, JobState.BLOCKED):
            rank = 0
        elif host is not None and host.shutting_down:
            rank = 1
        else:
            rank = 2 if job.state is JobState.STARTING else 3
        return rank, _newest_first(job)

    return sorted((job for job in jobs if job.state.counts), key=harm)[:count]


def _newest_first(job: Job) -> float:
    return -job.age_mark.timestamp()


def load_by_host(jobs: Iterable[Job], type: str) -> Counter[HostID]:
    """How many jobs of a type each host has or is about to have."""
    return Counter(job.host for job in jobs if job.type == type and job.state.counts and job.host is not None)
