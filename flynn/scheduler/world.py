"""Everything the scheduler knows, indexed so that no decision scans all jobs. Plain memory, one owner: the engine."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from datetime import datetime, timedelta

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

KEEP_STOPPED = timedelta(minutes=10)  # for late reports and for /debug/state; hosts list ended jobs again at a restart


class World:
    def __init__(self) -> None:
        self.hosts: dict[HostID, Host] = {}
        self.jobs: dict[JobID, Job] = {}
        self.formations: dict[FormationKey, Formation] = {}
        self.volumes: dict[VolumeID, Volume] = {}
        self.reserved: Counter[HostID] = Counter()  # bytes of memory that the jobs of a host ask for
        self._jobs_of: dict[FormationKey, dict[JobID, Job]] = defaultdict(dict)
        self._jobs_on: dict[HostID, dict[JobID, None]] = defaultdict(dict)  # dicts where sets would do: order is kept
        self._volumes_of: dict[tuple[str, str], dict[VolumeID, Volume]] = defaultdict(dict)
        self._volumes_on: dict[HostID, dict[VolumeID, None]] = defaultdict(dict)
        self._volumes_used: dict[JobID, dict[VolumeID, None]] = defaultdict(dict)

    def put_job(self, job: Job) -> None:
        before = self.jobs.get(job.id)
        if before is not None and before.host is not None and before.host != job.host:
            self._jobs_on[before.host].pop(job.id, None)
        if job.host is not None:
            self._jobs_on[job.host][job.id] = None
        self._reserve(before, -1)
        self._reserve(job, 1)
        self.jobs[job.id] = job
        self._jobs_of[job.key][job.id] = job

    def drop_job(self, id: JobID) -> None:
        job = self.jobs.pop(id)
        self._reserve(job, -1)
        self._jobs_of[job.key].pop(id, None)
        if job.host is not None:
            self._jobs_on[job.host].pop(id, None)

    def _reserve(self, job: Job | None, sign: int) -> None:
        if job is not None and job.host is not None and job.state.counts:
            self.reserved[job.host] += sign * job.memory

    def jobs_of(self, key: FormationKey) -> Collection[Job]:
        return self._jobs_of[key].values() if key in self._jobs_of else ()

    def jobs_on(self, host: HostID) -> list[Job]:
        return [self.jobs[id] for id in self._jobs_on.get(host, ())]

    def put_volume(self, volume: Volume) -> None:
        before = self.volumes.get(volume.id)
        if before is not None and before.job is not None:
            self._volumes_used[before.job].pop(volume.id, None)
        if volume.job is not None:
            self._volumes_used[volume.job][volume.id] = None
        self.volumes[volume.id] = volume
        self._volumes_of[volume.app, volume.type][volume.id] = volume
        self._volumes_on[volume.host][volume.id] = None  # a volume never moves

    def drop_volume(self, id: VolumeID) -> None:
        volume = self.volumes.pop(id)
        self._volumes_of[volume.app, volume.type].pop(id, None)
        self._volumes_on[volume.host].pop(id, None)
        if volume.job is not None:
            self._volumes_used[volume.job].pop(id, None)

    def volumes_of(self, formation: Formation, type: str) -> list[Volume]:
        """Return the volumes that jobs of a type may take over, the one whose data is the latest first."""
        known = self._volumes_of.get((formation.app.id, type), {}).values()
        mine = (v for v in known if formation.app.keeps_volumes or v.release == formation.release.id)
        return sorted(mine, key=_latest_first)

    def volumes_on(self, host: HostID) -> list[Volume]:
        return [self.volumes[id] for id in self._volumes_on.get(host, ())]

    def volumes_used(self, job: JobID) -> list[Volume]:
        return [self.volumes[id] for id in self._volumes_used.get(job, ())]

    def leaving(self, app: str, type: str) -> list[Job]:
        """Return the jobs of one type of an app, of whatever release, that have been asked to stop and still run."""
        return [
            job
            for key in self.formations
            if key.app == app
            for job in self.jobs_of(key)
            if job.type == type and job.state is JobState.STOPPING
        ]

    def prune(self, now: datetime) -> None:
        """Forget jobs that ended long ago, and formations that want nothing and have nothing."""
        old = [
            job.id
            for job in self.jobs.values()
            if job.state is JobState.STOPPED and (job.touched_at or job.created_at) < now - KEEP_STOPPED
        ]
        for id in old:
            self.drop_job(id)
            self._volumes_used.pop(id, None)
        for key in [key for key, jobs in self._jobs_of.items() if not jobs]:
            del self._jobs_of[key]
        for volume in [v for v in self.volumes.values() if v.state is VolumeState.DESTROYED]:
            self.drop_volume(volume.id)
        self._forget(key for key, formation in self.formations.items() if not formation.active)

    def _forget(self, idle: Iterable[FormationKey]) -> None:
        for key in list(idle):
            if not self._jobs_of.get(key) and self.formations[key].scale_request is None:
                del self.formations[key]


def _latest_first(volume: Volume) -> tuple[bool, float]:
    """By when it was last in use. Of those not used in our time the oldest comes first: a second one is an accident."""
    if volume.used_at is not None:
        return False, -volume.used_at.timestamp()
    return True, volume.created_at.timestamp() if volume.created_at is not None else 0
