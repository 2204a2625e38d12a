"""Taking out of the directory what a job of the platform has registered there, as soon as its container has ended.

System jobs register themselves and leave by themselves. One that was killed cannot, and its callers would try it until
its time to live is over, a leader that it was would be missed as long. The host knows better: the container is gone.
This is a courtesy, tried for a few seconds; what it misses expires.
"""

from __future__ import annotations

import logging
from datetime import timedelta

from flynn.aio.backoff import Backoff, retrying
from flynn.aio.supervisor import TaskSet
from flynn.host.discovery import Discovery
from flynn.host.jobs.environment import is_system_app
from flynn.types.errors import ApiError
from flynn.types.host import HostJob

log = logging.getLogger(__name__)

WITHIN = timedelta(seconds=10)  # later it has expired
AGAIN = Backoff(first=timedelta(milliseconds=300), factor=2)


class Departures:
    def __init__(self, discovery: Discovery, tasks: TaskSet) -> None:
        self._discovery, self._tasks = discovery, tasks

    def job_ended(self, job: HostJob) -> None:
        """Have its registrations taken out, in the background. User jobs' are the host's own and are left before."""
        if is_system_app(job):
            self._tasks.start(f"departure of {job.id}", self._take_out(job.id))

    async def _take_out(self, job_id: str) -> None:
        try:
            await retrying(lambda: self._forget(job_id), on=ApiError, policy=AGAIN, within=WITHIN)
        except ApiError as error:
            log.info("registrations of a job left to expire", extra={"job": job_id, "error": str(error)})

    async def _forget(self, job_id: str) -> None:
        await self._discovery.registry.forget_job(job_id)
