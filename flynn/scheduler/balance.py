"""Spreading what runs: after a host has come back, jobs move there one at a time, each started before one is stopped.

Placement keeps the jobs of a type spread when they are started; what a lost host does to the spread is made good here.
A move is made only where two hosts differ by two jobs or more, so each one makes the spread strictly better, and a
history without losses and returns ends without moves. It is never urgent: whatever else is going on comes first.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from flynn.scheduler import job_state
from flynn.scheduler.desk import Desk, Timer
from flynn.scheduler.hosts import STEADY
from flynn.scheduler.jobs import JobBook
from flynn.scheduler.model import Formation, FormationKey, Host, HostID, Job, JobID, JobState
from flynn.scheduler.placing import Placing
from flynn.types.app import Strategy

log = logging.getLogger(__name__)

MOVE_EVERY = timedelta(seconds=5)  # one job of the whole cluster
MOVES_AT_ONCE = 3  # of different formations
MOVE_LIMIT = timedelta(minutes=2)  # for the new job to be in service
AFTER_FAILURE = timedelta(minutes=5)  # a formation whose new job did not come up is left alone
AFTER_DEPLOY_STEP = timedelta(minutes=1)  # on top of what the app allows for one step
SIDE_BY_SIDE = frozenset((Strategy.ALL_AT_ONCE, Strategy.ONE_BY_ONE, Strategy.IN_BATCHES, ""))


@dataclass(frozen=True, slots=True)
class Move:
    job: Job
    to: Host


def movable(formation: Formation, type: str) -> bool:
    """Whether a job of this type is as good on any host, may run beside another one, and is up when it is reachable."""
    process = formation.process(type)
    told_by_another_service = any(
        port.service is not None and port.service.name != process.service for port in process.ports
    )
    return not (
        process.omni
        or process.resurrect
        or process.host_network
        or formation.volume_requests(type)
        or told_by_another_service
        or formation.app.strategy not in SIDE_BY_SIDE
    )


def next_move(formation: Formation, jobs: Collection[Job], hosts: Mapping[HostID, Host], now: datetime) -> Move | None:
    """The move that makes the worst difference between two hosts smaller; None if no two differ by more than one.

    `jobs` are all of the formation. A type some of whose jobs are on their way in or out is left alone.
    """
    targets = formation.targets(hosts.values())
    for type in sorted(targets):
        if targets[type] < 2 or not movable(formation, type):
            continue
        mine = [job for job in jobs if job.in_formation and job.type == type and job.state is not JobState.STOPPED]
        if len(mine) != targets[type] or any(job.state is not JobState.RUNNING for job in mine):
            continue
        if max(Counter(job.host for job in mine).values()) < 2:
            continue  # one on each host: no host could have two less
        tags, memory = formation.tags_of(type), formation.memory_of(type)
        move = _levelling(mine, [host for host in hosts.values() if host.fits(tags) and host.holds(memory)], now)
        if move is not None:
            return move
    return None


def _levelling(jobs: Collection[Job], hosts: Collection[Host], now: datetime) -> Move | None:
    on_host: dict[HostID, list[Job]] = {host.id: [] for host in hosts}
    for job in jobs:
        if job.host is not None:
            on_host.setdefault(job.host, []).append(job)
    takers = [host for host in hosts if host.takes_jobs and host.steady_since <= now - STEADY]
    if not takers or len(jobs) < 2:
        return None
    most = max(on_host, key=lambda id: (len(on_host[id]), id))
    least = min(takers, key=lambda host: (len(on_host[host.id]), host.id))
    if len(on_host[most]) - len(on_host[least.id]) < 2:
        return None
    return Move(max(on_host[most], key=lambda job: (job.age_mark, job.id)), least)


@dataclass(frozen=True, slots=True)
class _UnderWay:
    new: JobID
    old: JobID
    type: str
    formation: Formation  # as it was when the move began; any change of it comes first
    until: datetime


class Balance:
    def __init__(self, desk: Desk, jobs: JobBook, placing: Placing) -> None:
        self._desk = desk
        self._world = desk.world
        self._jobs = jobs
        self._placing = placing
        self._uneven: dict[FormationKey, None] = {}  # formations that may be: looked at in turn
        self._moves: dict[FormationKey, _UnderWay] = {}
        self._not_before: dict[FormationKey, datetime] = {}

    def look_at(self, key: FormationKey, now: datetime) -> None:
        """Something about the formation or its hosts has changed."""
        self._uneven[key] = None
        self._desk.arm(now + MOVE_EVERY, Timer.BALANCE)

    def extra(self, key: FormationKey) -> dict[str, int]:
        """How many jobs of a type there are on top of those wanted, because they take the place of others."""
        move = self._moves.get(key)
        return {move.type: 1} if move is not None else {}

    def go_on(self, now: datetime) -> None:
        """End the moves whose new job is up, and those that cannot be finished any more."""
        for key, move in list(self._moves.items()):
            new, old = self._world.jobs.get(move.new), self._world.jobs.get(move.old)
            if new is None or not new.state.counts or new.attempts or now >= move.until:
                self._not_before[key] = now + AFTER_FAILURE
                log.warning("job does not move", extra={"job": move.old, "to": new.host if new else ""})
                if new is not None:
                    self._jobs.apply(new, job_state.StopWanted("did not come up where another one was to move"), now)
            elif old is None or old.state is not JobState.RUNNING or self._changed(key, move):
                pass  # the new one stands in for the other, or is one too many: the reconcile that follows sees to it
            elif new.state is JobState.RUNNING:
                self._jobs.apply(old, job_state.StopWanted(f"moved to {new.host}"), now)
            else:
                continue
            del self._moves[key]
            self._desk.dirty[key] = None

    def _changed(self, key: FormationKey, move: _UnderWay) -> bool:
        formation = self._world.formations.get(key)
        if formation is None or formation.scale_request is not None:
            return True
        return (formation.wanted, formation.tags) != (move.formation.wanted, move.formation.tags)

    def begin(self, now: datetime) -> None:
        """Begin one move, if there is one to be made and nothing speaks against it."""
        if self._cluster_is_busy():
            self.again(now)
            return
        for key in list(self._uneven):
            if key in self._moves:
                continue
            del self._uneven[key]
            formation = self._world.formations.get(key)
            move = next_move(formation, self._world.jobs_of(key), self._world.hosts, now) if formation else None
            if formation is None or move is None:
                # A host that is not steady yet is no reason to look again: becoming so is told as a change.
                continue
            self._uneven[key] = None
            if now < self._not_before.get(key, now) or self._app_is_busy(formation, now):
                continue
            new = self._placing.create_on(move.to, formation, move.job.type, now)
            self._moves[key] = _UnderWay(new, move.job.id, move.job.type, formation, now + MOVE_LIMIT)
            self._desk.at(now + MOVE_LIMIT, Timer.MOVE)
            self._desk.counts["moves"] += 1
            log.info("job moves", extra={"job": move.job.cluster_id, "to": move.to.id, "as": new})
            break
        self.again(now)

    def again(self, now: datetime) -> None:
        """Look later at what could not be moved now."""
        if self._uneven:
            self._desk.arm(now + MOVE_EVERY, Timer.BALANCE)

    def _cluster_is_busy(self) -> bool:
        """A host is being emptied, or may be lost: not the time to make more changes."""
        return len(self._moves) >= MOVES_AT_ONCE or any(
            not host.healthy
            or (host.shutting_down and any(job.state is not JobState.STOPPED for job in self._world.jobs_on(host.id)))
            for host in self._world.hosts.values()
        )

    def _app_is_busy(self, formation: Formation, now: datetime) -> bool:
        """Its scale is being changed, or a deployment is under way.

        That is what two active releases mean, unless nothing has changed for longer than a step of a deployment takes.
        """
        app = formation.app
        patience = timedelta(seconds=app.deploy_timeout) + AFTER_DEPLOY_STEP
        for key, other in self._world.formations.items():
            if key.app != app.id:
                continue
            if other.scale_request is not None:
                return True
            if any(job.state is JobState.STOPPING for job in self._world.jobs_of(key)):
                return True
            if key != formation.key and other.active:
                latest = max((f.updated_at for f in (formation, other) if f.updated_at is not None), default=now)
                if now < latest + patience:
                    return True
        return False

    def forget(self) -> None:
        """Another one leads: a job that was to take another one's place is one too many to it, or is not."""
        self._moves.clear()
        self._uneven.clear()
        self._not_before.clear()

    def prune(self, now: datetime) -> None:
        self._not_before = {key: until for key, until in self._not_before.items() if until > now}
