"""The shell around the engine: one loop that feeds it events and performs its actions; everything slow is a task.

State has one owner, the loop in `run`. Streams and timers put events into its queue; tasks that talk to hosts answer
with events. The queue is bounded: a full one makes the streams wait, never the decisions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from datetime import timedelta
from typing import Any, assert_never

from flynn.aio.clock import Clock
from flynn.aio.supervisor import Spawn, TaskSet
from flynn.discoverd.registry import Registry
from flynn.scheduler.controller_feed import RECONNECT, ControllerFeed
from flynn.scheduler.engine import Engine
from flynn.scheduler.errands import Errands
from flynn.scheduler.events import (
    Action,
    CheckHost,
    CompleteScaleRequest,
    Drained,
    DropPending,
    Event,
    FollowHost,
    LeadershipChanged,
    PersistJob,
    PersistVolume,
    Resync,
    StartJob,
    StopJob,
    Tick,
    UnfollowHost,
    WatchServices,
)
from flynn.scheduler.host_links import HostLinks
from flynn.scheduler.mandate import Mandate
from flynn.scheduler.neighbours import ControllerApi, HostDialer, RouterDialer
from flynn.scheduler.outbox import Outbox
from flynn.scheduler.sinks import SinkKeeper
from flynn.scheduler.traffic_feed import TrafficFeed
from flynn.types.instance import Instance

SERVICE = "controller-scheduler"

QUEUE_LIMIT = 10_000
JOBS_EVERY = timedelta(seconds=30)
FORMATIONS_EVERY = timedelta(seconds=60)
SINKS_EVERY = timedelta(seconds=60)


class SchedulerLoop:
    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        controller: ControllerApi,
        dial_host: HostDialer,
        dial_router: RouterDialer,
        clock: Clock,
        tasks: TaskSet,
        mandate: Mandate,
    ) -> None:
        self.engine = engine
        self.outbox = Outbox(controller, tasks)
        self._registry = registry
        self._mandate = mandate
        self._clock = clock
        self._tasks = tasks
        self._queue: asyncio.Queue[Event] = asyncio.Queue(QUEUE_LIMIT)
        self._hosts = HostLinks(registry, dial_host, clock, tasks, engine.world, self.tell)
        self._controller = ControllerFeed(controller, clock, self.tell)
        self._traffic = TrafficFeed(registry, dial_router, tasks, self.tell)
        self._errands = Errands(self._hosts, self.tell)
        self._sinks = SinkKeeper(controller, self._hosts, lambda: bool(engine.leader), self._hosts.found)
        self._resting = False
        self._resync_jobs = asyncio.Event()
        self._resync_records = asyncio.Event()
        self._resync_formations = asyncio.Event()

    def start(self, spawn: Spawn) -> None:
        """Start everything but the watch of the leadership, which waits until the scheduler is registered."""
        spawn("decide", self.run())
        spawn("watch hosts", self._hosts.watch())
        spawn("compare hosts", self._hosts.compare())
        spawn("follow formations", self._controller.follow_formations())
        spawn("follow volumes", self._controller.follow_volumes())
        # Side by side: a host that does not answer, which may be why we lead now, keeps nobody from the books.
        spawn("list jobs", _every(JOBS_EVERY, self._resync_jobs, self._hosts.list_all))
        spawn("list records", _every(JOBS_EVERY, self._resync_records, self._list_records))
        spawn("list formations", _every(FORMATIONS_EVERY, self._resync_formations, self._controller.list_formations))
        spawn("follow sinks", self._sinks.follow())
        spawn("bring sinks", _every(SINKS_EVERY, self._hosts.found, self._sinks.bring))
        spawn("watch routers", self._traffic.watch_routers())

    @property
    def queued(self) -> int:
        """How many events wait to be looked at."""
        return self._queue.qsize()

    async def caught_up(self) -> None:
        """Return when hosts and formations are known."""
        await self._hosts.current.wait()
        await self._controller.current.wait()

    async def rest(self, limit: timedelta) -> None:
        """Decide nothing any more, and tell what is left to be told, for at most `limit`.

        To be called while still registered: the next leader, which begins as soon as we are not, then finds true books.
        """
        self._resting = True
        await self.outbox.flush(limit)

    # The loop

    async def run(self) -> None:
        """Feed the engine and perform what it asks for, for ever."""
        while True:
            events = [await self._next_event()]
            while not self._queue.empty():
                events.append(self._queue.get_nowait())
            if self._resting:
                continue
            for action in self.engine.step(events, self._clock.now()):
                self._perform(action)

    async def _next_event(self) -> Event:
        due = self.engine.next_due() if not self._resting else None
        if due is None:
            return await self._queue.get()
        try:
            async with asyncio.timeout(max((due - self._clock.now()).total_seconds(), 0)):
                return await self._queue.get()
        except TimeoutError:
            return Tick()

    async def tell(self, event: Event) -> None:
        await self._queue.put(event)

    def _perform(self, action: Action) -> None:
        match action:
            case PersistJob(job):
                self.outbox.job(job)
            case PersistVolume(volume):
                self.outbox.volume(volume)
            case CompleteScaleRequest(key, request):
                self.outbox.scale_complete(key, request)
            case StartJob():
                self._tasks.start(f"start {action.job.cluster_id}", self._errands.start(action))
            case StopJob():
                self._tasks.start(f"stop {action.host}-{action.job}", self._errands.stop(action))
            case Drained(job):
                self._errands.drained(job)
            case FollowHost(host):
                self._hosts.follow(host)
            case UnfollowHost(host):
                self._hosts.unfollow(host)
            case CheckHost(host):
                self._hosts.check(host)
            case WatchServices(services):
                self._traffic.watch_services(services)
            case Resync():
                self._resync_jobs.set()
                self._resync_records.set()
                self._hosts.found.set()
                self._resync_formations.set()
            case DropPending():
                self.outbox.clear()
            case _:
                assert_never(action)

    # Leadership

    async def watch_leader(self, own: Instance) -> None:
        """The oldest instance leads; while none is known, things stay as they are."""
        async with aclosing(self._registry.watch_leader(SERVICE)) as leaders:
            async for leader in leaders:
                if leader is not None:
                    self._mandate.term = leader.index if leader.id == own.id else 0
                    await self.tell(LeadershipChanged(leader.id == own.id))

    async def _list_records(self) -> None:
        """Compare books with the controller, if it is ours to do: as soon as it answers, should it be away."""
        delays = RECONNECT.delays()
        while self.engine.leader is not False and not await self._controller.list_records(self.outbox.untold()):
            await asyncio.sleep(next(delays))


async def _every(period: timedelta, now: asyncio.Event, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Call `body` once per period, and as soon as `now` is set."""
    while True:
        try:
            async with asyncio.timeout(period.total_seconds()):
                await now.wait()
        except TimeoutError:
            pass
        now.clear()
        await body()
