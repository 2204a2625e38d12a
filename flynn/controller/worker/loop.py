"""Takes jobs from the queue and has them done, several at a time, each under a lease that is kept renewed.

On an orderly stop the jobs at hand are cancelled and given back, for the next worker to go on with at once. A worker
that dies just stops renewing. Either way a procedure may be run again from the beginning: it must look where things
stand instead of remembering.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta

from flynn.aio.backoff import retrying
from flynn.aio.supervisor import TaskSet
from flynn.controller.hub import EventHub
from flynn.controller.store.queue import LEASE, Queue, QueuedJob
from flynn.types.errors import ApiError, ServiceUnavailable

log = logging.getLogger(__name__)

Procedure = Callable[[QueuedJob], Awaitable[None]]

CONCURRENT_JOBS = 10
RENEW_EVERY = timedelta(seconds=3)  # two may fail before the lease of ten seconds is lost
LONGEST_NAP = timedelta(seconds=5)  # a lost notification delays a job by no more than this
SHORTEST_NAP = timedelta(milliseconds=50)
DATABASE_PAUSE = timedelta(seconds=1)
RECORDING_LIMIT = timedelta(seconds=10)  # for writing down how a job ended


class LeaseLost(Exception):
    """Somebody else may have taken the job: stop at once, and do not touch its entry."""


class Worker:
    """The loop of one process. `run` is its endless task."""

    def __init__(self, queue: Queue, hub: EventHub, procedures: Mapping[str, Procedure], tasks: TaskSet) -> None:
        self._queue = queue
        self._changed = hub.queue_changed
        self._procedures = procedures
        self._tasks = tasks

    async def run(self) -> None:
        """Take and start jobs for ever."""
        while True:
            self._changed.clear()
            nap = await self._start_due_jobs()
            try:
                async with asyncio.timeout(min(max(nap, SHORTEST_NAP), LONGEST_NAP).total_seconds()):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _start_due_jobs(self) -> timedelta:
        """Start what is due and return how long there is nothing to do."""
        try:
            while len(self._tasks) < CONCURRENT_JOBS:
                job = await self._queue.take()
                if job is None:
                    return await self._queue.due_in() or LONGEST_NAP
                self._tasks.start(f"{job.job_class} {job.job_id}", self._perform(job))
        except ApiError as error:
            log.warning("cannot read the queue", extra={"error": error.message})
            return DATABASE_PAUSE
        return LONGEST_NAP

    async def _perform(self, job: QueuedJob) -> None:
        fields = {"job": job.job_id, "class": job.job_class, "attempt": job.error_count + 1}
        log.info("job begun", extra=fields)
        try:
            await self._leased(job)
        except LeaseLost:
            log.warning("job lost to another worker", extra=fields)
        except asyncio.CancelledError:
            await self._given_back(job)
            raise
        except Exception as error:  # The edge of a job: whatever went wrong, it is recorded and tried again later.
            log.warning("job failed", extra={**fields, "error": repr(error)}, exc_info=not isinstance(error, ApiError))
            text = "".join(traceback.format_exception(error))[-4000:]
            await self._recorded(lambda: self._queue.postpone(job, text))
        else:
            await self._recorded(lambda: self._queue.finish(job))
            log.info("job done", extra=fields)
        self._changed.set()  # a place is free

    async def _leased(self, job: QueuedJob) -> None:
        """Run a job's procedure as long as its lease holds."""
        procedure = self._procedures.get(job.job_class)
        if procedure is None:
            raise LookupError(f"no procedure for jobs of class {job.job_class!r}")
        loop = asyncio.get_running_loop()
        body = asyncio.ensure_future(procedure(job))
        held_until = loop.time() + LEASE.total_seconds()
        try:
            while not (await asyncio.wait({body}, timeout=RENEW_EVERY.total_seconds()))[0]:
                asked_at = loop.time()
                try:
                    if not await self._queue.renew(job):
                        raise LeaseLost
                    held_until = asked_at + LEASE.total_seconds()
                except ApiError:
                    if loop.time() > held_until:
                        raise LeaseLost from None
            body.result()
        finally:
            body.cancel()
            await asyncio.gather(body, return_exceptions=True)

    async def _given_back(self, job: QueuedJob) -> None:
        try:
            async with asyncio.timeout(RECORDING_LIMIT.total_seconds()):
                await self._queue.give_back(job)
        except (ApiError, TimeoutError) as error:
            log.warning("job not given back, its lease will run out", extra={"job": job.job_id, "error": str(error)})

    async def _recorded(self, write: Callable[[], Awaitable[None]]) -> None:
        try:
            await retrying(write, on=ServiceUnavailable, within=RECORDING_LIMIT)
        except ApiError as error:
            # The lease runs out and the job is done again; that is what repeatable means.
            log.warning("cannot record how a job ended", extra={"error": error.message})
