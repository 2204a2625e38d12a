"""The work queue in PostgreSQL, table `que_jobs`: what a worker has to do, each entry leased to one worker at a time.

A worker takes a lease and keeps renewing it; one that dies loses it by time, and the next worker starts the job again.
So jobs must be repeatable. An entry belongs to the attempt whose token it carries: an attempt that lost its lease can
neither finish nor postpone the job any more. spec/controller-worker.md section 2.
"""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum

from flynn.controller.database import Database, Transaction
from flynn.controller.ids import new_id
from flynn.types.codec import Json, Wire, encode

LEASE = timedelta(seconds=10)
MAX_ATTEMPTS = 12  # with the back-off below that is about a day; then the entry rests for someone to look at
POSTPONED_FOR_EVER = "infinity"


class JobClass(StrEnum):
    """What a queue entry asks for."""

    DEPLOYMENT = "deployment"
    APP_DELETION = "app_deletion"
    RELEASE_CLEANUP = "release_cleanup"
    APP_GARBAGE_COLLECTION = "app_garbage_collection"
    DOMAIN_MIGRATION = "domain_migration"


class QueuedJob(Wire):
    """An entry this attempt holds the lease of."""

    job_id: int
    job_class: str
    args: Json = None
    error_count: int = 0
    locked_by: str = ""


def backoff(failures: int) -> timedelta:
    """Return how long a job rests after its n-th failure: 4, 19, 84, 259 ... seconds."""
    return timedelta(seconds=failures**4 + 3)


async def enqueue(transaction: Transaction, job_class: JobClass, args: object) -> None:
    """Queue a job with the transaction that decided it; idle workers are woken at its commit."""
    await transaction.execute(
        "INSERT INTO que_jobs (job_class, args) VALUES (%s, %s::json)", (job_class.value, encode(args).decode())
    )


class Queue:
    """The worker's side."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def take(self) -> QueuedJob | None:
        """Lease the most urgent job that is due, or return None."""
        return await self._database.one(
            QueuedJob,
            """
            UPDATE que_jobs SET locked_until = now() + %s, locked_by = %s
            WHERE job_id = (
                SELECT job_id FROM que_jobs WHERE queue = '' AND run_at <= now() AND locked_until <= now()
                ORDER BY priority, run_at, job_id LIMIT 1 FOR UPDATE SKIP LOCKED
            )
            RETURNING job_id, job_class, args, error_count, locked_by
            """,
            (LEASE, new_id()),
        )

    async def renew(self, job: QueuedJob) -> bool:
        """Hold the lease for another while; False if it has been lost."""
        return await self._touch(job, "locked_until = now() + %s", LEASE)

    async def finish(self, job: QueuedJob) -> None:
        """Remove a job that is done."""
        await self._database.execute(
            "DELETE FROM que_jobs WHERE job_id = %s AND locked_by = %s", (job.job_id, job.locked_by)
        )

    async def give_back(self, job: QueuedJob) -> None:
        """Release a job that was interrupted by an orderly stop: the next worker takes it at once."""
        if await self._touch(job, "locked_until = '-infinity', run_at = now()"):
            await self._database.execute("SELECT pg_notify('que_jobs', %s)", (job.job_class,))

    async def postpone(self, job: QueuedJob, error: str) -> None:
        """Release a job that failed, to be tried again later, or not at all after too many attempts."""
        failures = job.error_count + 1
        rest = "now() + %s" if failures < MAX_ATTEMPTS else f"'{POSTPONED_FOR_EVER}'::timestamptz + %s"
        await self._touch(
            job,
            f"locked_until = '-infinity', run_at = {rest}, error_count = %s, last_error = %s",
            backoff(failures),
            failures,
            error,
        )

    async def due_in(self) -> timedelta | None:
        """Return when the next job is due or its lease runs out; None when there is none at all."""
        row = await self._database.one(
            dict,
            "SELECT extract(epoch FROM min(greatest(run_at, locked_until)) - now())::float8 AS seconds"
            " FROM que_jobs WHERE queue = '' AND run_at < 'infinity'",
        )
        return timedelta(seconds=max(0.0, row["seconds"])) if row else None

    async def _touch(self, job: QueuedJob, changes: str, *values: object) -> bool:
        query = f"UPDATE que_jobs SET {changes} WHERE job_id = %s AND locked_by = %s"
        return bool(await self._database.execute(query, (*values, job.job_id, job.locked_by)))
