"""The decisions of one scheduler: events in, actions out. Synchronous, no I/O, no clock and no randomness of its own.

`step` takes a batch of events, updates the `World`, and answers with everything that follows from them. All rules
are level-triggered: a repeated, late or missed event does no harm, since the next listing says the same again.

Only a leader acts. Before it does after its promotion, it waits until formations, the jobs of every healthy host and
the controller's records have been listed: a decision on a half-known cluster would start everything twice.
"""

from __future__ import annotations

import heapq
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from random import Random
from typing import assert_never

from flynn.scheduler import formations, job_state, placement
from flynn.scheduler.events import (
    Action,
    BackendDrained,
    BackendUp,
    CheckHost,
    CompleteScaleRequest,
    Drained,
    DropPending,
    Event,
    FollowHost,
    FormationReceived,
    FormationsListed,
    HostChecked,
    HostGone,
    HostSeen,
    JobReport,
    JobReported,
    JobsListed,
    LeadershipChanged,
    ListingFailed,
    PersistJob,
    PersistVolume,
    RecordedJob,
    RecordsListed,
    RecordsUnavailable,
    Resync,
    RouteRemoved,
    RouterGone,
    RouteSet,
    ServiceListed,
    StartDone,
    StartJob,
    StopDone,
    StopJob,
    Tick,
    UnfollowHost,
    VolumeDecommissioned,
    VolumesListed,
    WatchServices,
)
from flynn.scheduler.model import (
    Formation,
    FormationKey,
    Host,
    HostID,
    Job,
    JobID,
    JobState,
    Volume,
    VolumeID,
    VolumeState,
)
from flynn.scheduler.reconcile import CompleteScale, Create, Restart, Stop, load_by_host, reconcile, restart_of
from flynn.scheduler.routers import RouterBoard
from flynn.scheduler.world import World
from flynn.types.app import Strategy
from flynn.types.host import JobStatus

log = logging.getLogger(__name__)

FAILED_CHECKS = 3  # in a row, when discoverd has given the host up as well: then its jobs are replaced
FAILED_CHECKS_LISTED = 30  # while discoverd still lists it: its daemon may just be restarting, and its jobs run on
CHECK_EVERY = timedelta(milliseconds=500)
ROUTER_PATIENCE = timedelta(seconds=10)  # so long a job in service waits for routers that have not picked it up
SWEEP_EVERY = timedelta(seconds=60)  # a full reconcile, so that no lost trigger leaves a formation wrong for good

RESURRECTION = timedelta(seconds=3)  # for a host to show the successor of a job that it brings back by itself

LEAVING_PAUSE = timedelta(milliseconds=200)  # between looks at whether the job to be waited for has ended
FAILED_STARTS = 5  # in a row; with one more a release of the platform's base is taken back, as the controller does
REPLACED_IN_PLACE = frozenset((Strategy.DISCOVERD_META, Strategy.SIRENIA))
ONE_AT_A_TIME = frozenset((Strategy.ONE_DOWN_ONE_UP, Strategy.DISCOVERD_META))

FORMATIONS = "formations"
RECORDS = "records"

WIRE_STATE = {
    JobState.PENDING: "pending",
    JobState.BLOCKED: "blocked",
    JobState.STARTING: "starting",
    JobState.RUNNING: "up",
    JobState.STOPPING: "stopping",
    JobState.STOPPED: "down",
}


