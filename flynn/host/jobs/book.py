"""The host's jobs: memory is the truth while the daemon runs, the state file is what the next one starts from.

Every change goes through `advance` (the rules), is written, and is then published; events reach every subscriber in the
order of the changes. The snapshot in an event is the record as of that change.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from flynn.aio.clock import Clock
from flynn.host import state
from flynn.host.jobs import admission, lifecycle, retention
from flynn.host.jobs.events import JobEvents
from flynn.host.state import Change, KeptJob, StateStore
from flynn.types.errors import NotFound, ServiceUnavailable
from flynn.types.host import ActiveJob, HostJob, JobEvent, JobEventKind


class JobBook:
    """All listed jobs. One per daemon; used from the event loop only."""

    def __init__(self, store: StateStore, clock: Clock, host_id: str) -> None:
        self._store, self._clock, self._host_id = store, clock, host_id
        self._jobs: dict[str, ActiveJob] = {}
        self._uncleaned: set[str] = set()
        self._unwritten: set[str] = set()  # changed while the disk refused writes; written with the next change
        self.events = JobEvents(clock.now())

    def restore(self) -> list[KeptJob]:
        """Load what the last daemon recorded; returns the jobs that need attention: not down, or not cleaned up."""
        kept = self._store.jobs()
        for item in kept:
            if item.listed or not item.cleaned:
                self._jobs[item.job.job.id] = item.job
            if not item.cleaned:
                self._uncleaned.add(item.job.job.id)
        return [item for item in kept if not item.job.status.down or not item.cleaned]

    @property
    def jobs(self) -> Mapping[str, ActiveJob]:
        """The listed jobs by id."""
        return MappingProxyType(self._jobs)

    def __getitem__(self, job_id: str) -> ActiveJob:
        """Return a listed job. Raises `NotFound`."""
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFound("host: unknown job") from None

    def find(self, job_id: str) -> ActiveJob:
        """Return a job, also a retired one. Raises `NotFound`."""
        job = self._jobs.get(job_id) or self._store.retired_job(job_id)
        if job is None:
            raise NotFound("host: unknown job")
        return job

    def check(self, job: HostJob) -> None:
        """Refuse a job that cannot be added; see `admission.check`."""
        admission.check(job, self._jobs)

    async def add(self, job: HostJob) -> ActiveJob:
        """Record a new job; on the disk when this returns.

        Raises:
            Conflict: see `admission.check`.
            ServiceUnavailable: the record could not be written; the job does not exist.
        """
        self.check(job)
        record = lifecycle.created(job, self._host_id, self._clock.now())
        self._jobs[job.id] = record  # at once, so that the id and the volumes are taken
        self._uncleaned.add(job.id)
        written = self._store.commit(state.save_job(record), durable=True)
        written.add_done_callback(lambda done: self._publish_if_written(done, JobEventKind.CREATE, record))
        try:
            await asyncio.shield(written)
        except sqlite3.Error as error:
            self._jobs.pop(job.id, None)
            self._uncleaned.discard(job.id)
            raise ServiceUnavailable(f"the job could not be recorded: {error}") from error
        return record

    def _publish_if_written(self, done: asyncio.Future[None], kind: JobEventKind, record: ActiveJob) -> None:
        if not done.cancelled() and done.exception() is None:
            self._publish(kind, record)

    async def apply(self, job_id: str, happening: lifecycle.Happening) -> ActiveJob:
        """Apply a happening to a job and wait until it is recorded and published."""
        record, written = self._apply(job_id, happening)
        await _settled(written)
        return record

    def note(self, job_id: str, happening: lifecycle.Happening) -> ActiveJob:
        """Like `apply`, without waiting for the record to be written."""
        return self._apply(job_id, happening)[0]

    async def written(self) -> None:
        """Wait until all that was noted so far is written, or has failed to be."""
        await _settled(self._store.commit())

    async def succeed(self, job_id: str, end: lifecycle.Happening, heir: HostJob) -> ActiveJob:
        """End a job and record its successor, in one transaction: either both are known or neither.

        Returns the successor. Its `create` event directly follows the predecessor's last event.
        """
        ended, kind = lifecycle.advance(self._jobs[job_id], end, self._clock.now())
        assert kind is not None and ended.status.down
        successor = lifecycle.created(heir, self._host_id, self._clock.now())
        self._jobs[job_id], self._jobs[heir.id] = ended, successor
        self._uncleaned.add(heir.id)
        written = self._commit(state.save_job(ended), state.save_job(successor), jobs=(job_id, heir.id), durable=True)
        written.add_done_callback(lambda _: self._publish(kind, ended))
        written.add_done_callback(lambda _: self._publish(JobEventKind.CREATE, successor))
        await _settled(written)
        return successor

    async def cleaned(self, job_id: str) -> None:
        """Record that nothing of a down job is left, publish `cleanup`, retire what is too old."""
        record = self._jobs[job_id]
        self._uncleaned.discard(job_id)
        changes: list[Change] = [state.save_job(record, cleaned=True)]
        for retired in retention.to_retire(job for key, job in self._jobs.items() if key not in self._uncleaned):
            changes.append(state.retire_job(retired))
            del self._jobs[retired]
        if len(changes) > 1:
            changes.append(state.forget_retired(retention.RETIRED_JOBS))
        written = self._commit(*changes, jobs=(job_id,))
        written.add_done_callback(lambda _: self._publish(JobEventKind.CLEANUP, record))
        await _settled(written)

    def _apply(self, job_id: str, happening: lifecycle.Happening) -> tuple[ActiveJob, asyncio.Future[None]]:
        record, kind = lifecycle.advance(self._jobs[job_id], happening, self._clock.now())
        self._jobs[job_id] = record
        written = self._commit(state.save_job(record), jobs=(job_id,))
        if kind is not None:
            written.add_done_callback(lambda _: self._publish(kind, record))
        return record, written

    def _commit(self, *changes: Change, jobs: Iterable[str], durable: bool = False) -> asyncio.Future[None]:
        """Write changes of existing jobs. A disk that refuses them does not stop jobs: they are tried again later."""
        overdue = [
            state.save_job(self._jobs[job_id], cleaned=job_id not in self._uncleaned)
            for job_id in self._unwritten
            if job_id in self._jobs
        ]
        waiting, touched = set(self._unwritten), set(jobs)
        written = self._store.commit(*overdue, *changes, durable=durable)

        def settle(done: asyncio.Future[None]) -> None:
            if not done.cancelled() and done.exception() is None:
                self._unwritten -= waiting
            else:
                self._unwritten |= touched

        written.add_done_callback(settle)
        return written

    def _publish(self, kind: JobEventKind, record: ActiveJob) -> None:
        self.events.publish(JobEvent(event=kind, job_id=record.job.id, job=record))


async def _settled(written: asyncio.Future[None]) -> None:
    """Wait until a write has ended either way; failures have been logged and are tried again with the next change."""
    try:
        await asyncio.shield(written)
    except sqlite3.Error:
        pass
