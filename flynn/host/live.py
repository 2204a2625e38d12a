"""Jobs that have a container now, and those who wait for one: where supervision and attachments meet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from flynn.host.descriptors import Drain
from flynn.host.logs.capture import Capture
from flynn.host.runtime.runtime import Container
from flynn.types.host import HostJob

log = logging.getLogger(__name__)

ARRIVAL_SECONDS = 5.0
MOST_WAITING = 1000  # attachments for jobs that the host does not know, or that have not begun


class LiveJob:
    """A job with a container. `finished` is set when everything of it has been cleaned up."""

    def __init__(self, job: HostJob, container: Container, capture: Capture | None, stop: Callable[[], None]) -> None:
        self.job, self.container, self.capture = job, container, capture
        self.stop = stop  # asks for the job to be stopped; returns at once
        self.finished = asyncio.Event()
        self.closed = False  # the container's descriptors may not be used any more
        self.attached = False  # somebody reads its raw output
        self.stdin_taken = False
        self.drain = Drain()
        self._coming = 0  # of those who waited for the job: how many have not taken their place yet
        self._all_in = asyncio.Event()
        self._all_in.set()

    def expect(self, attachers: int) -> None:
        """So many have been told of the job and are on their way to its output."""
        self._coming = attachers
        if attachers:
            self._all_in.clear()

    def arrived(self) -> None:
        """One of them has taken its place, or has failed or left: that must not keep the job from starting."""
        self._coming -= 1
        if self._coming <= 0:
            self._all_in.set()

    async def everybody_in(self) -> None:
        """Wait for those on their way, so that they see the job's first byte; not for long."""
        try:
            async with asyncio.timeout(ARRIVAL_SECONDS):
                await self._all_in.wait()
        except TimeoutError:
            log.warning("a job starts before all who waited for it are attached", extra={"job": self.job.id})

    @property
    def raw(self) -> bool:
        """Output goes to whoever is attached instead of the log."""
        return self.capture is None

    def drain_output(self) -> None:
        """From now on nobody reads the raw output, and the job must not block on it."""
        for descriptor in (self.container.stdout, self.container.stderr):
            if descriptor is not None and not self.closed:
                self.drain.add(descriptor)

    def drain_if_unattached(self) -> None:
        if self.raw and not self.attached:
            self.drain_output()

    def close_streams(self) -> None:
        """Use the container's descriptors no more: it is about to be destroyed."""
        self.closed = True
        self.drain.close()
        if self.capture is not None:
            self.capture.stop()


class LiveJobs:
    """All of them, by id; and those who wait for one to come to life."""

    def __init__(self) -> None:
        self._live: dict[str, LiveJob] = {}
        self._waiting: dict[str, dict[asyncio.Future[LiveJob | str], None]] = {}  # first come, first served

    def get(self, job_id: str) -> LiveJob | None:
        return self._live.get(job_id)

    def wait_for(self, job_id: str) -> asyncio.Future[LiveJob | str]:
        """Return a future for the live job, or for the reason why it never came to life. Cancel it to stop waiting."""
        future: asyncio.Future[LiveJob | str] = asyncio.get_running_loop().create_future()
        if sum(len(waiting) for waiting in self._waiting.values()) >= MOST_WAITING:
            future.set_result("too many attachments wait for jobs on this host")
            return future
        waiting = self._waiting.setdefault(job_id, {})
        waiting[future] = None

        def forget(done: asyncio.Future[LiveJob | str]) -> None:
            waiting.pop(done, None)
            if not waiting and self._waiting.get(job_id) is waiting:
                del self._waiting[job_id]

        future.add_done_callback(forget)
        return future

    def born(self, live: LiveJob) -> None:
        """The container stands and has not run anything yet; those who have waited are on their way."""
        self._live[live.job.id] = live
        live.expect(self._tell(live.job.id, live))

    def failed(self, job_id: str, reason: str) -> None:
        """There will be no container."""
        self._tell(job_id, reason)

    def gone(self, job_id: str) -> None:
        """Everything of the job has been cleaned up."""
        live = self._live.pop(job_id, None)
        if live is not None:
            live.close_streams()
            live.finished.set()

    def _tell(self, job_id: str, news: LiveJob | str) -> int:
        waiting = [future for future in self._waiting.get(job_id, ()) if not future.done()]
        for future in waiting:
            future.set_result(news)
        return len(waiting)
