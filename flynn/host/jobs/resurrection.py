"""Which jobs the host itself brings back, as what, and when.

A job with `resurrect` that ends without having been asked to, or is gone after a reboot, gets a successor made by the
host: the platform cannot wait for its scheduler when discoverd, PostgreSQL or the scheduler itself is what died. The
successor is a new job (`<host>-<new uuid>`) with the same command, layers and volumes. It is recorded in the same
transaction that ends its predecessor, so that no crash can lose it, and its `create` event follows the predecessor's
last event directly: an observer that looks at the host's jobs always counts one. A back-off is spent inside the
successor's `starting` state. All other jobs are left to the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from flynn.types.codec import replace
from flynn.types.host import ActiveJob, HostJob

META_REPLACES = "flynn-host.replaces"  # id of the predecessor
META_RESTARTS = "flynn-host.restarts"  # successors in a row that did not live long
META_EXTRA = (META_REPLACES, META_RESTARTS)

STABLE_AFTER = timedelta(seconds=60)  # a job that ran this long starts with a clean record
LONGEST_DELAY = timedelta(seconds=30)


def wanted(job: ActiveJob) -> bool:
    """Tell whether the host is to bring this job back once it has ended."""
    return job.job.resurrect and not job.force_stop


def successor(ended: ActiveJob, new_id: str, now: datetime) -> HostJob:
    """Return the job that takes the place of one that ends now."""
    lived = now - ended.started_at if ended.started_at.year > 1 else timedelta()
    restarts = 0 if lived >= STABLE_AFTER else restarts_of(ended.job) + 1
    env = dict(ended.job.config.env)
    if "FLYNN_JOB_ID" in env:
        env["FLYNN_JOB_ID"] = new_id
    metadata = {**ended.job.metadata, META_REPLACES: ended.job.id, META_RESTARTS: str(restarts)}
    return replace(ended.job, id=new_id, metadata=metadata, config=replace(ended.job.config, env=env))


def restarts_of(job: HostJob) -> int:
    """Return how many short-lived predecessors in a row a job has."""
    text = job.metadata.get(META_RESTARTS, "0")
    return int(text) if text.isdigit() else 0


def delay_before(job: HostJob) -> timedelta:
    """Return how long a successor waits before it is started: nothing, then 1, 2, 4 ... 30 s."""
    restarts = restarts_of(job)
    if restarts <= 1:
        return timedelta()
    return min(timedelta(seconds=2 ** min(restarts - 2, 10)), LONGEST_DELAY)


def start_order(jobs: Iterable[ActiveJob], slots: Mapping[str, str]) -> list[ActiveJob]:
    """Sort jobs to bring back: those that give the host discoverd and the network first, the others by age."""
    first = {job_id: position for position, job_id in enumerate((slots.get("discoverd"), slots.get("flannel")))}

    def rank(job: ActiveJob) -> tuple[int, datetime]:
        return first.get(job.job.id, len(first)), job.created_at

    return sorted(jobs, key=rank)
