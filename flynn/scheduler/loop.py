"""The shell around the engine: one loop that feeds it events and performs its actions; everything slow is a task.

State has one owner, the loop in `run`. Streams and timers put events into its queue; tasks that talk to hosts answer
with events. The queue is bounded: a full one makes the streams wait, never the decisions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, aclosing
from datetime import timedelta
from typing import Any, assert_never

from flynn.aio.backoff import Backoff
from flynn.aio.clock import Clock
from flynn.aio.supervisor import Spawn, TaskSet
from flynn.discoverd.registry import Registry
from flynn.jobspec import split_job_id
from flynn.router.client import RouterEvent, RouterEventKind
from flynn.scheduler import wire
from flynn.scheduler.engine import Engine
from flynn.scheduler.events import (
    Action,
    BackendDrained,
    BackendUp,
    CheckHost,
    CompleteScaleRequest,
    Drained,
    DropPending,
    Event,
    FollowHost,
    FormationReceived,
    FormationsListed,
    HostChecked,
    HostGone,
    HostSeen,
    JobReported,
    JobsListed,
    LeadershipChanged,
    ListingFailed,
    PersistJob,
    PersistVolume,
    RecordsListed,
    RecordsUnavailable,
    Resync,
    RouteRemoved,
    RouterGone,
    RouteSet,
    ServiceListed,
    StartDone,
    StartJob,
    StopDone,
    StopJob,
    Tick,
    UnfollowHost,
    VolumeDecommissioned,
    VolumesListed,
    WatchServices,
)
from flynn.scheduler.model import HostID, JobID, RouterID, VolumeID, VolumeState
from flynn.scheduler.neighbours import ControllerApi, HostApi, HostDialer, RouterDialer
from flynn.scheduler.outbox import Outbox
from flynn.types.codec import ZERO_TIME
from flynn.types.errors import ApiError, Conflict, NotFound
from flynn.types.host import HostJob
from flynn.types.instance import EventKind, Instance
from flynn.types.volume import Volume

log = logging.getLogger(__name__)

SERVICE = "controller-scheduler"
HOST_SERVICE = "flynn-host"
ROUTER_SERVICE = "router-api"

QUEUE_LIMIT = 10_000
JOBS_EVERY = timedelta(seconds=30)
FORMATIONS_EVERY = timedelta(seconds=60)
HOSTS_EVERY = timedelta(seconds=10)
ROUTERS_WITHOUT_EVENTS = timedelta(seconds=60)  # a router that has no event stream is asked again after this
PROBE_LIMIT = timedelta(seconds=1)
DRAIN_LIMIT = timedelta(seconds=10)
UNROUTED_DRAIN = timedelta(seconds=1)  # for routers to see a job leave its service when none of them reports backends
RECONNECT = Backoff(first=timedelta(milliseconds=100), limit=timedelta(seconds=3))
LISTING_SLOTS = 16
QUICK = timedelta(seconds=10)  # for requests to hosts that only take something in


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
    ) -> None:
        self.engine = engine
        self._registry = registry
        self._controller = controller
        self._dial_host = dial_host
        self._dial_router = dial_router
        self._clock = clock
        self._tasks = tasks
        self.outbox = Outbox(controller, tasks)
        self._queue: asyncio.Queue[Event] = asyncio.Queue(QUEUE_LIMIT)
        self._addresses: dict[HostID, Instance] = {}  # of the hosts that discoverd lists
        self._hosts: dict[HostID, HostApi] = {}  # of the hosts that are followed
        self._followers: dict[HostID, asyncio.Task[Any]] = {}
        self._service_tasks: dict[str, asyncio.Task[Any]] = {}
        self._drained: dict[JobID, asyncio.Event] = {}
        self._listing = asyncio.Semaphore(LISTING_SLOTS)
        self._hosts_current = asyncio.Event()
        self._formations_current = asyncio.Event()
        self._resync_jobs = asyncio.Event()
        self._resync_formations = asyncio.Event()

    def start(self, spawn: Spawn) -> None:
        """Start everything but the watch of the leadership, which waits until the scheduler is registered."""
        spawn("decide", self.run())
        spawn("watch hosts", self._watch_hosts())
        spawn("compare hosts", self._compare_hosts())
        spawn("follow formations", self._follow_formations())
        spawn("follow volumes", self._follow_volumes())
        spawn("list jobs", self._every(JOBS_EVERY, self._resync_jobs, self._list_jobs))
        spawn("list formations", self._every(FORMATIONS_EVERY, self._resync_formations, self._list_formations))
        spawn("watch routers", self._watch_routers())

    async def caught_up(self) -> None:
        """Return when hosts and formations are known."""
        await self._hosts_current.wait()
        await self._formations_current.wait()

    # The loop

    async def run(self) -> None:
        """Feed the engine and perform what it asks for, for ever."""
        while True:
            events = [await self._next_event()]
            while not self._queue.empty():
                events.append(self._queue.get_nowait())
            for action in self.engine.step(events, self._clock.now()):
                self._perform(action)

    async def _next_event(self) -> Event:
        due = self.engine.next_due()
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
                self._tasks.start(f"start {action.job.cluster_id}", self._start_job(action))
            case StopJob():
                self._tasks.start(f"stop {action.host}-{action.job}", self._stop_job(action))
            case Drained(job):
                if job in self._drained:
                    self._drained[job].set()
            case FollowHost(host):
                self._followers[host] = self._tasks.start(f"follow {host}", self._follow_host(host))
            case UnfollowHost(host):
                self._followers.pop(host).cancel()
            case CheckHost(host):
                self._tasks.start(f"check {host}", self._check_host(host))
            case WatchServices(services):
                self._watch_services(services)
            case Resync():
                self._resync_jobs.set()
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
                    await self.tell(LeadershipChanged(leader.id == own.id))

    # Hosts

    async def _watch_hosts(self) -> None:
        async with aclosing(self._registry.watch(HOST_SERVICE)) as events:
            async for event in events:
                if event.kind is EventKind.CURRENT:
                    self._hosts_current.set()
                    continue
                instance = event.instance
                if instance is None or not instance.meta.get("id"):
                    continue
                host = HostID(instance.meta["id"])
                if event.kind in (EventKind.UP, EventKind.UPDATE):
                    self._addresses[host] = instance
                    await self.tell(_seen(host, instance))
                elif event.kind is EventKind.DOWN:
                    self._addresses.pop(host, None)
                    await self.tell(HostGone(host))

    async def _compare_hosts(self) -> None:
        """Level, not edge: what the directory lists is followed, what it does not list is probed again and again."""
        while True:
            await self._clock.sleep(HOSTS_EVERY)
            if not self._hosts_current.is_set():
                continue
            for host in set(self.engine.world.hosts) - set(self._addresses):
                await self.tell(HostGone(host))
            for host, instance in list(self._addresses.items()):
                if host not in self.engine.world.hosts:
                    await self.tell(_seen(host, instance))

    async def _follow_host(self, host: HostID) -> None:
        """Keep a host's event stream open; list its jobs each time it begins, so that nothing falls between."""
        delays = RECONNECT.delays()
        async with AsyncExitStack() as stack:
            address: Instance | None = None
            while True:
                try:
                    current = self._addresses.get(host) or address
                    if current is None:
                        raise NotFound(f"{host} is not in the directory")
                    if address is None or current.addr != address.addr:
                        await stack.aclose()
                        self._hosts[host] = await stack.enter_async_context(self._dial_host(host, current))
                        stack.callback(self._hosts.pop, host, None)
                        address = current
                    api = self._hosts[host]
                    async with api.subscribed() as events:
                        await self._list_host(host, api)
                        delays = RECONNECT.delays()
                        async for event in events:
                            if event.job is not None and (report := wire.report(host, event.job)) is not None:
                                await self.tell(JobReported(report))
                except (ApiError, TimeoutError) as error:
                    log.info("host stream interrupted", extra={"host": host, "error": error})
                    await self.tell(ListingFailed(host))
                await asyncio.sleep(next(delays))

    async def _list_host(self, host: HostID, api: HostApi) -> None:
        asked_at = self._clock.now()
        async with asyncio.timeout(QUICK.total_seconds()):
            volumes = await api.volumes()
            jobs = await api.jobs()
        owned = (wire.volume_of_host(host, info) for info in volumes)
        reports = (wire.report(host, active) for active in jobs.values())
        await self.tell(VolumesListed(host, tuple(volume for volume in owned if volume is not None), asked_at))
        await self.tell(JobsListed(host, tuple(report for report in reports if report is not None), asked_at))

    async def _check_host(self, host: HostID) -> None:
        alive = False
        api = self._hosts.get(host)
        if api is not None:
            try:
                async with asyncio.timeout(PROBE_LIMIT.total_seconds()):
                    alive = (await api.status()).id == host
            except (ApiError, TimeoutError) as error:
                log.debug("host does not answer", extra={"host": host, "error": error})
        await self.tell(HostChecked(host, alive))

    # Listings

    async def _every(
        self, period: timedelta, now: asyncio.Event, body: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        while True:
            try:
                async with asyncio.timeout(period.total_seconds()):
                    await now.wait()
            except TimeoutError:
                pass
            now.clear()
            await body()

    async def _list_jobs(self) -> None:
        async def one(host: HostID, api: HostApi) -> None:
            try:
                async with self._listing:
                    await self._list_host(host, api)
            except (ApiError, TimeoutError) as error:
                log.info("host cannot be listed", extra={"host": host, "error": error})
                await self.tell(ListingFailed(host))

        async with asyncio.TaskGroup() as group:
            for host, api in list(self._hosts.items()):
                group.create_task(one(host, api), name=f"list {host}")
        if self.engine.leader is False:
            return
        asked_at = self._clock.now()
        try:
            async with asyncio.timeout(QUICK.total_seconds()):
                jobs = await self._controller.active_jobs()
        except (ApiError, TimeoutError) as error:
            log.info("the controller's jobs cannot be listed", extra={"error": error})
            await self.tell(RecordsUnavailable())
        else:
            await self.tell(RecordsListed(tuple(wire.record(job) for job in jobs), asked_at))

    async def _list_formations(self) -> None:
        asked_at = self._clock.now()
        try:
            async with asyncio.timeout(QUICK.total_seconds()):
                listed = await self._controller.active_formations()
        except (ApiError, TimeoutError) as error:
            log.info("formations cannot be listed", extra={"error": error})
            await self.tell(RecordsUnavailable())
        else:
            converted = (wire.formation(item) for item in listed)
            await self.tell(FormationsListed(tuple(item for item in converted if item is not None), asked_at))

    async def _follow_formations(self) -> None:
        since = ZERO_TIME
        delays = RECONNECT.delays()
        while True:
            newest = since
            try:
                async for item in self._controller.follow_formations(since):
                    formation = wire.formation(item)
                    if formation is None:
                        # Only now is everything up to the newest one known.
                        since = newest
                        self._formations_current.set()
                        delays = RECONNECT.delays()
                        continue
                    newest = max(newest, item.updated_at)
                    if self._formations_current.is_set():
                        since = newest
                    await self.tell(FormationReceived(formation))
            except ApiError as error:
                log.info("formation stream interrupted", extra={"error": error})
            await asyncio.sleep(next(delays))

    async def _follow_volumes(self) -> None:
        """Only the end of volumes is news from the controller; what exists, hosts tell."""
        delays = RECONNECT.delays()
        while True:
            try:
                async for volume in self._controller.follow_volumes():
                    delays = RECONNECT.delays()
                    if _decommissioned(volume):
                        await self.tell(VolumeDecommissioned(VolumeID(volume.id)))
            except ApiError as error:
                log.debug("volume stream interrupted", extra={"error": error})
            await asyncio.sleep(next(delays))

    # Services and routers

    def _watch_services(self, services: frozenset[str]) -> None:
        for service in set(self._service_tasks) - services:
            self._service_tasks.pop(service).cancel()
        for service in services - set(self._service_tasks):
            self._service_tasks[service] = self._tasks.start(f"watch {service}", self._watch_service(service))

    async def _watch_service(self, service: str) -> None:
        jobs: dict[str, JobID] = {}
        async with aclosing(self._registry.watch(service)) as events:
            async for event in events:
                if event.instance is not None:
                    uuid = _job_of(event.instance.meta)
                    if event.kind in (EventKind.UP, EventKind.UPDATE) and uuid is not None:
                        jobs[event.instance.id] = uuid
                    elif event.kind is EventKind.DOWN:
                        jobs.pop(event.instance.id, None)
                    else:
                        continue
                    await self.tell(ServiceListed(service, frozenset(jobs.values())))

    async def _watch_routers(self) -> None:
        followers: dict[str, asyncio.Task[Any]] = {}
        async with aclosing(self._registry.watch(ROUTER_SERVICE)) as events:
            async for event in events:
                if event.instance is None:
                    continue
                id = event.instance.id
                if event.kind is EventKind.UP and id not in followers:
                    followers[id] = self._tasks.start(f"router {id}", self._follow_router(event.instance))
                elif event.kind is EventKind.DOWN and id in followers:
                    followers.pop(id).cancel()
                    await self.tell(RouterGone(RouterID(id)))

    async def _follow_router(self, instance: Instance) -> None:
        router = RouterID(instance.id)
        delays = RECONNECT.delays()
        while True:
            pause = next(delays)
            try:
                async with self._dial_router(instance) as events:
                    async for event in events:
                        delays = RECONNECT.delays()
                        if (news := _router_news(router, event)) is not None:
                            await self.tell(news)
            except NotFound:
                pause = ROUTERS_WITHOUT_EVENTS.total_seconds()
            except ApiError as error:
                log.info("router stream interrupted", extra={"router": instance.addr, "error": error})
            await self.tell(RouterGone(router))
            await asyncio.sleep(pause)

    # Jobs

    async def _start_job(self, action: StartJob) -> None:
        job, error, created = action.job, "", []
        assert job.host is not None
        try:
            api = self._hosts.get(job.host)
            if api is None:
                raise NotFound(f"host {job.host} is not connected")
            asked = wire.host_job(job, action.formation, action.volumes)
            async with asyncio.timeout(QUICK.total_seconds()):
                for volume in action.volumes:
                    if volume.state is VolumeState.PENDING:
                        await api.create_volume(wire.volume_request(volume))
                        created.append(volume.id)
                await _add_job(api, asked)
        except (ApiError, TimeoutError) as failure:
            error = str(failure) or "timed out"
        except KeyError:
            error = f"release {job.release} has no process type {job.type}"
        await self.tell(StartDone(job.id, job.host, tuple(created), error))

    async def _stop_job(self, action: StopJob) -> None:
        """Out of service, drained, stopped. A step that fails does not keep the next one from being tried."""
        cluster_id = f"{action.host}-{action.job}"
        api = self._hosts.get(action.host)
        if api is not None:
            if action.serves:
                await self._take_out_of_service(api, action, cluster_id)
            try:
                await api.stop_job(cluster_id)
            except ApiError as error:
                # The next listing of the host tells whether there is still something to stop.
                log.info("stop failed", extra={"job": cluster_id, "error": error})
        await self.tell(StopDone(action.job, action.host))

    async def _take_out_of_service(self, api: HostApi, action: StopJob, cluster_id: str) -> None:
        drained = self._drained[action.job] = asyncio.Event()
        try:
            async with asyncio.timeout(QUICK.total_seconds()):
                await api.deregister_job(cluster_id)
            limit = DRAIN_LIMIT if action.carried else UNROUTED_DRAIN
            async with asyncio.timeout(limit.total_seconds()):
                await drained.wait()
        except TimeoutError:
            pass
        except ApiError as error:
            log.info("job cannot be deregistered", extra={"job": cluster_id, "error": error})
        finally:
            self._drained.pop(action.job, None)


async def _add_job(api: HostApi, job: HostJob) -> None:
    try:
        await api.add_job(job)
    except Conflict:
        # An earlier request whose answer was lost has succeeded, or a volume is in use.
        try:
            await api.job(job.id)
        except NotFound:
            pass
        else:
            return
        raise


def _seen(host: HostID, instance: Instance) -> HostSeen:
    tags = {
        key.removeprefix(wire.TAG_PREFIX): value
        for key, value in instance.meta.items()
        if key.startswith(wire.TAG_PREFIX)
    }
    return HostSeen(host, tags, shutting_down=wire.SHUTDOWN in instance.meta)


def _router_news(router: RouterID, event: RouterEvent) -> Event | None:
    parts = split_job_id(event.backend.job_id) if event.backend is not None else None
    match event.event:
        case RouterEventKind.SET if event.route is not None and event.route.drain_backends:
            # Of services that are not drained routers tell no backends: nothing could be waited for.
            return RouteSet(router, event.route.service)
        case RouterEventKind.REMOVE if event.route is not None:
            return RouteRemoved(router, event.route.service)
        case RouterEventKind.BACKEND_UP if event.backend is not None and parts is not None:
            return BackendUp(router, event.backend.service, JobID(parts[1]))
        case RouterEventKind.BACKEND_DRAINED if parts is not None:
            return BackendDrained(router, JobID(parts[1]))
    return None


def _job_of(meta: Mapping[str, str]) -> JobID | None:
    parts = split_job_id(meta.get("FLYNN_JOB_ID", ""))
    return JobID(parts[1]) if parts is not None else None


def _decommissioned(volume: Volume) -> bool:
    return bool(volume.id) and volume.decommissioned_at is not None and volume.decommissioned_at != ZERO_TIME
