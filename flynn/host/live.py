"""Jobs that have a container now, and those who wait for one: where supervision and attachments meet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from flynn.host.descriptors import Drain
from flynn.host.logs.capture import Capture
from flynn.host.runtime.runtime import Container
from flynn.types.host import HostJob


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
        self._waiting: dict[str, set[asyncio.Future[LiveJob | str]]] = {}

    def get(self, job_id: str) -> LiveJob | None:
        return self._live.get(job_id)

    def wait_for(self, job_id: str) -> asyncio.Future[LiveJob | str]:
        """Return a future for the live job, or for the reason why it never came to life. Cancel it to stop waiting."""
        future: asyncio.Future[LiveJob | str] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(job_id, set())
        waiting.add(future)

        def forget(done: asyncio.Future[LiveJob | str]) -> None:
            waiting.discard(done)
            if not waiting and self._waiting.get(job_id) is waiting:
                del self._waiting[job_id]

        future.add_done_callback(forget)
        return future

    def born(self, live: LiveJob) -> bool:
        """The container stands and has not run anything yet. Tells whether anybody was waiting for it."""
        self._live[live.job.id] = live
        return self._tell(live.job.id, live)

    def failed(self, job_id: str, reason: str) -> None:
        """There will be no container."""
        self._tell(job_id, reason)

    def gone(self, job_id: str) -> None:
        """Everything of the job has been cleaned up."""
        live = self._live.pop(job_id, None)
        if live is not None:
            live.close_streams()
            live.finished.set()

    def _tell(self, job_id: str, news: LiveJob | str) -> bool:
        waiting = [future for future in self._waiting.get(job_id, ()) if not future.done()]
        for future in waiting:
            future.set_result(news)
        return bool(waiting)
