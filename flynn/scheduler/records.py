"""The controller's books against what is known here: what it has to be told, and what earlier leaders left behind."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from flynn.scheduler.desk import Desk
from flynn.scheduler.events import PersistJob, RecordedJob, RecordsListed
from flynn.scheduler.model import WIRE_STATE, FormationKey, Job, JobID, JobState
from flynn.scheduler.restarts import Restarts

WAITING = frozenset((WIRE_STATE[JobState.PENDING], WIRE_STATE[JobState.BLOCKED]))
RUNS = frozenset((WIRE_STATE[JobState.STARTING], WIRE_STATE[JobState.RUNNING]))


def compare(desk: Desk, event: RecordsListed, now: datetime) -> None:
    """Adopt what waits for its start, and tell the controller wherever it is wrong.

    What it has been told since it was asked, or was about to be told then, its answer may lack: that is right by
    itself. Nothing else excuses a difference, a fresh report of a host in particular: whoever leads anew has seen jobs
    come up that nobody told of, and hears of each of them again while it waits for the books.
    """
    recorded = {record.id for record in event.jobs}
    for record in event.jobs:
        job = desk.world.jobs.get(record.id)
        if job is None:
            _unknown(desk, record, now)
            continue
        if record.restarts > job.restarts:
            job = replace(job, restarts=record.restarts)
            desk.world.put_job(job)
        if record.state != WIRE_STATE[job.state] and not _on_its_way(desk, event, job.id):
            desk.ask(PersistJob(job))
    for job in desk.world.jobs.values():
        active = job.state is not JobState.STOPPED and job.state is not JobState.BLOCKED
        if active and job.id not in recorded and not _on_its_way(desk, event, job.id):
            desk.ask(PersistJob(job))


def _on_its_way(desk: Desk, event: RecordsListed, id: JobID) -> bool:
    return id in event.untold or desk.told_since(id, event.asked_at)


def inherit(desk: Desk, restarts: Restarts, event: RecordsListed, now: datetime) -> None:
    """Let the replacements of jobs that ended while nobody led go on with their counts."""
    for record in event.jobs:
        job = desk.world.jobs.get(record.id)
        if record.state not in RUNS or not record.type or (job is not None and job.state is not JobState.STOPPED):
            continue
        if job is None:
            job = replace(_as_recorded(record, now), started_at=record.changed_at)
        elif not job.in_formation:
            continue
        restarts.replace(replace(job, restarts=max(job.restarts, record.restarts)), now)


def _as_recorded(record: RecordedJob, now: datetime) -> Job:
    return Job(
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


def _unknown(desk: Desk, record: RecordedJob, now: datetime) -> None:
    key = FormationKey(record.app, record.release)
    job = _as_recorded(record, now)
    if record.state in WAITING and record.host is None and record.type and key in desk.world.formations:
        # Left behind by the leader before: it keeps its restart count and its waiting time.
        desk.world.put_job(replace(job, state=JobState.PENDING, reason=""))
        desk.to_place[job.id] = None
        desk.dirty[key] = None
    else:
        desk.ask(PersistJob(job))
