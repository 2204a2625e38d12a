"""The scheduler's view of the cluster: hosts, jobs, formations and volumes as immutable values.

Wire types stop at `loop.py`; in here a host is an id with tags, a job has one of six states, and nothing does I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple, NewType

from flynn.types.app import App, Strategy
from flynn.types.artifact import Artifact
from flynn.types.formation import ScaleRequest
from flynn.types.release import ProcessType, Release, VolumeReq
from flynn.types.resources import DEFAULTS

HostID = NewType("HostID", str)
JobID = NewType("JobID", str)  # the UUID; a host calls the job `<host id>-<uuid>`
VolumeID = NewType("VolumeID", str)
RouterID = NewType("RouterID", str)
Tags = Mapping[str, str]

DEFAULT_MEMORY = DEFAULTS["memory"].request or 0  # bytes
LONG_AGO = datetime.min.replace(tzinfo=UTC)


class HostPort(NamedTuple):
    port: int
    proto: str

    def __str__(self) -> str:
        return f"{self.port}/{self.proto}"


class FormationKey(NamedTuple):
    app: str
    release: str

    def __str__(self) -> str:
        return f"{self.app}:{self.release}"


class JobState(StrEnum):
    PENDING = "pending"  # created, being placed and started, or waiting for its restart time
    BLOCKED = "blocked"  # no host fits it now
    STARTING = "starting"  # its host runs it, its service is not up yet
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"

    @property
    def counts(self) -> bool:
        """Whether a job in this state is one of those its formation asked for."""
        return self in _COUNTING

    @property
    def on_host(self) -> bool:
        """Whether its host has said that it runs it, and nobody has asked for its end."""
        return self in (JobState.STARTING, JobState.RUNNING)


WIRE_STATE = {
    JobState.PENDING: "pending",
    JobState.BLOCKED: "blocked",
    JobState.STARTING: "starting",
    JobState.RUNNING: "up",
    JobState.STOPPING: "stopping",
    JobState.STOPPED: "down",
}
"""What the controller calls them."""

_COUNTING = frozenset((JobState.PENDING, JobState.BLOCKED, JobState.STARTING, JobState.RUNNING))


@dataclass(frozen=True, slots=True)
class Host:
    id: HostID
    tags: Tags = field(default_factory=dict)
    healthy: bool = True
    failed_checks: int = 0
    shutting_down: bool = False
    listed: bool = True  # discoverd has it
    memory: int = 0  # bytes; 0: not known
    steady_since: datetime = LONG_AGO  # when it was seen first, or was well again, as far as this scheduler has seen it

    @property
    def takes_jobs(self) -> bool:
        return self.healthy and self.listed and not self.shutting_down

    def holds(self, memory: int) -> bool:
        """Whether the host could give so much to one job if it had no other.

        The default holds on every host: nobody has asked for it, and a machine sold as one of 1 GiB has a little less.
        """
        return not self.memory or memory <= max(self.memory, DEFAULT_MEMORY)

    def fits(self, wanted: Tags) -> bool:
        """Whether the host carries all wanted tags; none wanted fits every host."""
        return not wanted or wanted.items() <= self.tags.items()


@dataclass(frozen=True, slots=True)
class Job:
    id: JobID
    app: str
    release: str
    type: str  # empty for a one-off
    state: JobState
    created_at: datetime
    in_formation: bool = True  # False: a one-off or unknown job, mirrored but never restarted or stopped
    host: HostID | None = None
    args: tuple[str, ...] = ()
    volumes: tuple[VolumeID, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict)
    memory: int = 0  # bytes it asks for
    restarts: int = 0
    attempts: int = 0  # failed start requests so far
    run_at: datetime | None = None  # not to be started before
    avoid: HostID | None = None  # the host that refused it last
    started_at: datetime | None = None  # as its host reports
    ended_at: datetime | None = None  # its host said it ended; absent if it was merely lost
    exit_status: int | None = None
    host_error: str | None = None
    touched_at: datetime | None = None  # last placement or report; listings older than this say nothing about it
    reason: str = ""  # why it is blocked, or was stopped

    @property
    def key(self) -> FormationKey:
        return FormationKey(self.app, self.release)

    @property
    def cluster_id(self) -> str:
        return f"{self.host}-{self.id}" if self.host else ""

    @property
    def last_news(self) -> datetime:
        """A listing that was asked for earlier says nothing about the job."""
        return self.touched_at or self.created_at

    @property
    def age_mark(self) -> datetime:
        """What "newest" is judged by."""
        return self.started_at or self.created_at


@dataclass(frozen=True, slots=True)
class Formation:
    """How many jobs of each type one release of one app is to have."""

    app: App
    release: Release
    artifacts: tuple[Artifact, ...] = ()
    wanted: Mapping[str, int] = field(default_factory=dict)  # as asked for; per host for omni types
    tags: Mapping[str, Tags] = field(default_factory=dict)
    updated_at: datetime | None = None
    scale_request: ScaleRequest | None = None  # the pending one

    @property
    def key(self) -> FormationKey:
        return FormationKey(self.app.id, self.release.id)

    @property
    def active(self) -> bool:
        return any(count > 0 for count in self.wanted.values())

    @property
    def hands_over(self) -> bool:
        """Whether a job gives its place on a host, and its data, to its successor while both run."""
        return self.app.strategy == Strategy.DISCOVERD_META

    @property
    def services(self) -> frozenset[str]:
        return frozenset(process.service for process in self.release.processes.values() if process.service)

    def process(self, type: str) -> ProcessType:
        return self.release.processes.get(type) or ProcessType()

    def volume_requests(self, type: str) -> tuple[VolumeReq, ...]:
        process = self.process(type)
        if process.volumes:
            return tuple(process.volumes)
        return (VolumeReq(path="/data"),) if process.data else ()

    def memory_of(self, type: str) -> int:
        """How much memory a job of the type asks for, in bytes; 0 for one that does not say."""
        asked = self.process(type).resources.get("memory")
        return asked.request or 0 if asked is not None else 0

    def host_ports(self, type: str) -> frozenset[HostPort]:
        """The ports a job of the type takes of its host: two such jobs cannot run on one."""
        process = self.process(type)
        if not process.host_network:
            return frozenset()
        return frozenset(HostPort(port.port, port.proto or "tcp") for port in process.ports if port.port)

    def tags_of(self, type: str) -> Tags:
        return self.tags.get(type) or {}

    def targets(self, hosts: Iterable[Host]) -> dict[str, int]:
        """The number of jobs wanted of each type; an omni type wants its count on every host it fits.

        Judged by the count asked for, so that a moment without hosts does not turn an omni type off for good.
        """
        targets = {}
        for type, count in self.wanted.items():
            if not type:
                continue
            if count > 0 and self.process(type).omni:
                tags = self.tags_of(type)
                count *= sum(1 for host in hosts if not host.shutting_down and host.fits(tags))
            targets[type] = max(count, 0)
        return targets


class VolumeState(StrEnum):
    PENDING = "pending"
    CREATED = "created"
    DESTROYED = "destroyed"


@dataclass(frozen=True, slots=True)
class Volume:
    id: VolumeID
    host: HostID
    app: str
    release: str
    type: str
    path: str
    delete_on_stop: bool = False
    size: int = 0  # bytes it is limited to when it is made; 0 = not by us
    state: VolumeState = VolumeState.PENDING
    job: JobID | None = None
    decommissioned: bool = False
    created_at: datetime | None = None
    used_at: datetime | None = None  # when the last job that had it ended, as far as this scheduler has seen it

    @property
    def reusable(self) -> bool:
        return self.job is None and self.shareable

    @property
    def shareable(self) -> bool:
        """Whether a job may have it beside the one that does, if both know how to hand it over."""
        return self.state is VolumeState.CREATED and not self.decommissioned
