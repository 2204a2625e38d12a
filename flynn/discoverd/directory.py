"""The directory of one running member: the replicated state, who watches it, and who has given a heartbeat.

Writes go through Raft, reads and watches are answered from what has been applied here. This is the shell around
`store`, `leader` and `expiry`; it owns the two things that are not replicated, watchers and heartbeats.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import timedelta

from flynn.aio.broadcast import Broadcast
from flynn.aio.clock import Clock
from flynn.aio.supervisor import supervisor
from flynn.discoverd import expiry, store
from flynn.discoverd.raft import node as raft
from flynn.discoverd.view import View, differences
from flynn.types.errors import ApiError, NotFound, ServiceUnavailable, ValidationError
from flynn.types.instance import DiscoverdEvent, EventKind, Instance, ServiceMeta

log = logging.getLogger(__name__)

CATCH_UP_LIMIT = 60.0  # seconds a new member may take
WATCHER_LIMIT = 1000  # live events a watcher may be behind, so that a host lost at once does not cut every stream

Publish = Callable[[store.Directory, Sequence[DiscoverdEvent]], None]


class ReplicatedStore:
    """The state machine that Raft drives, in Raft's thread; every change is published in order.

    With `shown`, the log is replayed for watchers who have seen all up to there: they hear what is new.
    """

    def __init__(self, publish: Publish, shown: store.Directory | None = None) -> None:
        self._tell = publish
        self._shown = shown
        self._state = store.Directory()

    def _publish(self, state: store.Directory, events: Sequence[DiscoverdEvent]) -> None:
        if self._shown is not None:
            if state.index < self._shown.index:
                return
            events, self._shown = _news(self._shown, state), None
        self._tell(state, events)

    def apply(self, index: int, command: bytes) -> store.Directory | ApiError:
        """The state after the command, or why it was refused."""
        try:
            applied = store.apply(self._state, index, store.decode_command(command))
        except ApiError as refusal:
            self._state = store.skip(self._state, index)
            self._publish(self._state, ())
            return refusal
        self._state = applied.state
        self._publish(applied.state, applied.events)
        return applied.state

    def dump(self) -> bytes:
        return store.encode_state(self._state)

    def restore(self, index: int, state: bytes) -> None:
        """A member that was sent a snapshot tells its watchers what they missed."""
        before, self._state = self._state, store.skip(store.decode_state(state), index)
        self._publish(self._state, _news(before, self._state))


class LiveDirectory:
    """Made by `running`."""

    def __init__(self, config: raft.RaftConfig, clock: Clock, ttl: timedelta) -> None:
        self.state = store.Directory()
        self.raft: raft.RaftNode
        self._config = config
        self._open = AsyncExitStack()  # of the Raft node
        self._switching = asyncio.Lock()  # one change of our role at a time
        self._clock = clock
        self._changes: dict[str, Broadcast[DiscoverdEvent]] = {}
        self._heartbeats = expiry.Heartbeats(ttl)
        self._expiring: set[expiry.Key] = set()
        self._ending: ApiError | None = None
        self._leadership = asyncio.Event()  # set on every change, for the task that looks after it

    # Reads.

    def service(self, name: str) -> store.Service | None:
        return self.state.services.get(name)

    async def watch(self, name: str) -> AsyncIterator[DiscoverdEvent]:
        """The state of a service, `current`, then every change; raises Overflowed when read too slowly."""
        if self._ending is not None:
            raise self._ending
        changes = self._changes.setdefault(name, Broadcast())
        async with changes.subscribe(WATCHER_LIMIT) as live:
            # Nothing is awaited between subscribing and looking, so no change is missed and none comes twice.
            replay = store.snapshot_events(name, self.service(name))
            for event in (*replay, DiscoverdEvent(service=name, kind=EventKind.CURRENT)):
                yield event
            async for event in live:
                yield event

    def end_watches(self, reason: ApiError) -> None:
        """Send all watchers elsewhere, or here again when the next process listens, and expire nobody any more.

        A process that stops takes no heartbeats. Watchers that stayed until its end would be told that everybody left.
        """
        self._ending = reason
        for changes in self._changes.values():
            changes.close(reason)

    # Writes. All of them raise ServiceUnavailable when there is no majority, or on a member that does not lead.

    async def create_service(self, name: str, leader_type: str) -> None:
        store.check_service_name(name)
        store.check_leader_type(leader_type)
        await self._commit(store.CreateService(name, leader_type))

    async def remove_service(self, name: str) -> None:
        store.check_service_name(name)
        await self._commit(store.RemoveService(name))

    async def put_meta(self, name: str, meta: ServiceMeta) -> ServiceMeta:
        state = await self._commit(store.PutMeta(name, meta))
        return ServiceMeta(data=meta.data, index=state.index, leader_id=meta.leader_id)

    async def choose_leader(self, name: str, instance_id: str) -> None:
        await self._commit(store.ChooseLeader(name, instance_id))

    async def put_instance(self, name: str, instance: Instance) -> None:
        """Register, change, or give a heartbeat: a heartbeat only touches the leader's memory."""
        store.check_instance(instance)
        service = self.service(name)
        if service is None:
            raise NotFound(f"service {name!r} not found")
        if self._heartbeats.since is None:
            raise ServiceUnavailable("this member does not lead (yet)")
        key = (name, instance.id)
        # Before and after it is committed: in between it is there to be found overdue.
        self._heartbeats.hear(key, self._clock.monotonic())
        known = service.instances.get(instance.id)
        # A heartbeat that meets its own expiry comes too late: it must go into the log behind it, as a registration.
        if known is None or key in self._expiring or not store.same_registration(known, instance):
            await self._commit(store.PutInstance(name, instance))
        self._heartbeats.hear(key, self._clock.monotonic())

    def silence(self) -> dict[str, dict[str, float]]:
        """Seconds since each instance was last heard, by service and id, as far as this member has while it leads."""
        now = self._clock.monotonic()
        silence: dict[str, dict[str, float]] = {}
        for (name, instance_id), at in self._heartbeats.heard.items():
            silence.setdefault(name, {})[instance_id] = round(now - at, 1)
        return silence

    async def remove_instance(self, name: str, instance_id: str) -> None:
        await self._commit(store.RemoveInstance(name, instance_id))

    async def forget_job(self, job_id: str) -> None:
        """Remove the instances of a job that is known to have ended, without waiting for its silence."""
        if gone := store.registrations_of(self.state, job_id):
            log.info("job ended", extra={"job": job_id, "instances": len(gone)})
            await self._commit(store.Expire(gone))

    async def _commit(self, command: store.Command) -> store.Directory:
        try:
            raw = store.encode_command(command)
        except (OverflowError, RecursionError) as error:
            raise ValidationError("", f"this cannot be stored: {error}") from error
        outcome = await self.raft.submit(raw)
        if isinstance(outcome, ApiError):
            raise outcome
        assert isinstance(outcome, store.Directory)
        return outcome

    # What Raft tells us, in the event loop.

    def publish(self, state: store.Directory, events: Sequence[DiscoverdEvent]) -> None:
        self.state = state
        for event in events:
            # A registration is heard when it is there: whoever asked for it is told a moment later, and in between
            # somebody may look for the silent.
            if event.kind is EventKind.UP and event.instance is not None:
                self._heartbeats.hear((event.service, event.instance.id), self._clock.monotonic())
            if (changes := self._changes.get(event.service)) is not None:
                changes.send(event)

    def leadership_changed(self, leading: bool) -> None:
        if leading or self._heartbeats.since is not None:
            log.info("leadership changed", extra={"leading": leading})
        self._heartbeats.cease()
        self._leadership.set()

    # Our own role.

    async def open(self) -> None:
        """Take part in the cluster as what the disk says, at the first start as what the configuration says."""
        await self._start(self._config, None)

    async def close(self) -> None:
        await self._open.aclose()

    async def promote(self, announce: Callable[[], Awaitable[int]]) -> None:
        """Become a member. `announce` tells the leader, and gives the index up to which we have to catch up.

        First the member runs, then the others are told of it: they may need its vote for that. If they cannot be
        told, we observe again.
        """
        async with self._switching:
            if self.raft.is_member:
                return
            await self._restart(joining=True)
            try:
                index = await announce()
            except BaseException:
                await self._restart(joining=False)
                raise
            self.raft.joined()
            async with asyncio.timeout(CATCH_UP_LIMIT):
                while self.raft.index < index:
                    await asyncio.sleep(0.05)

    async def demote(self, members: Collection[str]) -> None:
        """Observe from now on; `members` are those that are left."""
        async with self._switching:
            if not self.raft.is_member:
                return
            await self._open.aclose()
            await asyncio.to_thread(raft.write_members, self._config.directory, members)
            await self._start(self._config, self.state)

    async def _restart(self, *, joining: bool) -> None:
        await self._open.aclose()
        await self._start(replace(self._config, joining=joining), self.state)

    async def _start(self, config: raft.RaftConfig, shown: store.Directory | None) -> None:
        self.leadership_changed(False)
        loop = asyncio.get_running_loop()
        machine = ReplicatedStore(lambda state, events: _post(loop, self.publish, state, events), shown)
        self.raft = await self._open.enter_async_context(raft.running(config, machine, self.leadership_changed))

    # Tasks.

    async def settle_leadership(self) -> None:
        """Start to count heartbeats once everything committed before has been applied."""
        while True:
            await self._leadership.wait()
            self._leadership.clear()
            while self.raft.is_leader and self._heartbeats.since is None:
                try:
                    await self.raft.barrier()
                except raft.NotReplicated:
                    await asyncio.sleep(0.1)
                    continue
                if self._leadership.is_set():
                    break  # it was lost meanwhile, and the barrier went through another leader: look again
                self._heartbeats.lead(self._clock.monotonic())
                log.info("leading", extra={"index": self.raft.index, "services": len(self.state.services)})

    async def expire(self) -> None:
        while True:
            await self._clock.sleep(expiry.CHECK_EVERY)
            if not self.leading or self._ending is not None:
                continue  # heartbeats go to the leader: everybody would seem silent to anyone else
            now = self._clock.monotonic()
            if self._heartbeats.interrupted(now):
                log.warning("stood still for a while, so nobody expires yet")
            for name in [name for name, changes in self._changes.items() if not len(changes)]:
                del self._changes[name]
            gone = self._heartbeats.overdue(self.state, now)
            if gone:
                await self._expire(gone)

    async def _expire(self, gone: list[store.Expired]) -> None:
        names = sorted({one.service for one in gone})
        log.info("instances expired", extra={"instances": len(gone), "services": ",".join(names[:10])})
        self._expiring = {(one.service, one.instance_id) for one in gone}
        try:
            await self._commit(store.Expire(gone))
        except ServiceUnavailable as error:
            log.warning("could not expire", extra={"error": error})
        finally:
            self._expiring = set()

    @property
    def leading(self) -> bool:
        """Whether this member is the leader, knows everything committed before it was, and so may take writes."""
        return self._heartbeats.since is not None and self.raft.is_leader


@asynccontextmanager
async def running(config: raft.RaftConfig, clock: Clock, ttl: timedelta = expiry.TTL) -> AsyncIterator[LiveDirectory]:
    """Take part in the replicated directory while the block is open."""
    directory = LiveDirectory(config, clock, ttl)
    await directory.open()
    try:
        async with supervisor() as spawn:
            spawn("settle leadership", directory.settle_leadership())
            spawn("expire instances", directory.expire())
            yield directory
    finally:
        await directory.close()


def _post(
    loop: asyncio.AbstractEventLoop, publish: Publish, state: store.Directory, events: Sequence[DiscoverdEvent]
) -> None:
    try:
        loop.call_soon_threadsafe(publish, state, events)
    except RuntimeError:
        return  # The loop is closed: nobody is left to be told.


def _news(before: store.Directory, now: store.Directory) -> list[DiscoverdEvent]:
    """What somebody who knows `before` has to be told."""
    names = sorted({*before.services, *now.services})
    return [event for name in names for event in differences(name, _view(before, name), _view(now, name))]


def _view(state: store.Directory, name: str) -> View:
    service = state.services.get(name)
    if service is None:
        return View()
    return View({one.id: one for one in service.sorted_instances}, service.leader, service.meta)
