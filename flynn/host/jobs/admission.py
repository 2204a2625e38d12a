"""Whether a job may be added: the checks that answer the caller at once. Other mistakes show as an `error` event."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flynn.types.errors import Conflict, ValidationError
from flynn.types.host import ActiveJob, HostJob


def check(job: HostJob, jobs: Mapping[str, ActiveJob]) -> None:
    """Refuse a job without layers, with a taken id, or with volumes that another job uses.

    A volume belongs to one starting or running job at a time: two writers on one file system ruin databases.
    """
    if not job.mountspecs:
        raise ValidationError("mountspecs", "must be set")
    if not job.id or "/" in job.id or job.id.startswith("."):
        raise ValidationError("id", "must be a plain name")
    if job.id in jobs:
        raise Conflict("job already exists")
    taken = volumes_in_use(jobs.values()) & {binding.volume for binding in job.config.volumes}
    if taken:
        raise Conflict(f"volumes in use: {', '.join(sorted(taken))}")


def volumes_in_use(jobs: Iterable[ActiveJob]) -> set[str]:
    """Return the ids of the volumes bound by jobs that are not down."""
    return {b.volume for job in jobs if not job.status.down for b in job.job.config.volumes}
