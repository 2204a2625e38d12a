"""The states of one job: which events move it where, and what has to be done about it.

`advance` is total: every event may arrive in every state, late, twice or out of order, and what makes no sense any
more leaves the job as it is. Moves that can happen at all are listed in `MOVES`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import assert_never

from flynn.scheduler.model import HostID, Job, JobID, JobState, VolumeID

MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.PENDING: frozenset(
        (JobState.BLOCKED, JobState.STARTING, JobState.RUNNING, JobState.STOPPING, JobState.STOPPED)
    ),
    JobState.BLOCKED: frozenset((JobState.PENDING, JobState.STARTING, JobState.RUNNING, JobState.STOPPED)),
    JobState.STARTING: frozenset((JobState.RUNNING, JobState.STOPPING, JobState.STOPPED)),
    JobState.RUNNING: frozenset((JobState.STOPPING, JobState.STOPPED)),
    JobState.STOPPING: frozenset((JobState.STOPPED,)),
    # A job that was written off together with its host, or that its host has started again after a reboot.
    JobState.STOPPED: frozenset((JobState.STARTING, JobState.RUNNING)),
}
"""Every other change of state is a bug."""

START_RETRY_STEP = timedelta(milliseconds=500)  # times the number of failures so far
START_RETRY_LIMIT = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class Placed:
    """A host was chosen; the request to start goes out next."""

    host: HostID
    volumes: tuple[VolumeID, ...]
    at: datetime


@dataclass(frozen=True, slots=True)
class NoPlace:
    """No host fits it now."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unblocked:
    """A host came or changed: worth another try."""


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The host did not take it, or did not answer."""

    host: HostID
    error: str
    at: datetime


@dataclass(frozen=True, slots=True)
class HostStarting:
    host: HostID
    at: datetime


@dataclass(frozen=True, slots=True)
class HostRunning:
    """The host runs it. `ready` is False while the service that its type names does not list it yet."""

    host: HostID
    started_at: datetime | None
    ready: bool
    at: datetime


@dataclass(frozen=True, slots=True)
class HostEnded:
    host: HostID
    started_at: datetime | None  # of the run that ended
    ended_at: datetime | None
    exit_status: int | None
    error: str | None
    at: datetime


@dataclass(frozen=True, slots=True)
class Ready:
    """Its service lists it, and the routers have it."""


@dataclass(frozen=True, slots=True)
class StopWanted:
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """Its host is gone, or does not know it."""

    reason: str
    at: datetime


Event = Placed | NoPlace | Unblocked | StartFailed | HostStarting | HostRunning | HostEnded | Ready | StopWanted | Lost


@dataclass(frozen=True, slots=True)
class Persist:
    """Tell the controller."""

    job: Job


@dataclass(frozen=True, slots=True)
class StopOnHost:
    """Ask a host to stop a job; after taking it out of service where it serves."""

    host: HostID
    job: JobID


Action = Persist | StopOnHost


def advance(job: Job, event: Event) -> tuple[Job, tuple[Action, ...]]:
    """Apply one event to one job: the new job, and what the shell has to do about it."""
    match event:
        case Placed(host, volumes, at):
            if job.state is not JobState.PENDING:
                return job, ()
            placed = replace(job, host=host, volumes=volumes, touched_at=at, run_at=None, reason="")
            return placed, (Persist(placed),)
        case NoPlace(reason):
            if job.state is not JobState.PENDING:
                return job, ()
            blocked = replace(job, state=JobState.BLOCKED, host=None, volumes=(), reason=reason)
            # Tried again in vain, it is blocked as before: the controller knows that already.
            return blocked, (Persist(blocked),) if job.reason != reason or job.host is not None else ()
        case Unblocked():
            if job.state is not JobState.BLOCKED:
                return job, ()
            return replace(job, state=JobState.PENDING), ()
        case StartFailed(host, error, at):
            if job.state is not JobState.PENDING or job.host != host:
                return job, ()
            # The host stays recorded until the next placement: its report may still arrive and is then the truth.
            attempts = job.attempts + 1
            delay = min(START_RETRY_STEP * attempts, START_RETRY_LIMIT)
            reason = f"{host} did not take it: {error}"
            failed = replace(job, attempts=attempts, avoid=host, run_at=at + delay, touched_at=at, reason=reason)
            return failed, (Persist(failed),) if reason != job.reason else ()
        case HostStarting() | HostRunning():
            return _host_has(job, event)
        case HostEnded():
            return _host_ended(job, event)
        case Ready():
            if job.state not in (JobState.PENDING, JobState.STARTING) or job.host is None:
                return job, ()
            return _moved(replace(job, state=JobState.RUNNING), job)
        case StopWanted(reason):
            return _stop(job, reason)
        case Lost(reason, at):
            if job.state is JobState.STOPPED:
                return job, ()
            return _moved(replace(job, state=JobState.STOPPED, reason=reason, touched_at=at), job)
        case _:
            assert_never(event)


def _host_has(job: Job, event: HostStarting | HostRunning) -> tuple[Job, tuple[Action, ...]]:
    if job.host is not None and event.host != job.host:
        # A start that seemed to fail took effect after all, and the job has been placed elsewhere since.
        return job, (StopOnHost(event.host, job.id),)
    started_at = event.started_at if isinstance(event, HostRunning) else None
    if job.state is JobState.STOPPED and job.ended_at is not None and (not started_at or started_at <= job.ended_at):
        return job, ()  # a report older than the end of this very run
    job_now = replace(job, host=event.host, touched_at=event.at, reason="", avoid=None)
    if isinstance(event, HostRunning):
        job_now = replace(job_now, started_at=started_at or job.started_at, ended_at=None, exit_status=None)
    if job.state is JobState.STOPPING:
        return replace(job_now, reason=job.reason), ()
    if isinstance(event, HostRunning) and event.ready:
        return _moved(replace(job_now, state=JobState.RUNNING), job)
    if job.state is JobState.RUNNING:
        return job_now, ()  # a report never moves a job backwards
    return _moved(replace(job_now, state=JobState.STARTING), job)


def _host_ended(job: Job, event: HostEnded) -> tuple[Job, tuple[Action, ...]]:
    if job.host is not None and event.host != job.host:
        return job, ()  # the leftover of a failed start is gone
    if event.started_at and job.started_at and event.started_at < job.started_at:
        return job, ()  # an earlier run of a job that its host has started again
    ended = replace(
        job,
        host=event.host,
        state=JobState.STOPPED,
        started_at=event.started_at or job.started_at,
        ended_at=event.ended_at or event.at,
        exit_status=event.exit_status,
        host_error=event.error,
        touched_at=event.at,
    )
    return _moved(ended, job)


def _stop(job: Job, reason: str) -> tuple[Job, tuple[Action, ...]]:
    requested = job.state is JobState.PENDING and job.host is not None and job.run_at is None
    match job.state:
        case JobState.STOPPED | JobState.STOPPING:
            return job, ()
        case JobState.PENDING | JobState.BLOCKED if not requested:
            # No request is under way. One that only seemed to fail may still take effect: the host's report then
            # revives the job, and as surplus it is stopped properly.
            return _moved(replace(job, state=JobState.STOPPED, run_at=None, reason=reason), job)
        case _:
            assert job.host is not None
            stopping = replace(job, state=JobState.STOPPING, reason=reason)
            return stopping, (Persist(stopping), StopOnHost(job.host, job.id))


def _moved(after: Job, before: Job) -> tuple[Job, tuple[Action, ...]]:
    """Persist what changed state, and nothing else."""
    return after, (Persist(after),) if after.state is not before.state else ()
