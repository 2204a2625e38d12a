"""All jobs of the host on their way: adding, finding, stopping them, and taking them over after a restart."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path

from flynn.aio.supervisor import TaskSet
from flynn.host import steps
from flynn.host.jobs import figures, resurrection
from flynn.host.runtime.runtime import Container, NotRunning
from flynn.host.supervision import JobRun, Machine
from flynn.host.volumes import mounts
from flynn.types.errors import Conflict, NotFound, RateLimited, ServiceUnavailable, ValidationError
from flynn.types.host import ActiveJob, HostJob, JobStats

log = logging.getLogger(__name__)

STARTING_LIMIT = 200  # jobs accepted but not yet launched; more are refused with "try again"
STOP_LIMIT_SECONDS = 50.0


class JobRunner:
    """The runs of one host. `tasks` owns them: leaving it lets go of the jobs without ending them."""

    def __init__(self, machine: Machine, tasks: TaskSet) -> None:
        self._machine, self._tasks = machine, tasks
        self._runs: dict[str, JobRun] = {}
        self._leaving = False
        self._restored: dict[str, JobRun] = {}  # between `restore` and `go_on`
        self._unfinished: list[ActiveJob] = []
        self._half_cleaned: list[str] = []

    async def add(self, job: HostJob) -> None:
        """Record a job and begin to start it; returns when it is recorded.

        Raises:
            ValidationError, Conflict: see `admission.check`.
            RateLimited: too many jobs are starting.
            ServiceUnavailable: the disk has no room for it.
        """
        if self._leaving:
            raise ServiceUnavailable("the host is shutting down")
        starting = sum(1 for run in self._runs.values() if run.container is None)
        if starting >= STARTING_LIMIT:
            raise RateLimited("maximum concurrent AddJob calls running, try again later")
        self._machine.book.check(job)
        self._machine.disk.admit(job)
        await self._machine.book.add(job)
        steps.reach("recorded")
        self._start(job.id)

    def _start(self, job_id: str) -> None:
        run = JobRun(self._machine, job_id)
        self._runs[job_id] = run
        self._tasks.start(f"job {job_id}", self._see_through(job_id, run, take_over=False))

    async def _see_through(self, job_id: str, run: JobRun, *, take_over: bool) -> None:
        """Run a job to its end, then start its successor if it is to have one."""
        try:
            await (run.take_over() if take_over else run.run())
        except Exception:  # The edge: a bug in one job's run must not end the others.
            log.exception("the run of a job failed", extra={"job": job_id})
        finally:
            self._runs.pop(job_id, None)
        if run.heir is not None and not self._leaving:
            self._start(run.heir.id)

    async def restore(self) -> set[str]:
        """Take over what an earlier daemon left: running, half-started and half-cleaned jobs.

        Returns the ids of the jobs whose containers live on. `go_on` starts the rest over, or ends them and (where they
        say so) brings them back.
        """
        kept = self._machine.book.restore()
        runs = {item.job.job.id: JobRun(self._machine, item.job.job.id) for item in kept}
        # All at once: one init that does not answer must not keep the daemon from the others for its time limit each.
        connected = await asyncio.gather(*(run.reconnect() for run in runs.values()))
        found = {job_id for job_id, living in zip(runs, connected, strict=True) if living}
        for leftover in await self._machine.runtime.collect_leftovers(found):
            log.info("removed a container nobody knows", extra={"job": leftover})
        await self._machine.mounts.collect()
        await self._machine.scratch.collect()
        self._unfinished = [item.job for item in kept if not item.job.status.down]
        self._half_cleaned = [item.job.job.id for item in kept if item.job.status.down]
        self._restored = runs
        return {job.job.id for job in self._unfinished if job.job.id in found}

    def go_on(self, slots: dict[str, str]) -> None:
        """Continue with the restored jobs; `slots` names those that give the host discoverd and the network."""
        for job_id in self._half_cleaned:
            self._tasks.start(f"clean up {job_id}", self._restored[job_id].clean_up_again())
        for job in resurrection.start_order(self._unfinished, slots):
            run = self._restored[job.job.id]
            self._runs[job.job.id] = run
            self._tasks.start(f"job {job.job.id}", self._see_through(job.job.id, run, take_over=True))
        self._restored = {}

    async def end_bereaved(self) -> None:
        """Kill the jobs whose volumes died with zfs-fuse: they can only fail, and their successors get them mounted."""
        outside = mounts.parse(Path("/proc/self/mountinfo").read_text())
        for run in list(self._runs.values()):
            if lost := run.lost_volumes(outside):
                await run.kill(f"the file system of its volume at {', '.join(lost)} has died")

    def leave(self) -> None:
        """Accept no more jobs: the daemon is going. The jobs stay."""
        self._leaving = True

    # Requests about single jobs

    def _run_of(self, job_id: str) -> JobRun:
        job = self._machine.book.find(job_id)
        run = self._runs.get(job_id)
        if run is None:
            raise Conflict(f"job is not running: it is {job.status.name.lower()}")
        return run

    async def stop(self, job_id: str) -> None:
        """Stop a job and wait until it is gone, for at most `STOP_LIMIT_SECONDS`. A job that is down stays so.

        Raises:
            NotFound: unknown job.
            ServiceUnavailable: it is still not down; the host keeps trying.
        """
        self._machine.book.find(job_id)
        run = self._runs.get(job_id)
        if run is None:
            return
        run.stop()
        try:
            async with asyncio.timeout(STOP_LIMIT_SECONDS):
                await run.finished.wait()
        except TimeoutError as error:
            raise ServiceUnavailable(f"job {job_id} has not ended in {STOP_LIMIT_SECONDS:.0f} s") from error

    async def signal(self, job_id: str, number: int) -> None:
        """Send a signal to a job's main process.

        Raises:
            NotFound: unknown job.
            Conflict: it is down, or has no container yet.
        """
        if not 0 < number <= signal.SIGRTMAX:
            raise ValidationError("sig", "must be a signal number")
        run = self._run_of(job_id)
        if run.container is None:
            raise Conflict("job is not running: it is starting")
        try:
            await run.container.signal(number)
        except NotRunning as error:
            raise Conflict("job is not running: it has ended") from error

    def stats(self, job_id: str) -> JobStats:
        """Measure a job.

        Raises:
            NotFound: unknown job.
            Conflict: it is down, or has no container yet.
        """
        run = self._run_of(job_id)
        if run.container is None:
            raise Conflict("job is not running: it is starting")
        return _measured(run.container)

    def exposition(self) -> str:
        """Return the figures of all jobs for Prometheus; 0.1 ms for each running one."""
        containers = [(job_id, run.container) for job_id, run in self._runs.items() if run.container is not None]
        book = self._machine.book
        running = [(book[job_id], _measured(container)) for job_id, container in containers if job_id in book.jobs]
        return figures.exposition(book.jobs.values(), running, len(self._runs) - len(containers))

    async def deregister(self, job_id: str) -> None:
        """Take a job's services out of discoverd; nothing to do for one that is down. Raises `NotFound`."""
        self._machine.book.find(job_id)
        run = self._runs.get(job_id)
        if run is not None:
            await run.deregister()

    def find(self, job_id: str) -> ActiveJob | None:
        """Return a job, also a retired one; None when there is none."""
        try:
            return self._machine.book.find(job_id)
        except NotFound:
            return None


def _measured(container: Container) -> JobStats:
    now = container.stats()
    return JobStats(
        memory_bytes=now.memory_bytes,
        memory_limit_bytes=now.memory_limit_bytes,
        cpu_seconds=now.cpu_seconds,
        processes=now.processes,
        oom_kills=now.oom_kills,
    )
