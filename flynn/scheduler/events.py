"""What the engine is told, and what it asks for: two closed unions of plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from flynn.scheduler.model import Formation, FormationKey, HostID, Job, JobID, RouterID, Tags, Volume, VolumeID
from flynn.types.formation import ScaleRequest
from flynn.types.host import JobStatus

# What the shell tells the engine.


@dataclass(frozen=True, slots=True)
class LeadershipChanged:
    leader: bool


@dataclass(frozen=True, slots=True)
class Overruled:
    """A host takes its orders from a later leader, whatever the directory says here."""


@dataclass(frozen=True, slots=True)
class HostSeen:
    """discoverd lists the host, with these tags."""

    host: HostID
    tags: Tags
    shutting_down: bool = False


@dataclass(frozen=True, slots=True)
class HostDescribed:
    """What the host says of itself."""

    host: HostID
    memory: int  # bytes; 0: it does not say


@dataclass(frozen=True, slots=True)
class HostGone:
    """discoverd does not list it any more."""

    host: HostID


@dataclass(frozen=True, slots=True)
class HostChecked:
    host: HostID
    alive: bool


@dataclass(frozen=True, slots=True)
class JobReport:
    """One job as its host knows it."""

    host: HostID
    id: JobID
    app: str
    release: str
    type: str
    in_formation: bool
    status: JobStatus
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    args: tuple[str, ...] = ()
    volumes: tuple[VolumeID, ...] = ()
    meta: Mapping[str, str] | None = None
    exit_status: int | None = None
    error: str | None = None
    memory: int = 0  # bytes it asks for
    resurrected: bool = False  # it ended, and its host brings it back by itself, as another job


@dataclass(frozen=True, slots=True)
class JobReported:
    report: JobReport


@dataclass(frozen=True, slots=True)
class JobsListed:
    """All jobs of a host, as asked for at `asked_at`."""

    host: HostID
    reports: tuple[JobReport, ...]
    asked_at: datetime


@dataclass(frozen=True, slots=True)
class ListingFailed:
    """A host did not answer the request for its jobs."""

    host: HostID


@dataclass(frozen=True, slots=True)
class VolumesListed:
    host: HostID
    volumes: tuple[Volume, ...]
    asked_at: datetime


@dataclass(frozen=True, slots=True)
class VolumeRecorded:
    """What the controller has in its books of a volume: the only trace of it while its host is away."""

    volume: Volume


@dataclass(frozen=True, slots=True)
class VolumesRecorded:
    """All volumes in the controller's books have been told."""


@dataclass(frozen=True, slots=True)
class FormationReceived:
    formation: Formation


@dataclass(frozen=True, slots=True)
class FormationsListed:
    """All formations that want jobs, as asked for at `asked_at`; any other is to have none."""

    formations: tuple[Formation, ...]
    asked_at: datetime


@dataclass(frozen=True, slots=True)
class RecordedJob:
    """A job in the controller's books that is not down there."""

    id: JobID
    app: str
    release: str
    type: str
    state: str  # the controller's words
    host: HostID | None = None
    restarts: int = 0
    run_at: datetime | None = None
    args: tuple[str, ...] = ()
    changed_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class RecordsListed:
    jobs: tuple[RecordedJob, ...]
    asked_at: datetime
    untold: frozenset[JobID] = frozenset()  # of these the controller had yet to be told something when it was asked


@dataclass(frozen=True, slots=True)
class RecordsUnavailable:
    """The controller cannot be asked now: go on without."""


@dataclass(frozen=True, slots=True)
class ServiceListed:
    """All jobs that a service lists now."""

    service: str
    jobs: frozenset[JobID]


@dataclass(frozen=True, slots=True)
class StartDone:
    """The host took the job, or (`error`) did not."""

    job: JobID
    host: HostID
    volumes: tuple[VolumeID, ...] = ()  # created meanwhile
    error: str = ""


@dataclass(frozen=True, slots=True)
class StopDone:
    job: JobID
    host: HostID


@dataclass(frozen=True, slots=True)
class RouteSet:
    router: RouterID
    service: str


@dataclass(frozen=True, slots=True)
class RouteRemoved:
    router: RouterID
    service: str


@dataclass(frozen=True, slots=True)
class BackendUp:
    router: RouterID
    service: str
    job: JobID


@dataclass(frozen=True, slots=True)
class BackendDrained:
    router: RouterID
    job: JobID


@dataclass(frozen=True, slots=True)
class RouterGone:
    router: RouterID


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    LeadershipChanged
    | Overruled
    | HostSeen
    | HostDescribed
    | HostGone
    | HostChecked
    | JobReported
    | JobsListed
    | ListingFailed
    | VolumesListed
    | VolumeRecorded
    | VolumesRecorded
    | FormationReceived
    | FormationsListed
    | RecordsListed
    | RecordsUnavailable
    | ServiceListed
    | StartDone
    | StopDone
    | RouteSet
    | RouteRemoved
    | BackendUp
    | BackendDrained
    | RouterGone
    | Tick
)

# What the engine asks the shell to do.


@dataclass(frozen=True, slots=True)
class StartJob:
    """Create the volumes that do not exist yet, then ask the host to run the job. Answered by StartDone."""

    job: Job
    formation: Formation
    volumes: tuple[Volume, ...]


@dataclass(frozen=True, slots=True)
class StopJob:
    """Take the job out of service, wait until it is drained (bounded), stop it. Answered by StopDone."""

    job: JobID
    host: HostID
    serves: bool  # it may have requests under way
    carried: bool  # a router has said so, and will say when it is drained


@dataclass(frozen=True, slots=True)
class Drained:
    """No router has the job any more."""

    job: JobID


@dataclass(frozen=True, slots=True)
class PersistJob:
    job: Job


@dataclass(frozen=True, slots=True)
class PersistVolume:
    volume: Volume


@dataclass(frozen=True, slots=True)
class CompleteScaleRequest:
    """Tell the controller, after everything about the jobs of this formation that was to be told before."""

    key: FormationKey
    request: ScaleRequest


@dataclass(frozen=True, slots=True)
class FollowHost:
    """Open its event stream, then list its jobs and volumes."""

    host: HostID


@dataclass(frozen=True, slots=True)
class UnfollowHost:
    host: HostID


@dataclass(frozen=True, slots=True)
class CheckHost:
    """Ask the host for its status. Answered by HostChecked."""

    host: HostID


@dataclass(frozen=True, slots=True)
class WatchServices:
    """Follow exactly these services."""

    services: frozenset[str]


@dataclass(frozen=True, slots=True)
class Resync:
    """List everything anew: formations, jobs of all hosts, the controller's records."""


@dataclass(frozen=True, slots=True)
class DropPending:
    """Not the leader any more: what was still to be told or asked is the next leader's business."""


Action = (
    StartJob
    | StopJob
    | Drained
    | PersistJob
    | PersistVolume
    | CompleteScaleRequest
    | FollowHost
    | UnfollowHost
    | CheckHost
    | WatchServices
    | Resync
    | DropPending
)
