"""Jobs as the scheduler reports them. The row is a cache of what hosts know; nothing is decided from it here."""

from __future__ import annotations

from collections.abc import Collection

from flynn.controller import validation
from flynn.controller.database import Database, jsonb
from flynn.controller.ids import given, is_uuid
from flynn.types.errors import NotFound
from flynn.types.event import EventType
from flynn.types.formation import ScaleRequest
from flynn.types.job import Job, JobState

COLUMNS = """
    job_id AS uuid, cluster_id AS id, host_id, app_id AS app, release_id AS release, process_type AS type, state, args,
    (SELECT jsonb_agg(v.volume_id ORDER BY v.index) FROM job_volumes v WHERE v.job_id = job_cache.job_id) AS volumes,
    meta, exit_status, host_error, run_at, restarts,
    coalesce(reason, '') AS reason, created_at, updated_at
"""
LISTED_AS_ACTIVE = (JobState.PENDING, JobState.BLOCKED, JobState.STARTING, JobState.UP, JobState.STOPPING)


class JobStore:
    """Jobs in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, job: Job) -> Job:
        """Record a job's present state; each state of a job is told as an event once."""
        validation.job_state(job.state)
        job_id = given("uuid", job.uuid)
        volumes = [given("volumes", volume) for volume in job.volumes]
        async with self._database.transaction() as transaction:
            await transaction.execute(
                """
                INSERT INTO job_cache (job_id, cluster_id, host_id, app_id, release_id, process_type, state, meta, args,
                    exit_status, host_error, run_at, restarts, reason)
                VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
                ON CONFLICT (job_id) DO UPDATE SET cluster_id = EXCLUDED.cluster_id, host_id = EXCLUDED.host_id,
                    state = EXCLUDED.state, args = EXCLUDED.args, exit_status = EXCLUDED.exit_status,
                    host_error = EXCLUDED.host_error, run_at = EXCLUDED.run_at, restarts = EXCLUDED.restarts,
                    reason = EXCLUDED.reason, updated_at = now()
                """,
                (
                    job_id,
                    job.id,
                    job.host_id,
                    given("app", job.app),
                    given("release", job.release) if job.release else None,  # a build before the first release
                    job.type,
                    job.state,
                    jsonb(job.meta or None),
                    jsonb(job.args or None),
                    job.exit_status,
                    job.host_error,
                    job.run_at,
                    job.restarts,
                    job.reason or None,
                ),
            )
            for index, volume in enumerate(volumes):
                await transaction.execute(
                    "INSERT INTO job_volumes (job_id, volume_id, index) VALUES (%s, %s, %s)"
                    " ON CONFLICT (job_id, volume_id) DO UPDATE SET index = EXCLUDED.index",
                    (job_id, volume, index),
                )
            stored = await transaction.one(Job, f"SELECT {COLUMNS} FROM job_cache WHERE job_id = %s", (job_id,))
            assert stored is not None
            transaction.emit(
                EventType.JOB, stored.uuid, stored, app=stored.app, unique_id=f"job:{stored.uuid}:{stored.state}"
            )
        return stored

    async def get(self, ref: str) -> Job:
        """Return a job by UUID or by cluster id `<host>-<uuid>`. Raises `NotFound`."""
        job = None
        if is_uuid(ref):
            job = await self._database.one(Job, f"SELECT {COLUMNS} FROM job_cache WHERE job_id = %s", (ref,))
        elif is_uuid(ref[-36:]) and ref[-37:-36] == "-":
            job = await self._database.one(
                Job,
                f"SELECT {COLUMNS} FROM job_cache WHERE job_id = %s AND cluster_id = %s",
                (ref[-36:], ref),
            )
        if job is None:
            raise NotFound(f"job {ref} not found")
        return job

    async def all(self, app_id: str) -> list[Job]:
        """Return all jobs an app ever had, newest first."""
        return await self._database.all(
            Job, f"SELECT {COLUMNS} FROM job_cache WHERE app_id = %s ORDER BY created_at DESC, job_id", (app_id,)
        )

    async def ended_since(self, request: ScaleRequest, types: Collection[str], limit: int) -> list[Job]:
        """Return jobs that were made for a scale request and have ended already, the latest first."""
        return await self._database.all(
            Job,
            f"SELECT {COLUMNS} FROM job_cache WHERE app_id = %s AND release_id = %s AND process_type = ANY(%s)"
            " AND state = 'down' AND created_at >= %s ORDER BY updated_at DESC, job_id LIMIT %s",
            (request.app, request.release, list(types), request.created_at, limit),
        )

    async def waiting(self, app_id: str, release_id: str) -> list[Job]:
        """Return the jobs of a release that have not started yet and for which the scheduler says why, oldest first."""
        return await self._database.all(
            Job,
            f"SELECT {COLUMNS} FROM job_cache WHERE app_id = %s AND release_id = %s AND state IN ('pending', 'blocked')"
            " AND reason IS NOT NULL ORDER BY created_at, job_id",
            (app_id, release_id),
        )

    async def active(self) -> list[Job]:
        """Return the jobs of all apps that run or are about to, most recently changed first."""
        return await self._database.all(
            Job,
            f"SELECT {COLUMNS} FROM job_cache WHERE state = ANY(%s) ORDER BY updated_at DESC",
            ([state.value for state in LISTED_AS_ACTIVE],),
        )