class Engine:
    def __init__(self, random: Random, new_id: Callable[[], str]) -> None:
        self.world = World()
        self.leader: bool | None = None  # None: not known yet
        self.board = RouterBoard()
        self._random = random
        self._new_id = new_id
        self._out: list[Action] = []
        self._awaited: set[str] = set()  # what has to be listed before a new leader acts: see `_jobs_of`
        self._records: RecordsListed | None = None
        self._dirty: dict[FormationKey, None] = {}  # dicts where sets would do: decisions repeat exactly from a seed
        self._received_at: dict[FormationKey, datetime] = {}
        self._ended: dict[tuple[FormationKey, str], list[Restart]] = defaultdict(list)
        self._resurrecting: dict[tuple[FormationKey, str], list[datetime]] = {}  # until when successors are waited for
        self._to_place: dict[JobID, None] = {}
        self._blocked: dict[JobID, None] = {}
        self._starting: set[JobID] = set()  # start requests under way
        self._stopping: set[tuple[JobID, HostID]] = set()  # stop requests under way
        self._checking: set[HostID] = set()
        self._listed_in: dict[str, frozenset[JobID]] = {}  # service -> jobs it lists
        self._service_since: dict[JobID, datetime] = {}
        self._watched: frozenset[str] = frozenset()
        self._formations_changed = False
        self._failed_starts: Counter[tuple[FormationKey, str]] = Counter()  # in a row
        self._lowered: dict[tuple[FormationKey, str], int] = {}  # what a type had before it was scaled to nothing
        self._overruled: dict[FormationKey, datetime | None] = {}  # versions of formations that are not followed
        self._due: list[tuple[datetime, int, str, str]] = []
        self._timer_count = 0

    def step(self, events: Iterable[Event], now: datetime) -> list[Action]:
        """Take in events, then decide. Costs what has changed, not what is known."""
        for event in events:
            self._handle(event, now)
        self._fire_timers(now)
        if self._formations_changed:
            self._watch_services()
        if self.leader and not self._awaited:
            self._check_records(now)
            self._reconcile(now)
            self._place(now)
        actions, self._out = self._out, []
        return actions

    def next_due(self) -> datetime | None:
        """When to call `step` again even if nothing happens."""
        return self._due[0][0] if self._due else None

    @property
    def settled(self) -> bool:
        """Whether nothing is awaited: the leader acts."""
        return not self._awaited

    # Events

    def _handle(self, event: Event, now: datetime) -> None:
        match event:
            case LeadershipChanged(leader):
                self._lead(now) if leader else self._follow()
            case HostSeen():
                self._host_seen(event)
            case HostGone(host):
                self._host_gone(host, now)
            case HostChecked(host, alive):
                self._host_checked(host, alive, now)
            case JobReported(report):
                self._reported(report, now, listed=False)
            case JobsListed():
                self._jobs_listed(event, now)
            case ListingFailed(host):
                self._awaited.discard(_jobs_of(host))
                self._suspect(host)
            case VolumesListed():
                self._volumes_listed(event)
            case VolumeDecommissioned(volume):
                self._decommissioned(volume)
            case FormationReceived(formation):
                self._formation(formation, now)
            case FormationsListed():
                self._formations_listed(event, now)
            case RecordsListed():
                self._records = event
                self._awaited.discard(RECORDS)
            case RecordsUnavailable():
                # The controller itself may be what has to be started: what the streams said so far must do.
                self._awaited -= {RECORDS, FORMATIONS}
            case ServiceListed(service, jobs):
                self._service_listed(service, jobs, now)
            case StartDone():
                self._start_done(event, now)
            case StopDone(job, host):
                self._stopping.discard((job, host))
            case RouteSet(router, service):
                self.board.route_set(router, service)
            case RouteRemoved(router, service):
                self._out += [Drained(job) for job in self.board.route_removed(router, service)]
            case BackendUp(router, service, job):
                self.board.backend_up(router, service, job)
                self._check_ready(job, now)
            case BackendDrained(router, job):
                self._out += [Drained(job) for job in self.board.backend_drained(router, job)]
            case RouterGone(router):
                self._out += [Drained(job) for job in self.board.router_gone(router)]
            case Tick():
                pass
            case _:
                assert_never(event)

    # Leadership

    def _lead(self, now: datetime) -> None:
        if self.leader:
            return
        self.leader = True
        self._awaited |= {FORMATIONS, RECORDS} | {_jobs_of(host.id) for host in self.world.hosts.values()}
        self._dirty.update(dict.fromkeys(self.world.formations))
        self._after(SWEEP_EVERY, now, "sweep")
        self._out.append(Resync())
        log.info("leading", extra={"hosts": len(self.world.hosts), "formations": len(self.world.formations)})

    def _follow(self) -> None:
        if self.leader:
            log.info("not leading any more")
            self._out.append(DropPending())
            # Jobs without a host exist nowhere but here; the next leader makes its own.
            for job in [job for job in self.world.jobs.values() if job.state.counts and job.host is None]:
                self.world.drop_job(job.id)
            for volume in [v for v in self.world.volumes.values() if v.state is VolumeState.PENDING]:
                self.world.drop_volume(volume.id)
        self.leader = False
        self._records = None
        self._to_place.clear()
        self._blocked.clear()
        self._starting.clear()
        self._stopping.clear()
        self._ended.clear()
        self._resurrecting.clear()
        self._awaited -= {FORMATIONS, RECORDS}

    # Hosts

    def _host_seen(self, event: HostSeen) -> None:
        known = self.world.hosts.get(event.host)
        if known is None:
            if event.shutting_down:
                return
            self.world.hosts[event.host] = Host(event.host, dict(event.tags))
            self._awaited.add(_jobs_of(event.host))
            self._out.append(FollowHost(event.host))
            log.info("host up", extra={"host": event.host})
            self._hosts_changed()
            return
        host = replace(
            known,
            tags=dict(event.tags),
            shutting_down=event.shutting_down,
            healthy=True,
            failed_checks=0,
            listed=True,
        )
        self.world.hosts[event.host] = host
        if host.tags != known.tags:
            log.info("host tags changed", extra={"host": event.host, "from": known.tags, "to": host.tags})
        if host.tags != known.tags or host.shutting_down != known.shutting_down or not known.healthy:
            self._hosts_changed()

    def _hosts_changed(self) -> None:
        self._dirty.update(dict.fromkeys(self.world.formations))
        self._unblock()

    def _unblock(self) -> None:
        for id in list(self._blocked):
            self._blocked.pop(id, None)
            job = self.world.jobs.get(id)
            if job is not None and job.state is JobState.BLOCKED:
                unblocked, _ = job_state.advance(job, job_state.Unblocked())
                self.world.put_job(unblocked)
                self._to_place[id] = None

    def _host_gone(self, id: HostID, now: datetime) -> None:
        host = self.world.hosts.get(id)
        if host is None:
            return
        if host.shutting_down:
            self._unfollow(host, now)
        else:
            self.world.hosts[id] = replace(host, listed=False)
            self._suspect(id)

    def _suspect(self, id: HostID) -> None:
        """Begin to probe a host; while it is under suspicion already, the probes go on at their own pace."""
        host = self.world.hosts.get(id)
        if host is None or not host.healthy:
            return
        self.world.hosts[id] = replace(host, healthy=False)
        self._check(id)

    def _check(self, id: HostID) -> None:
        if id not in self._checking:
            self._checking.add(id)
            self._out.append(CheckHost(id))

    def _host_checked(self, id: HostID, alive: bool, now: datetime) -> None:
        self._checking.discard(id)
        host = self.world.hosts.get(id)
        if host is None or host.healthy:
            return
        if alive:
            self.world.hosts[id] = replace(host, healthy=True, failed_checks=0)
            self._hosts_changed()
            return
        failed = host.failed_checks + 1
        self.world.hosts[id] = replace(host, failed_checks=failed)
        if failed >= (FAILED_CHECKS_LISTED if host.listed else FAILED_CHECKS):
            self._unfollow(self.world.hosts[id], now)
        else:
            self._after(CHECK_EVERY, now, "check", id)

    def _unfollow(self, host: Host, now: datetime) -> None:
        log.warning("host lost", extra={"host": host.id, "jobs": len(self.world.jobs_on(host.id))})
        del self.world.hosts[host.id]
        self._awaited.discard(_jobs_of(host.id))
        self._out.append(UnfollowHost(host.id))
        for job in self.world.jobs_on(host.id):
            self._apply(job, job_state.Lost("its host is gone", now), now)
        self._hosts_changed()

    # Jobs

    def _apply(self, job: Job, event: job_state.Event, now: datetime, *, resurrected: bool = False) -> Job:
        """Advance a job, store it, and see to what follows from its new state.

        `resurrected`: its host brings it back by itself, as another job that will be reported next.
        """
        after, actions = job_state.advance(job, event)
        if after.state is not job.state and after.state not in job_state.MOVES[job.state]:
            raise RuntimeError(f"job {job.id} cannot go from {job.state} to {after.state} on {event}")
        if after is not job:
            self.world.put_job(after)
        if self.leader:
            for action in actions:
                match action:
                    case job_state.Persist(changed):
                        self._out.append(PersistJob(changed))
                    case job_state.StopOnHost(host, id):
                        self._stop(id, host)
        if after.state is not job.state:
            self._state_changed(job, after, now, resurrected)
        return after

    def _state_changed(self, before: Job, after: Job, now: datetime, resurrected: bool) -> None:
        if after.in_formation:
            self._dirty[after.key] = None
        if after.state is JobState.BLOCKED:
            self._blocked[after.id] = None
            log.info("job blocked", extra={"job": after.id, "type": after.type, "reason": after.reason})
        if after.state is JobState.STOPPED:
            self.board.forget(after.id)
            self._to_place.pop(after.id, None)
            self._release_volumes(after, now)
            if self.leader and before.state is not JobState.STOPPING and after.in_formation and before.host:
                self._ended[after.key, after.type].append(restart_of(after, now))
                if before.state is not JobState.RUNNING:
                    # Counted here: a job that its host brings back begins with a count of its own.
                    self._failed_starts[after.key, after.type] += 1
                    if self._failed_starts[after.key, after.type] > FAILED_STARTS:
                        self._take_back(after)
                if resurrected:
                    self._resurrecting.setdefault((after.key, after.type), []).append(now + RESURRECTION)
                    self._after(RESURRECTION, now, "successor missing")
            log.info(
                "job stopped",
                extra={"job": after.cluster_id or after.id, "exit_status": after.exit_status, "reason": after.reason},
            )
        elif after.state is JobState.RUNNING:
            self._failed_starts.pop((after.key, after.type), None)
            log.info("job up", extra={"job": after.cluster_id, "type": after.type})

    def _reported(self, report: JobReport, now: datetime, *, listed: bool) -> None:
        job = self.world.jobs.get(report.id)
        if job is None:
            job = _adopted(report)
            if report.status.down and listed:
                # Ended before our time. The controller is told only if its records still call it active.
                ended = replace(
                    job,
                    state=JobState.STOPPED,
                    ended_at=report.ended_at or now,
                    exit_status=report.exit_status,
                    host_error=report.error,
                    touched_at=now,
                )
                self.world.put_job(ended)
                return
            self.world.put_job(job)
            if awaited := self._resurrecting.get((job.key, job.type)):
                awaited.pop(0)
        host = report.host
        event: job_state.Event
        match report.status:
            case JobStatus.STARTING:
                event = job_state.HostStarting(host, now)
            case JobStatus.RUNNING:
                event = job_state.HostRunning(host, report.started_at, self._in_service(job, now), now)
            case _:
                event = job_state.HostEnded(
                    host, report.started_at, report.ended_at, report.exit_status, report.error, now
                )
        after = self._apply(job, event, now, resurrected=report.resurrected)
        if after.host != host:
            return
        if not report.status.down:
            if report.volumes and not after.volumes:
                after = replace(after, volumes=report.volumes)
                self.world.put_job(after)
            self._take_volumes(after)
            if after.state is JobState.STOPPING and self.leader:
                self._stop(after.id, host)

    def _jobs_listed(self, event: JobsListed, now: datetime) -> None:
        if event.host not in self.world.hosts:
            return
        self._awaited.discard(_jobs_of(event.host))
        listed = {report.id for report in event.reports}
        for report in event.reports:
            self._reported(report, now, listed=True)
        for job in self.world.jobs_on(event.host):
            if job.id in listed or job.id in self._starting or (job.touched_at or job.created_at) >= event.asked_at:
                continue
            if job.state in (JobState.STOPPED, JobState.BLOCKED):
                continue
            if job.state is JobState.PENDING and job.run_at is not None:
                continue  # refused once, and waiting for its next try
            self._apply(job, job_state.Lost("its host does not know it", now), now)

    def _stop(self, id: JobID, host: HostID) -> None:
        if (id, host) in self._stopping or host not in self.world.hosts:
            return
        job = self.world.jobs.get(id)
        formation = self.world.formations.get(job.key) if job is not None else None
        serves = formation is None or job is None or _serves(formation, job.type)
        self._stopping.add((id, host))
        self._out.append(StopJob(id, host, serves=serves, carried=self.board.carried(id)))
        log.info("stopping job", extra={"job": f"{host}-{id}", "reason": job.reason if job else ""})

    # Readiness

    def _service_of(self, job: Job) -> str:
        formation = self.world.formations.get(job.key) if job.in_formation else None
        return formation.process(job.type).service if formation is not None else ""

    def _in_service(self, job: Job, now: datetime) -> bool:
        service = self._service_of(job)
        if not service:
            return True
        since = self._service_since.get(job.id)
        if since is None:
            return False
        if self.board.everywhere(service, job.id) or now >= since + ROUTER_PATIENCE:
            return True
        self._at(since + ROUTER_PATIENCE, "ready", job.id)
        return False

    def _service_listed(self, service: str, jobs: frozenset[JobID], now: datetime) -> None:
        before = self._listed_in.get(service, frozenset())
        self._listed_in[service] = jobs
        for id in sorted(before - jobs):
            self._service_since.pop(id, None)
        for id in sorted(jobs - before):
            self._service_since[id] = now
        for id in sorted(jobs):
            self._check_ready(id, now)

    def _check_ready(self, id: JobID, now: datetime) -> None:
        job = self.world.jobs.get(id)
        if job is None or id not in self._service_since or job.state not in (JobState.PENDING, JobState.STARTING):
            return
        if self._service_of(job) and self._in_service(job, now):
            self._apply(job, job_state.Ready(), now)

    def _watch_services(self) -> None:
        self._formations_changed = False
        wanted = frozenset(
            service
            for formation in self.world.formations.values()
            if formation.active
            for service in formation.services
        )
        if wanted == self._watched:
            return
        for service in self._watched - wanted:
            for id in self._listed_in.pop(service, ()):
                self._service_since.pop(id, None)
        self._watched = wanted
        self._out.append(WatchServices(wanted))

    # Volumes

    def _volumes_listed(self, event: VolumesListed) -> None:
        listed = {volume.id for volume in event.volumes}
        holders = {id: job.id for job in self.world.jobs_on(event.host) if job.state.on_host for id in job.volumes}
        for volume in event.volumes:
            known = self.world.volumes.get(volume.id)
            if known is None:
                known = replace(volume, job=holders.get(volume.id))
                self._put_volume(known)
            elif known.state is VolumeState.PENDING:
                self._put_volume(replace(known, state=VolumeState.CREATED, created_at=volume.created_at))
        for gone in [v for v in self.world.volumes.values() if v.host == event.host and v.id not in listed]:
            if gone.state is VolumeState.CREATED and (gone.created_at is None or gone.created_at < event.asked_at):
                self._put_volume(replace(gone, state=VolumeState.DESTROYED))
        self._unblock()

    def _decommissioned(self, id: VolumeID) -> None:
        volume = self.world.volumes.get(id)
        if volume is not None and not volume.decommissioned:
            self.world.put_volume(replace(volume, decommissioned=True))
            self._unblock()

    def _put_volume(self, volume: Volume) -> None:
        self.world.put_volume(volume)
        if self.leader:
            self._out.append(PersistVolume(volume))

    def _take_volumes(self, job: Job) -> None:
        for id in job.volumes:
            volume = self.world.volumes.get(id)
            if volume is not None and volume.job != job.id:
                self._put_volume(replace(volume, job=job.id, state=VolumeState.CREATED))

    def _release_volumes(self, job: Job, now: datetime) -> None:
        for volume in self.world.volumes_used(job.id):
            if volume.state is VolumeState.PENDING:
                self.world.drop_volume(volume.id)
            elif not volume.delete_on_stop:
                self._put_volume(replace(volume, job=None, used_at=now))

    def _waits_for(self, formation: Formation, type: str, now: datetime) -> str:
        """Return what has to be gone before a job of this type may start; empty if nothing is in its way.

        A job on its way out, or one that its host is about to bring back, may hold data that are to be taken over: to
        start before would be to start with an empty volume. Or the app's strategy says that its jobs cannot run side
        by side.
        """
        alone = formation.app.strategy in ONE_AT_A_TIME
        takes_over = any(not request.delete_on_stop for request in formation.volume_requests(type))
        if not alone and not takes_over:
            return ""
        shared = alone or formation.app.keeps_volumes
        for job in self.world.leaving(formation.app.id, type):
            if alone or (job.volumes and (shared or job.release == formation.release.id)):
                return f"waits for {job.cluster_id} to end"
        for (key, name), awaited in self._resurrecting.items():
            same = key.app == formation.app.id and name == type and (shared or key == formation.key)
            if same and any(until > now for until in awaited):
                return f"waits for the job of release {key.release} that its host brings back"
        return ""

    # Formations

    def _take_back(self, job: Job) -> None:
        """Let the release before run again, where the platform's base was replaced by something that does not start.

        Whoever decides about deployments may need the very thing that is missing now: no database, no rollback. The
        worker comes to the same verdict from the same failures as soon as it can; until it has spoken the formations
        as they are in the database are not followed.
        """
        new = self.world.formations.get(job.key)
        if (
            new is None
            or not new.app.critical
            or new.app.strategy not in REPLACED_IN_PLACE
            or not new.wanted.get(job.type)
        ):
            return
        for old in [formation for formation in self.world.formations.values() if formation.app.id == job.app]:
            count = self._lowered.pop((old.key, job.type), 0)
            if not count or old.key == new.key or old.wanted.get(job.type):
                continue
            log.error(
                "release does not start, the one before runs again",
                extra={"app": new.app.name, "type": job.type, "release": new.release.id, "before": old.release.id},
            )
            for formation, wanted in ((new, 0), (old, count)):
                self._overruled[formation.key] = formation.updated_at
                self.world.formations[formation.key] = replace(
                    formation, wanted={**formation.wanted, job.type: wanted}, scale_request=None
                )
                self._dirty[formation.key] = None
            return

    def _formation(self, given: Formation, now: datetime) -> None:
        key = given.key
        self._received_at[key] = now
        if key in self._overruled:
            if given.updated_at == self._overruled[key]:
                return
            del self._overruled[key]
        stored = self.world.formations.get(key)
        match formations.accept(stored, given):
            case formations.Stale():
                return
            case formations.Accepted(formation, changed):
                for type, count in (stored.wanted if stored is not None else {}).items():
                    if count and not formation.wanted.get(type):
                        self._lowered[key, type] = count
                self.world.formations[key] = formation
                if changed:
                    self._dirty[key] = None
        self._formations_changed = True

    def _formations_listed(self, event: FormationsListed, now: datetime) -> None:
        self._awaited.discard(FORMATIONS)
        active = {formation.key for formation in event.formations}
        for formation in event.formations:
            self._formation(formation, now)
        for key, formation in list(self.world.formations.items()):
            known = key in active or key in self._overruled
            if not known and formation.active and self._received_at[key] < event.asked_at:
                self._formation(replace(formation, wanted={}, updated_at=formation.updated_at), now)

    # The controller's records

    def _check_records(self, now: datetime) -> None:
        if self._records is None:
            return
        event, self._records = self._records, None
        recorded = {record.id for record in event.jobs}
        for record in event.jobs:
            job = self.world.jobs.get(record.id)
            if job is None:
                self._unknown_record(record, now)
                continue
            if record.restarts > job.restarts:
                job = replace(job, restarts=record.restarts)
                self.world.put_job(job)
            # What changed while the answer was under way has been told since; an end may not have been, if it was
            # found in a listing, and can be told twice.
            settled = job.state is JobState.STOPPED or (job.touched_at or job.created_at) < event.asked_at
            if settled and record.state != WIRE_STATE[job.state]:
                self._out.append(PersistJob(job))
        for job in self.world.jobs.values():
            active = job.state is not JobState.STOPPED and job.state is not JobState.BLOCKED
            if active and job.id not in recorded and (job.touched_at or job.created_at) < event.asked_at:
                self._out.append(PersistJob(job))

    def _unknown_record(self, record: RecordedJob, now: datetime) -> None:
        key = FormationKey(record.app, record.release)
        job = Job(
            id=record.id,
            app=record.app,
            release=record.release,
            type=record.type,
            state=JobState.STOPPED,
            created_at=now,
            host=record.host,
            args=record.args,
            restarts=record.restarts,
            run_at=record.run_at,
            reason="unknown to all hosts",
            touched_at=now,
        )
        waits = record.state in ("pending", "blocked") and record.host is None
        if waits and record.type and key in self.world.formations:
            # Left behind by the leader before: it keeps its restart count and its waiting time.
            self.world.put_job(replace(job, state=JobState.PENDING, reason=""))
            self._to_place[job.id] = None
            self._dirty[key] = None
        else:
            self._out.append(PersistJob(job))

    # Decisions

    def _reconcile(self, now: datetime) -> None:
        # Stopping a job that never ran ends it at once, which marks its formation again: a second look then finds
        # its scale request fulfilled. A third one finds nothing new.
        for _ in range(3):
            dirty, self._dirty = self._dirty, {}
            self._reconcile_all(dirty, now)

    def _reconcile_all(self, keys: Iterable[FormationKey], now: datetime) -> None:
        for key in keys:
            formation = self.world.formations.get(key)
            if formation is None:
                continue
            for decision in reconcile(formation, self.world.jobs_of(key), self.world.hosts):
                match decision:
                    case Create(type, count):
                        awaited = [until for until in self._resurrecting.get((key, type), ()) if until > now]
                        self._create(formation, type, count - len(awaited), now)
                    case Stop(id, reason):
                        self._apply(self.world.jobs[id], job_state.StopWanted(reason), now)
                    case CompleteScale(request):
                        self._out.append(CompleteScaleRequest(key, request))
                        self.world.formations[key] = replace(formation, scale_request=None)
            for type in formation.release.processes:
                if (key, type) not in self._resurrecting:
                    self._ended.pop((key, type), None)  # what was not replaced now was not wanted any more

    def _create(self, formation: Formation, type: str, count: int, now: datetime) -> None:
        ended = self._ended.get((formation.key, type), [])
        args = tuple(formation.process(type).args)
        for index in range(count):
            restart = ended[index] if index < len(ended) else None
            run_at = now + restart.delay if restart is not None and restart.delay else None
            job = Job(
                id=JobID(self._new_id()),
                app=formation.app.id,
                release=formation.release.id,
                type=type,
                state=JobState.PENDING,
                created_at=now,
                args=args,
                restarts=restart.restarts if restart is not None else 0,
                run_at=run_at,
            )
            self.world.put_job(job)
            self._to_place[job.id] = None
            if run_at is not None:
                self._out.append(PersistJob(job))

    def _place(self, now: datetime) -> None:
        groups: dict[tuple[FormationKey, str], list[Job]] = defaultdict(list)
        for id in list(self._to_place):
            del self._to_place[id]
            job = self.world.jobs.get(id)
            if job is None or job.state is not JobState.PENDING or id in self._starting:
                continue
            if job.run_at is not None and job.run_at > now:
                self._at(job.run_at, "start", id)
                continue
            groups[job.key, job.type].append(job)
        if not groups:
            return
        hosts = list(self.world.hosts.values())
        self._random.shuffle(hosts)
        for (key, type), jobs in groups.items():
            formation = self.world.formations.get(key)
            if formation is not None:
                self._place_group(formation, type, jobs, hosts, now)

    def _place_group(self, formation: Formation, type: str, jobs: list[Job], hosts: list[Host], now: datetime) -> None:
        if reason := self._waits_for(formation, type, now):
            for job in jobs:
                self.world.put_job(replace(job, reason=reason))
                self._at(now + LEAVING_PAUSE, "start", job.id)
            return
        waiting = {job.id for job in jobs}
        load = load_by_host((job for job in self.world.jobs_of(formation.key) if job.id not in waiting), type)
        start = self._random.randrange(len(hosts)) if hosts else 0
        one_by_one = [job for job in jobs if job.avoid is not None] if not formation.volume_requests(type) else jobs
        for job in one_by_one:
            self._place_one(formation, job, hosts, start, load, now)
        together = [job for job in jobs if job.avoid is None] if one_by_one is not jobs else []
        if not together:
            return
        found = placement.spread(
            placement.rotated(hosts, start),
            load,
            formation.tags_of(type),
            len(together),
            prefer_healthy=not formation.process(type).omni,
        )
        if not found:
            reason = placement.NO_MATCH if hosts else placement.NO_HOSTS
            for job in together:
                self._apply(job, job_state.NoPlace(reason), now)
        for job, host in zip(together, found, strict=False):
            self._start(formation, job, placement.Chosen(host), now)

    def _place_one(
        self, formation: Formation, job: Job, hosts: list[Host], start: int, load: Counter[HostID], now: datetime
    ) -> None:
        # Volumes of an attempt that failed before they were created are forgotten; created ones are free to be taken.
        self._release_volumes(job, now)
        verdict = placement.place(
            formation,
            job.type,
            job.id,
            hosts,
            placement.rotated(hosts, start),
            load,
            self.world.volumes_of(formation, job.type),
            avoid=job.avoid,
            new_volume_id=lambda: VolumeID(self._new_id()),
        )
        match verdict:
            case placement.Refused(reason):
                self._apply(job, job_state.NoPlace(reason), now)
            case placement.Chosen():
                load[verdict.host.id] += 1
                self._start(formation, job, verdict, now)

    def _start(self, formation: Formation, job: Job, chosen: placement.Chosen, now: datetime) -> None:
        volumes = tuple(replace(volume, job=job.id) for volume in chosen.volumes)
        for volume in volumes:
            self._put_volume(volume)
        placed = self._apply(job, job_state.Placed(chosen.host.id, tuple(volume.id for volume in volumes), now), now)
        self._starting.add(job.id)
        self._out.append(StartJob(placed, formation, volumes))

    def _start_done(self, event: StartDone, now: datetime) -> None:
        self._starting.discard(event.job)
        for id in event.volumes:
            volume = self.world.volumes.get(id)
            if volume is not None and volume.state is VolumeState.PENDING:
                self._put_volume(replace(volume, state=VolumeState.CREATED, created_at=now))
        job = self.world.jobs.get(event.job)
        if job is None:
            return
        if not event.error:
            if job.state is JobState.PENDING and job.host == event.host:
                self.world.put_job(replace(job, touched_at=now))
            return
        attempt = job.attempts + 1
        log.warning(
            "start failed", extra={"job": f"{event.host}-{event.job}", "attempt": attempt, "error": event.error}
        )
        if self.leader:
            after = self._apply(job, job_state.StartFailed(event.host, now), now)
            if after.state is JobState.PENDING and after.run_at is not None:
                self._at(after.run_at, "start", after.id)

    # Timers

    def _after(self, delay: timedelta, now: datetime, kind: str, id: str = "") -> None:
        self._at(now + delay, kind, id)

    def _at(self, due: datetime, kind: str, id: str = "") -> None:
        self._timer_count += 1
        heapq.heappush(self._due, (due, self._timer_count, kind, id))

    def _fire_timers(self, now: datetime) -> None:
        while self._due and self._due[0][0] <= now:
            _, _, kind, id = heapq.heappop(self._due)
            match kind:
                case "start":
                    self._to_place[JobID(id)] = None
                case "ready":
                    self._check_ready(JobID(id), now)
                case "check":
                    host = self.world.hosts.get(HostID(id))
                    if host is not None and not host.healthy:
                        self._check(host.id)
                case "successor missing":
                    self._dirty.update(dict.fromkeys(key for key, _ in self._resurrecting))
                    left = {which: [u for u in until if u > now] for which, until in self._resurrecting.items()}
                    self._resurrecting = {which: until for which, until in left.items() if until}
                case "sweep":
                    self.world.prune(now)
                    self._dirty.update(dict.fromkeys(self.world.formations))
                    if self.leader:
                        self._after(SWEEP_EVERY, now, "sweep")
                case _:
                    raise RuntimeError(f"timer of unknown kind {kind!r}")


def _jobs_of(host: HostID) -> str:
    return f"jobs of {host}"


def _serves(formation: Formation, type: str) -> bool:
    process = formation.process(type)
    return bool(process.service) or any(port.service is not None for port in process.ports)


def _adopted(report: JobReport) -> Job:
    return Job(
        id=report.id,
        app=report.app,
        release=report.release,
        type=report.type,
        in_formation=report.in_formation,
        state=JobState.PENDING,
        host=report.host,
        created_at=report.created_at,
        started_at=report.started_at,
        args=report.args,
        volumes=report.volumes,
        meta=report.meta or {},
    )
