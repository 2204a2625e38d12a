"""The volumes of apps: which there are, which job has which, and which are not to be used again."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from flynn.scheduler.desk import Desk
from flynn.scheduler.events import PersistVolume, VolumesListed
from flynn.scheduler.model import Job, Volume, VolumeID, VolumeState


class VolumeBook:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._world = desk.world

    def listed(self, event: VolumesListed) -> None:
        """Take in what a host has. What it had and does not list any more is gone for good."""
        listed = {volume.id for volume in event.volumes}
        holders = {id: job.id for job in self._world.jobs_on(event.host) if job.state.on_host for id in job.volumes}
        changed = False
        for volume in event.volumes:
            known = self._world.volumes.get(volume.id)
            if known is None:
                self.put(replace(volume, job=holders.get(volume.id)))
                changed = True
            elif known.state is VolumeState.PENDING:
                self.put(replace(known, state=VolumeState.CREATED, created_at=volume.created_at))
        for gone in [v for v in self._world.volumes_on(event.host) if v.id not in listed]:
            if gone.state is VolumeState.CREATED and (gone.created_at is None or gone.created_at < event.asked_at):
                self.put(replace(gone, state=VolumeState.DESTROYED))
                changed = True
        if changed:
            self._desk.unblock()

    def recorded(self, record: Volume) -> None:
        """Take in what the controller's books say: that it exists, on a host that is away, or is not to be used again.

        What hosts say of their volumes they know better.
        """
        known = self._world.volumes.get(record.id)
        if known is not None:
            if record.decommissioned and not known.decommissioned:
                self._world.put_volume(replace(known, decommissioned=True))
                self._desk.unblock()
        elif record.state is VolumeState.CREATED and (record.decommissioned or record.host not in self._world.hosts):
            self._world.put_volume(replace(record, job=None))

    def put(self, volume: Volume) -> None:
        self._world.put_volume(volume)
        if self._desk.leader:
            self._desk.ask(PersistVolume(volume))

    def created(self, id: VolumeID, now: datetime) -> None:
        volume = self._world.volumes.get(id)
        if volume is not None and volume.state is VolumeState.PENDING:
            self.put(replace(volume, state=VolumeState.CREATED, created_at=now))

    def taken(self, job: Job) -> None:
        """A host runs the job: it has its volumes."""
        for id in job.volumes:
            volume = self._world.volumes.get(id)
            if volume is not None and volume.job != job.id:
                self.put(replace(volume, job=job.id, state=VolumeState.CREATED))

    def release(self, job: Job, now: datetime) -> None:
        """The job has ended: others may have its volumes, but for those that its host destroys now."""
        for volume in self._world.volumes_used(job.id):
            if volume.state is VolumeState.PENDING:
                self._world.drop_volume(volume.id)
            elif not volume.delete_on_stop:
                self.put(replace(volume, job=None, used_at=now))

    def forget_plans(self) -> None:
        """Volumes that were never asked for exist nowhere but here."""
        for volume in [v for v in self._world.volumes.values() if v.state is VolumeState.PENDING]:
            self._world.drop_volume(volume.id)
