"""What is over is forgotten after a while, so that a platform that runs for years does not drown in its past.

| what | kept |
|---|---|
| events | 30 days, and the latest 100,000 |
| jobs that ended | 7 days, and the latest 100 of each app |
| scale requests that are over | 30 days |
| finished deployments | the latest 100 of each app, and 180 days |
| destroyed volumes | 30 days |
| queue entries that were given up | 30 days |

What runs, waits or is in use is never touched. Apps, releases, formations and artifacts have their own rules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

from flynn.controller.database import Database

LOCK = 0x72657461  # one worker at a time cleans up
BATCH = 2000  # rows of one statement: short transactions, so that nobody waits for them


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of the past is kept."""

    events: int = 100_000
    events_for: timedelta = timedelta(days=30)
    jobs_per_app: int = 100
    jobs_for: timedelta = timedelta(days=7)
    scale_requests_for: timedelta = timedelta(days=30)
    deployments_per_app: int = 100
    deployments_for: timedelta = timedelta(days=180)
    volumes_for: timedelta = timedelta(days=30)
    queue_for: timedelta = timedelta(days=30)


OLD_EVENTS = """
    DELETE FROM events WHERE event_id IN (
        SELECT event_id FROM events
        WHERE created_at < now() - %s OR event_id <= (SELECT max(event_id) FROM events) - %s
        ORDER BY event_id LIMIT %s
    )
"""
OLD_JOBS = """
    WITH old AS MATERIALIZED (
        SELECT job_id FROM (
            SELECT job_id, updated_at, row_number() OVER (PARTITION BY app_id ORDER BY updated_at DESC, job_id) AS place
            FROM job_cache WHERE state IN ('down', 'crashed', 'failed')
        ) ended WHERE place > %s OR updated_at < now() - %s LIMIT %s
    )
    DELETE FROM job_cache WHERE job_id IN (SELECT job_id FROM old)
"""
OLD_SCALE_REQUESTS = """
    DELETE FROM scale_requests WHERE scale_request_id IN (
        SELECT scale_request_id FROM scale_requests WHERE state <> 'pending' AND updated_at < now() - %s LIMIT %s
    )
"""
OLD_DEPLOYMENTS = """
    DELETE FROM deployments WHERE deployment_id IN (
        SELECT deployment_id FROM (
            SELECT deployment_id, created_at, row_number() OVER (PARTITION BY app_id ORDER BY created_at DESC) AS place
            FROM deployments WHERE finished_at IS NOT NULL
        ) finished WHERE place > %s OR (place > 1 AND created_at < now() - %s) LIMIT %s
    )
"""
OLD_VOLUMES = """
    DELETE FROM volumes WHERE volume_id IN (
        SELECT volume_id FROM volumes WHERE state = 'destroyed' AND updated_at < now() - %s LIMIT %s
    )
"""
OLD_QUEUE_ENTRIES = """
    DELETE FROM que_jobs WHERE job_id IN (
        SELECT job_id FROM que_jobs WHERE run_at = 'infinity' AND locked_until < now() - %s LIMIT %s
    )
"""


@dataclass(slots=True)
class Retention:
    """Forgets the past in the database."""

    database: Database
    limits: Limits = field(default_factory=Limits)

    async def forget(self) -> dict[str, int]:
        """Remove what is not to be kept, and tell how many rows of what. Leaves alone what another worker is at."""
        limits = self.limits
        statements: tuple[tuple[str, str, tuple[object, ...]], ...] = (
            ("events", OLD_EVENTS, (limits.events_for, limits.events)),
            ("jobs", OLD_JOBS, (limits.jobs_per_app, limits.jobs_for)),
            ("scale requests", OLD_SCALE_REQUESTS, (limits.scale_requests_for,)),
            ("deployments", OLD_DEPLOYMENTS, (limits.deployments_per_app, limits.deployments_for)),
            ("volumes", OLD_VOLUMES, (limits.volumes_for,)),
            ("queue entries", OLD_QUEUE_ENTRIES, (limits.queue_for,)),
        )
        removed = {what: await self._remove(statement, params) for what, statement, params in statements}
        return {what: count for what, count in removed.items() if count}

    async def _remove(self, statement: str, params: tuple[object, ...]) -> int:
        total = 0
        while removed := await self._batch(statement, params):
            total += removed
            if removed < BATCH:
                break
        return total

    async def _batch(self, statement: str, params: tuple[object, ...]) -> int:
        async with self.database.transaction() as transaction:
            mine = await transaction.one(dict, "SELECT pg_try_advisory_xact_lock(%s) AS mine", (LOCK,))
            if not mine or not mine["mine"]:
                return 0
            return await transaction.execute(statement, (*params, BATCH))
