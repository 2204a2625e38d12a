"""What happens to jobs: what hosts report of them and what is decided about them, and all that follows from either."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import datetime

from flynn.scheduler import job_state
from flynn.scheduler.desk import Desk, Timer
from flynn.scheduler.events import JobReport, JobsListed, PersistJob, StopJob
from flynn.scheduler.formations import FormationBook
from flynn.scheduler.model import HostID, Job, JobID, JobState
from flynn.scheduler.readiness import Readiness
from flynn.scheduler.restarts import Restarts
from flynn.scheduler.volumes import VolumeBook
from flynn.types.host import JobStatus

log = logging.getLogger(__name__)


class JobBook:
    def __init__(
        self, desk: Desk, volumes: VolumeBook, readiness: Readiness, restarts: Restarts, formations: FormationBook
    ) -> None:
        self._desk = desk
        self._world = desk.world
        self._volumes = volumes
        self._readiness = readiness
        self._restarts = restarts
        self._formations = formations
        self._starting_since: dict[JobID, datetime] = {}
        self._stopping: set[tuple[JobID, HostID]] = set()  # stop requests under way

    def apply(self, job: Job, event: job_state.Event, now: datetime, *, resurrected: bool = False) -> Job:
        """Advance a job, store it, and see to what follows from its new state.

        `resurrected`: its host brings it back by itself, as another job that will be reported next.
        """
        after, actions = job_state.advance(job, event)
        if after.state is not job.state and after.state not in job_state.MOVES[job.state]:
            raise RuntimeError(f"job {job.id} cannot go from {job.state} to {after.state} on {event}")
        if after is not job:
            self._world.put_job(after)
        if self._desk.leader:
            for action in actions:
                match action:
                    case job_state.Persist(changed):
                        self._desk.ask(PersistJob(changed))
                    case job_state.StopOnHost(host, id):
                        self._stop(id, host)
        if after.state is not job.state:
            self._state_changed(job, after, now, resurrected)
        return after

    def _state_changed(self, before: Job, after: Job, now: datetime, resurrected: bool) -> None:
        if after.in_formation:
            self._desk.dirty[after.key] = None
        self._starting_since.pop(after.id, None)
        if after.state is JobState.STARTING:
            self._expect_service(after, now)
        elif after.state is JobState.BLOCKED:
            self._desk.blocked[after.id] = None
            log.info("job blocked", extra={"job": after.id, "type": after.type, "reason": after.reason})
        elif after.state is JobState.STOPPED:
            self._ended(before, after, now, resurrected)
        elif after.state is JobState.RUNNING:
            self._restarts.up(after)
            if before.state is not JobState.STOPPED:
                self._desk.counts["ups"] += 1
                self._desk.counts["up_seconds"] += (now - after.created_at).total_seconds()
            log.info("job up", extra={"job": after.cluster_id, "type": after.type})

    def _ended(self, before: Job, after: Job, now: datetime, resurrected: bool) -> None:
        self._readiness.board.forget(after.id)
        self._desk.to_place.pop(after.id, None)
        self._desk.blocked.pop(after.id, None)
        self._volumes.release(after, now)
        formation = self._world.formations.get(after.key)
        if formation is not None and formation.host_ports(after.type):
            self._desk.unblock()  # somebody may have waited for its ports
        unasked = before.state is not JobState.STOPPING and after.in_formation and before.host
        if self._desk.leader and unasked:
            self._desk.counts["ends"] += 1
            does_not_start = self._restarts.ended(after, before.state, now, resurrected=resurrected)
            if does_not_start:
                self._formations.take_back(after)
        log.info(
            "job stopped",
            extra={"job": after.cluster_id or after.id, "exit_status": after.exit_status, "reason": after.reason},
        )

    def reported(self, report: JobReport, now: datetime, *, listed: bool = False) -> None:
        """Take in what a host says of one job."""
        job = self._world.jobs.get(report.id)
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
                self._world.put_job(ended)
                return
            self._world.put_job(job)
            self._restarts.successor(job)
        host = report.host
        event: job_state.Event
        match report.status:
            case JobStatus.STARTING:
                event = job_state.HostStarting(host, now)
            case JobStatus.RUNNING:
                event = job_state.HostRunning(host, report.started_at, self._readiness.in_service(job, now), now)
            case _:
                event = job_state.HostEnded(
                    host, report.started_at, report.ended_at, report.exit_status, report.error, now
                )
        after = self.apply(job, event, now, resurrected=report.resurrected)
        if after.host == host and not report.status.down:
            self._runs(after, report)

    def _runs(self, job: Job, report: JobReport) -> None:
        if report.volumes and not job.volumes:
            job = replace(job, volumes=report.volumes)
            self._world.put_job(job)
        self._volumes.taken(job)
        if job.state is JobState.STOPPING and self._desk.leader:
            self._stop(job.id, report.host)

    def listed(self, event: JobsListed, now: datetime) -> None:
        """Take in what a host says of all its jobs; those it does not mention are not there any more."""
        listed = {report.id for report in event.reports}
        for report in event.reports:
            self.reported(report, now, listed=True)
        for job in self._world.jobs_on(event.host):
            if job.id in listed or job.id in self._desk.starting or job.last_news >= event.asked_at:
                continue
            if job.state in (JobState.STOPPED, JobState.BLOCKED):
                continue
            if job.state is JobState.PENDING and job.run_at is not None:
                continue  # refused once, and waiting for its next try
            self.apply(job, job_state.Lost("its host does not know it", now), now)

    def check_ready(self, id: JobID, now: datetime) -> None:
        """See whether a job that its host runs is in service by now."""
        job = self._readiness.became_ready(id, now)
        if job is not None:
            self.apply(job, job_state.Ready(), now)

    def _expect_service(self, job: Job, now: datetime) -> None:
        limit = self._readiness.start_limit(job)
        if limit is not None:
            self._starting_since[job.id] = now
            self._desk.at(now + limit, Timer.DEADLINE, job.id)

    def check_deadline(self, id: JobID, now: datetime) -> None:
        """Stop a job that has had its time to be in service, and have another one started."""
        job, since = self._world.jobs.get(id), self._starting_since.get(id)
        if job is None or since is None or not self._desk.leader:
            return
        limit = self._readiness.start_limit(job)
        if limit is None:
            return
        if not self._readiness.knows(job) or now < since + limit:
            self._desk.at(max(now, since) + limit, Timer.DEADLINE, id)
            return
        self._restarts.replace(job, now)
        self.apply(job, job_state.StopWanted(f"not in service after {limit.total_seconds():.0f} s"), now)

    def stop_done(self, id: JobID, host: HostID) -> None:
        """The request has been answered, or has failed; a report tells what came of it."""
        self._stopping.discard((id, host))

    def forget_requests(self) -> None:
        self._stopping.clear()

    def _stop(self, id: JobID, host: HostID) -> None:
        if (id, host) in self._stopping or host not in self._world.hosts:
            return
        job = self._world.jobs.get(id)
        self._stopping.add((id, host))
        self._desk.counts["stops"] += 1
        carried = self._readiness.board.carried(id)
        self._desk.ask(StopJob(id, host, serves=self._readiness.serves(job), carried=carried))
        log.info("stopping job", extra={"job": f"{host}-{id}", "reason": job.reason if job else ""})


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
        memory=report.memory,
    )
