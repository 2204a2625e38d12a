"""The decisions of one scheduler: events in, actions out. Synchronous, no I/O, no clock and no randomness of its own.

`step` takes a batch of events, hands each to the part it concerns, and answers with everything that follows from
them. All rules are level-triggered: a repeated, late or missed event does no harm, since the next listing says the same
again.

Only a leader acts. Before it does after its promotion, it waits until formations, the jobs of every healthy host and
the controller's books of jobs and volumes have been listed: a decision on a half-known cluster would start everything
twice, or without its data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import assert_never

from flynn.scheduler import job_state, records
from flynn.scheduler.balance import Balance
from flynn.scheduler.desk import Chance, Desk, Timer
from flynn.scheduler.events import (
    Action,
    BackendDrained,
    BackendUp,
    CompleteScaleRequest,
    Drained,
    DropPending,
    Event,
    FormationReceived,
    FormationsListed,
    HostChecked,
    HostDescribed,
    HostGone,
    HostSeen,
    JobReported,
    JobsListed,
    LeadershipChanged,
    ListingFailed,
    Overruled,
    RecordsListed,
    RecordsUnavailable,
    Resync,
    RouteRemoved,
    RouterGone,
    RouteSet,
    ServiceListed,
    StartDone,
    StopDone,
    Tick,
    VolumeRecorded,
    VolumesListed,
    VolumesRecorded,
)
from flynn.scheduler.formations import FormationBook
from flynn.scheduler.hosts import HostWatch
from flynn.scheduler.jobs import JobBook
from flynn.scheduler.model import FormationKey, HostID, JobID
from flynn.scheduler.placing import Placing
from flynn.scheduler.readiness import Readiness
from flynn.scheduler.reconcile import CompleteScale, Create, Stop, reconcile
from flynn.scheduler.restarts import Restarts
from flynn.scheduler.volumes import VolumeBook

log = logging.getLogger(__name__)

SWEEP_EVERY = timedelta(seconds=60)  # a full reconcile, so that no lost trigger leaves a formation wrong for good
CLAIM_AGAIN = timedelta(seconds=60)  # hosts remember a leader that is silent for 75 s
BOOKS_PATIENCE = timedelta(seconds=3)  # the controller may be waiting for a database that has just lost its power

FORMATIONS = "formations"
RECORDS = "records"
VOLUMES = "volumes"


class Engine:
    def __init__(self, random: Chance, new_id: Callable[[], str]) -> None:
        self._desk = Desk(random, new_id)
        self.world = self._desk.world
        self._volumes = VolumeBook(self._desk)
        self._readiness = Readiness(self._desk)
        self._restarts = Restarts(self._desk)
        self._formations = FormationBook(self._desk)
        self._jobs = JobBook(self._desk, self._volumes, self._readiness, self._restarts, self._formations)
        self._hosts = HostWatch(self._desk, self._jobs)
        self._placing = Placing(self._desk, self._jobs, self._volumes, self._restarts)
        self._balance = Balance(self._desk, self._jobs, self._placing)
        self._elected = False  # the directory says that we lead
        self._awaited: set[str] = set()  # what has to be listed before a new leader acts, but for the jobs of hosts
        self._records: RecordsListed | None = None
        self._volumes_told = False
        self._heir = False  # has led for so short that the books still say what the leader before knew

    @property
    def leader(self) -> bool | None:
        """None: not known yet."""
        return self._desk.leader

    @property
    def counts(self) -> Mapping[str, float]:
        """What was done so far, by the names of `figures.COUNTED`."""
        return self._desk.counts

    def step(self, events: Iterable[Event], now: datetime) -> list[Action]:
        """Take in events, then decide. Costs what has changed, not what is known."""
        self._desk.arm(now + SWEEP_EVERY, Timer.SWEEP)
        for event in events:
            self._handle(event, now)
        for kind, id in self._desk.due(now):
            self._fire(kind, id, now)
        if self._formations.changed:
            self._formations.changed = False
            self._readiness.watch()
        if self.leader and self.settled:
            if self._records is not None:
                listed, self._records = self._records, None
                if self._heir:
                    records.inherit(self._desk, self._restarts, listed, now)
                    self._heir = False
                records.compare(self._desk, listed, now)
            self._balance.go_on(now)
            self._reconcile(now)
            self._placing.place(now)
        return self._desk.take_actions(now)

    def next_due(self) -> datetime | None:
        """When to call `step` again even if nothing happens."""
        return self._desk.next_due()

    @property
    def settled(self) -> bool:
        """Whether nothing is awaited: the leader acts."""
        return not self._awaited and not self._hosts.unlisted

    def _handle(self, event: Event, now: datetime) -> None:
        match event:
            case LeadershipChanged(leader):
                self._elected = leader
                self._lead(now) if leader else self._follow()
            case Overruled():
                self._overruled(now)
            case HostSeen():
                self._hosts.seen(event, now)
            case HostDescribed():
                self._hosts.described(event)
            case HostGone(host):
                self._hosts.gone(host, now)
            case HostChecked(host, alive):
                self._hosts.checked(host, alive, now)
            case JobReported(report):
                self._jobs.reported(report, now)
            case JobsListed(host):
                if host in self.world.hosts:
                    self._hosts.unlisted.pop(host, None)
                    self._jobs.listed(event, now)
            case ListingFailed(host):
                self._hosts.unlisted.pop(host, None)
                self._hosts.suspect(host, now)
            case VolumesListed():
                self._volumes.listed(event)
            case VolumeRecorded(volume):
                self._volumes.recorded(volume)
            case VolumesRecorded():
                self._volumes_told = True
                self._awaited.discard(VOLUMES)
            case FormationReceived(formation):
                self._formations.received(formation, now)
            case FormationsListed():
                self._awaited.discard(FORMATIONS)
                self._formations.listed(event, now)
            case RecordsListed():
                self._records = event
                self._awaited.discard(RECORDS)
            case RecordsUnavailable():
                # The controller itself may be what has to be started: what the streams said so far must do.
                self._awaited.clear()
            case ServiceListed(service, jobs):
                for id in self._readiness.service_listed(service, jobs, now):
                    self._jobs.check_ready(id, now)
            case StartDone():
                self._placing.start_done(event, now)
            case StopDone(job, host):
                self._jobs.stop_done(job, host)
            case RouteSet() | RouteRemoved() | BackendUp() | BackendDrained() | RouterGone():
                self._router_said(event, now)
            case Tick():
                pass
            case _:
                assert_never(event)

    def _router_said(
        self, event: RouteSet | RouteRemoved | BackendUp | BackendDrained | RouterGone, now: datetime
    ) -> None:
        board = self._readiness.board
        drained: list[JobID] = []
        match event:
            case RouteSet(router, service):
                board.route_set(router, service)
            case RouteRemoved(router, service):
                drained = board.route_removed(router, service)
            case BackendUp(router, service, job):
                board.backend_up(router, service, job)
                self._jobs.check_ready(job, now)
            case BackendDrained(router, job):
                drained = board.backend_drained(router, job)
            case RouterGone(router):
                drained = board.router_gone(router)
        for job in drained:
            self._desk.ask(Drained(job))

    # Leadership

    def _lead(self, now: datetime) -> None:
        if self.leader:
            return
        self._desk.leader = True
        self._heir = True
        self._awaited |= {FORMATIONS, RECORDS} | (set() if self._volumes_told else {VOLUMES})
        self._hosts.unlisted.update(dict.fromkeys(self.world.hosts))
        self._desk.mark_all()
        self._desk.ask(Resync())
        self._desk.arm(now + BOOKS_PATIENCE, Timer.BOOKS)
        log.info("leading", extra={"hosts": len(self.world.hosts), "formations": len(self.world.formations)})

    def _follow(self) -> None:
        if self.leader:
            log.info("not leading any more")
            self._desk.ask(DropPending())
            # Jobs without a host exist nowhere but here; the next leader makes its own.
            for job in [job for job in self.world.jobs.values() if job.state.counts and job.host is None]:
                self.world.drop_job(job.id)
            self._volumes.forget_plans()
        self._desk.leader = False
        self._records = None
        self._desk.to_place.clear()
        self._desk.blocked.clear()
        self._desk.starting.clear()
        self._jobs.forget_requests()
        self._desk.forget_told()
        self._restarts.forget()
        self._balance.forget()
        self._awaited.clear()

    def _overruled(self, now: datetime) -> None:
        """A host has heard of a later leader. If that is nobody's word any more, it will forget it."""
        if self.leader:
            log.warning("another scheduler leads, as a host says")
            self._follow()
            self._desk.arm(now + CLAIM_AGAIN, Timer.CLAIM)

    # Decisions

    def _reconcile(self, now: datetime) -> None:
        # Stopping a job that never ran ends it at once, which marks its formation again: a second look then finds
        # its scale request fulfilled. A third one finds nothing new.
        for _ in range(3):
            dirty = list(self._desk.dirty)
            self._desk.dirty.clear()
            for key in dirty:
                self._reconcile_one(key, now)

    def _reconcile_one(self, key: FormationKey, now: datetime) -> None:
        formation = self.world.formations.get(key)
        if formation is None:
            return
        for decision in reconcile(formation, self.world.jobs_of(key), self.world.hosts, self._balance.extra(key)):
            match decision:
                case Create(type, count):
                    self._placing.create(formation, type, count - self._restarts.awaited(key, type, now), now)
                case Stop(id, reason):
                    self._jobs.apply(self.world.jobs[id], job_state.StopWanted(reason), now)
                case CompleteScale(request):
                    self._desk.ask(CompleteScaleRequest(key, request))
                    self.world.formations[key] = replace(formation, scale_request=None)
        self._restarts.settled(formation)
        self._balance.look_at(key, now)

    def _fire(self, kind: Timer, id: str, now: datetime) -> None:
        match kind:
            case Timer.START:
                self._desk.to_place[JobID(id)] = None
            case Timer.READY:
                self._jobs.check_ready(JobID(id), now)
            case Timer.DEADLINE:
                self._jobs.check_deadline(JobID(id), now)
            case Timer.CHECK:
                self._hosts.check_again(HostID(id), now)
            case Timer.SUCCESSOR:
                self._restarts.give_up_successors(now)
            case Timer.CLAIM:
                if self._elected:
                    self._lead(now)
            case Timer.STEADY:
                self._hosts.became_steady(now)
            case Timer.BALANCE:
                if self.leader:
                    self._balance.begin(now) if self.settled else self._balance.again(now)
            case Timer.MOVE:
                pass  # `step` looks at all moves
            case Timer.BOOKS:
                if self.leader and self._awaited:
                    # Jobs of lost hosts do not wait for it: what streams and hosts said must do, and is compared later.
                    log.info("the controller's books are late", extra={"missing": sorted(self._awaited)})
                    self._awaited.clear()
            case Timer.SWEEP:
                self._sweep(now)
            case _:
                assert_never(kind)

    def _sweep(self, now: datetime) -> None:
        self.world.prune(now)
        self._desk.prune()
        self._formations.prune()
        self._restarts.prune()
        self._balance.prune(now)
        if self.leader:
            self._desk.mark_all()
        self._desk.arm(now + SWEEP_EVERY, Timer.SWEEP)
