"""Which down jobs leave the list: at most 25 per app stay, the rest only answer when asked for by id."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from flynn.types.host import ActiveJob

DOWN_JOBS_PER_APP = 25
RETIRED_JOBS = 1000  # how many of those no longer listed are kept at all; the original's kept growing for ever


def to_retire(jobs: Iterable[ActiveJob], limit: int = DOWN_JOBS_PER_APP) -> list[str]:
    """Return the ids of the oldest down jobs above `limit` per app (env `FLYNN_APP_ID`; none is an app of its own)."""
    by_app: defaultdict[str, list[ActiveJob]] = defaultdict(list)
    for job in jobs:
        if job.status.down:
            by_app[job.job.config.env.get("FLYNN_APP_ID", "")].append(job)
    retired: list[str] = []
    for down in by_app.values():
        if len(down) > limit:
            down.sort(key=lambda job: (job.ended_at, job.created_at))
            retired += [job.job.id for job in down[: len(down) - limit]]
    return retired
