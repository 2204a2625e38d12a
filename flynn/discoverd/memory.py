"""The directory inside one process: the rules of `store`, without a log, a network or heartbeats.

Nothing expires here. Everything a real cluster does to a watcher except losing the connection can be played with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from flynn.aio.broadcast import Broadcast
from flynn.discoverd import store
from flynn.discoverd.view import View, leaders
from flynn.types.codec import replace
from flynn.types.errors import ApiError, NotFound, ObjectExists
from flynn.types.instance import DiscoverdEvent, EventKind, Instance, LeaderType, ServiceMeta


@dataclass(slots=True)
class MemoryRegistration:
    registry: MemoryRegistry
    service: str
    instance: Instance

    async def set_meta(self, meta: Mapping[str, str]) -> None:
        self.instance = replace(self.instance, meta=dict(meta))
        await self.registry.register(self.service, self.instance)


@dataclass(slots=True)
class MemoryRegistry:
    """An implementation of `registry.Registry`; `state` may be looked at by tests."""

    state: store.Directory = field(default_factory=store.Directory)
    _changes: defaultdict[str, Broadcast[DiscoverdEvent]] = field(
        default_factory=lambda: defaultdict(Broadcast[DiscoverdEvent])
    )

    async def create(self, service: str, leader_type: LeaderType = LeaderType.OLDEST) -> bool:
        store.check_service_name(service)
        try:
            self._apply(store.CreateService(service, leader_type))
        except ObjectExists:
            return False
        return True

    async def remove(self, service: str) -> None:
        self._apply(store.RemoveService(service))

    async def instances(self, service: str) -> list[Instance]:
        known = self.state.services.get(service)
        return known.sorted_instances if known else []

    async def leader(self, service: str) -> Instance | None:
        known = self.state.services.get(service)
        return known.leader if known else None

    async def set_leader(self, service: str, instance_id: str) -> None:
        self._apply(store.ChooseLeader(service, instance_id))

    async def get_meta(self, service: str) -> ServiceMeta | None:
        known = self.state.services.get(service)
        return known.meta if known else None

    async def put_meta(self, service: str, meta: ServiceMeta) -> ServiceMeta:
        self._apply(store.PutMeta(service, meta))
        stored = self.state.services[service].meta
        assert stored is not None  # just written
        return stored

    async def register(self, service: str, instance: Instance) -> None:
        store.check_instance(instance)
        self._apply(store.PutInstance(service, instance))

    async def deregister(self, service: str, instance_id: str) -> None:
        try:
            self._apply(store.RemoveInstance(service, instance_id))
        except NotFound:
            return

    async def forget_job(self, job_id: str) -> None:
        self._apply(store.Expire(store.registrations_of(self.state, job_id)))

    @asynccontextmanager
    async def registered(
        self, service: str, instance: Instance, *, leader_type: LeaderType = LeaderType.OLDEST
    ) -> AsyncIterator[MemoryRegistration]:
        await self.create(service, leader_type)
        await self.register(service, instance)
        registration = MemoryRegistration(self, service, instance)
        try:
            yield registration
        finally:
            await self.deregister(service, instance.id)

    async def watch(self, service: str) -> AsyncGenerator[DiscoverdEvent, None]:
        view = View()
        # In one process a reader that falls behind can only be a test that forgot one, so there is hardly a bound.
        async with self._changes[service].subscribe(100_000) as changes:
            known = self.state.services.get(service)
            current = DiscoverdEvent(service=service, kind=EventKind.CURRENT)
            for event in (*store.snapshot_events(service, known), current):
                view.apply(event)
                yield event
            async for event in changes:
                if view.apply(event):
                    yield event

    async def watch_leader(self, service: str) -> AsyncGenerator[Instance | None, None]:
        async with aclosing(self.watch(service)) as events:
            async for leader in leaders(events):
                yield leader

    def _apply(self, command: store.Command) -> None:
        index = self.state.index + 1
        try:
            applied = store.apply(self.state, index, command)
        except ApiError:
            self.state = store.skip(self.state, index)
            raise
        self.state = applied.state
        for event in applied.events:
            self._changes[event.service].send(event)
