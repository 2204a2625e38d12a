"""What the controller still has to be told: in order for each job, side by side for different ones, until it takes it.

A controller that is away is waited for (the scheduler may be the one who has to start it), and a later state of a job
never overtakes an earlier one. A volume is told before the jobs that use it, and the end of a scale request after
everything about the jobs of its formation, since clients wait for exactly that event.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from flynn.aio.backoff import Backoff
from flynn.aio.supervisor import TaskSet
from flynn.scheduler import wire
from flynn.scheduler.model import FormationKey, Job, JobID, Volume
from flynn.scheduler.neighbours import ControllerApi
from flynn.types.codec import replace
from flynn.types.errors import ApiError
from flynn.types.formation import ScaleRequest, ScaleState

log = logging.getLogger(__name__)

RETRY = Backoff(first=timedelta(milliseconds=100), limit=timedelta(seconds=3))
CONCURRENCY = 16
LIMIT = 20_000  # letters, while the controller is away: hours of crash loops; then no new jobs are told of


@dataclass(frozen=True, slots=True)
class _Letter:
    what: str
    send: Callable[[], Coroutine[Any, Any, object]]
    formation: FormationKey | None = None  # a scale request of it waits for this letter
    after: tuple[str, ...] = ()  # queues that have to be empty first


class Outbox:
    def __init__(self, controller: ControllerApi, tasks: TaskSet) -> None:
        self._controller = controller
        self._tasks = tasks
        self._queues: dict[str, deque[_Letter]] = {}
        self._open: dict[FormationKey, int] = {}  # letters about the jobs of a formation
        self._moved = asyncio.Condition()
        self._slots = asyncio.Semaphore(CONCURRENCY)
        self._era = 0  # a letter of an earlier era is not sent any more

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def untold(self) -> frozenset[JobID]:
        """Return the jobs of which something has not been taken by the controller yet."""
        return frozenset(JobID(id) for kind, _, id in (name.partition(" ") for name in self._queues) if kind == "job")

    def job(self, job: Job) -> None:
        told = wire.job(job)
        key = job.key if job.in_formation else None
        self._post(
            f"job {job.id}",
            _Letter(
                f"job {job.cluster_id or job.id} {told.state}",
                lambda: self._controller.put_job(told),
                key,
                tuple(f"volume {id}" for id in job.volumes),
            ),
        )

    def volume(self, volume: Volume) -> None:
        told = wire.volume(volume)
        self._post(f"volume {volume.id}", _Letter(f"volume {volume.id}", lambda: self._controller.put_volume(told)))

    def scale_complete(self, key: FormationKey, request: ScaleRequest) -> None:
        told = replace(request, app=key.app, release=key.release, state=ScaleState.COMPLETE.value)

        async def send() -> object:
            async with self._moved:
                await self._moved.wait_for(lambda: not self._open.get(key))
            return await self._controller.put_scale_request(told)

        self._post(f"scale {key}", _Letter(f"scale request {request.id} complete", send))

    def clear(self) -> None:
        """Forget everything that has not been sent; what is on its way now is not repeated if it fails."""
        self._era += 1
        for queue in self._queues.values():
            for letter in queue:
                self._count(letter, -1)
            queue.clear()

    async def flush(self, limit: timedelta) -> None:
        """Wait until everything is told, at most `limit`."""
        try:
            async with asyncio.timeout(limit.total_seconds()), self._moved:
                await self._moved.wait_for(lambda: not self._queues)
        except TimeoutError:
            log.warning("left untold", extra={"letters": len(self)})

    def _post(self, queue: str, letter: _Letter) -> None:
        if queue not in self._queues and len(self._queues) >= LIMIT:
            # What still runs when the controller is back is found missing in its books, and told then.
            log.warning("too much to tell, left out", extra={"update": letter.what})
            return
        self._count(letter, 1)
        if queue in self._queues:
            self._queues[queue].append(letter)
        else:
            self._queues[queue] = deque([letter])
            self._tasks.start(f"tell {queue}", self._deliver(queue))

    def _count(self, letter: _Letter, change: int) -> None:
        if letter.formation is not None:
            left = self._open.get(letter.formation, 0) + change
            if left > 0:
                self._open[letter.formation] = left
            else:
                self._open.pop(letter.formation, None)

    async def _deliver(self, name: str) -> None:
        letters = self._queues[name]
        while letters:
            letter = letters[0]
            era = self._era
            await self._empty(letter.after)
            await self._send(letter)
            if era == self._era:
                letters.popleft()
                self._count(letter, -1)
            async with self._moved:
                self._moved.notify_all()
        del self._queues[name]
        async with self._moved:
            self._moved.notify_all()

    async def _empty(self, queues: tuple[str, ...]) -> None:
        if queues:
            async with self._moved:
                await self._moved.wait_for(lambda: not any(queue in self._queues for queue in queues))

    async def _send(self, letter: _Letter) -> None:
        era = self._era
        for delay in RETRY.delays():
            if era != self._era:
                return
            try:
                # A scale request waits inside for letters that need slots themselves, so it takes none.
                if letter.what.startswith("scale"):
                    await letter.send()
                else:
                    async with self._slots:
                        await letter.send()
                return
            except ApiError as error:
                if not error.retry:
                    log.warning("the controller refused an update", extra={"update": letter.what, "error": error})
                    return
                log.debug("the controller cannot be told", extra={"update": letter.what, "error": error})
            await asyncio.sleep(delay)
