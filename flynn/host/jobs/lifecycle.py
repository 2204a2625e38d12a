"""The life of a job as a state machine: what may happen in which state, and which event it makes. spec/host section 5.

    starting --launched--> running --ended--> done | crashed
    starting --ended-----> done | crashed          (it ran so briefly that nobody saw it running)
    starting --broken----> failed
    running  --broken----> failed                  (contact lost, container gone)
    starting --withdrawn-> done                    (stopped before there was a container)

Down states are final. One deviation from the original: a job killed by a signal it was not asked to die of has crashed,
with exit status 128 + n (the original called every death by signal, the OOM killer's included, a success).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from flynn.types.codec import replace
from flynn.types.host import ActiveJob, HostJob, JobEventKind, JobStatus


@dataclass(frozen=True, slots=True)
class AddressAssigned:
    """The job got its address, and with it the environment that depends on it."""

    job: HostJob
    ip: str


@dataclass(frozen=True, slots=True)
class ContainerMade:
    """There is a container (not yet running the job)."""

    pid: int


@dataclass(frozen=True, slots=True)
class Launched:
    """The job's process runs."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The job's process ended with `code` (128 + n when killed by signal n); `reason` is what its user should know."""

    code: int
    signal: int = 0
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Broken:
    """The job could not be started, or its container is lost."""

    error: str


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Somebody wants the job to end; from now on its death is no crash."""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The job was stopped before there was a container."""


Happening = AddressAssigned | ContainerMade | Launched | Ended | Broken | StopAsked | Withdrawn


class ImpossibleTransition(Exception):
    """A bug: the named thing cannot happen to a job in its state."""


def created(job: HostJob, host_id: str, now: datetime) -> ActiveJob:
    """Return the record of a job just accepted."""
    return ActiveJob(job=job, host_id=host_id, created_at=now)


def advance(job: ActiveJob, happening: Happening, now: datetime) -> tuple[ActiveJob, JobEventKind | None]:
    """Apply one happening: the new record, and the event to publish if it changes what others may see.

    Raises:
        ImpossibleTransition: the happening does not belong to the job's state.
    """
    starting, running = job.status == JobStatus.STARTING, job.status == JobStatus.RUNNING
    match happening:
        case AddressAssigned(changed, ip) if starting:
            return replace(job, job=changed, internal_ip=ip), None
        case ContainerMade(pid) if starting:
            return replace(job, pid=pid), None
        case Launched() if starting:
            return replace(job, status=JobStatus.RUNNING, started_at=now), JobEventKind.START
        case StopAsked() if starting or running:
            return replace(job, force_stop=True), None
        case Withdrawn() if starting:
            gone = replace(job, status=JobStatus.DONE, force_stop=True, exit_status=0, ended_at=now, pid=None)
            return gone, JobEventKind.STOP
        case Ended(code, signal, reason) if starting or running:
            fine = code == 0 or (signal != 0 and job.force_stop)
            status = JobStatus.DONE if fine else JobStatus.CRASHED
            error = None if fine else reason
            ended = replace(job, status=status, exit_status=code, error=error, ended_at=now, pid=None)
            return ended, JobEventKind.STOP
        case Broken(error) if starting or running:
            return replace(job, status=JobStatus.FAILED, error=error, ended_at=now, pid=None), JobEventKind.ERROR
        case _:
            raise ImpossibleTransition(f"{happening} of job {job.job.id}, which is {job.status.name.lower()}")
