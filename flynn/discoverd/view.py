"""What one watcher believes about one service, and how a replay after a lost connection becomes differences.

A stream always begins with the whole state and says `current` when it is complete. The first time that is news; after
a reconnect most of it is not, and what vanished in between is not mentioned at all. `Replay` turns both into the same
thing: events that say what changed for *this* watcher. Pure: no connection, no clock.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from flynn.discoverd.store import same_registration
from flynn.types.instance import DiscoverdEvent, EventKind, Instance, ServiceMeta


@dataclass(slots=True)
class View:
    """The state of one service as told by events."""

    instances: dict[str, Instance] = field(default_factory=dict)
    leader: Instance | None = None
    meta: ServiceMeta | None = None

    def apply(self, event: DiscoverdEvent) -> bool:
        """Take one event in; returns whether it said anything new."""
        match event.kind:
            case EventKind.UP | EventKind.UPDATE if event.instance is not None:
                known = self.instances.get(event.instance.id)
                self.instances[event.instance.id] = event.instance
                return known is None or not same_instance(known, event.instance)
            case EventKind.DOWN if event.instance is not None:
                return self.instances.pop(event.instance.id, None) is not None
            case EventKind.LEADER:
                before, self.leader = self.leader, event.instance
                return (before and before.id) != (event.instance and event.instance.id)
            case EventKind.SERVICE_META:
                old, self.meta = self.meta, event.service_meta
                return old != event.service_meta
        return False


def same_instance(a: Instance, b: Instance) -> bool:
    return a.index == b.index and same_registration(a, b)


def differences(service: str, old: View, new: View) -> list[DiscoverdEvent]:
    """What to tell someone who believes `old`: arrivals before departures, so that no set runs empty on the way."""

    def event(kind: EventKind, instance: Instance | None) -> DiscoverdEvent:
        return DiscoverdEvent(service=service, kind=kind, instance=instance)

    events: list[DiscoverdEvent] = []
    for key, instance in new.instances.items():
        if (known := old.instances.get(key)) is None:
            events.append(event(EventKind.UP, instance))
        elif not same_instance(known, instance):
            events.append(event(EventKind.UPDATE, instance))
    events += [event(EventKind.DOWN, gone) for key, gone in old.instances.items() if key not in new.instances]
    if (old.leader and old.leader.id) != (new.leader and new.leader.id):
        events.append(event(EventKind.LEADER, new.leader))
    if new.meta is not None and new.meta != old.meta:
        events.append(DiscoverdEvent(service=service, kind=EventKind.SERVICE_META, service_meta=new.meta))
    return events


class Replay:
    """Turns the events of a chain of connections into one gapless story.

    Everything up to `current` is held back and compared as a whole, so a connection that breaks in mid-replay leaves
    no trace. `current` is passed on once in a lifetime: later ones would tell a consumer nothing it could act on.
    """

    def __init__(self, service: str) -> None:
        self._service = service
        self._view = View()
        self._incoming: View | None = View()
        self._said_current = False

    def feed(self, event: DiscoverdEvent) -> list[DiscoverdEvent]:
        if self._incoming is None:
            return [event] if self._view.apply(event) else []
        if event.kind is not EventKind.CURRENT:
            self._incoming.apply(event)
            return []
        events = differences(self._service, self._view, self._incoming)
        self._view, self._incoming = self._incoming, None
        if not self._said_current:
            self._said_current = True
            events.append(event)
        return events

    def disconnected(self) -> None:
        """The next event is the first of a new replay."""
        self._incoming = View()


async def leaders(events: AsyncIterator[DiscoverdEvent]) -> AsyncIterator[Instance | None]:
    """The leaders in a watch: who it is when the watch is current, then every change."""
    leader: Instance | None = None
    current = False
    async for event in events:
        match event.kind:
            case EventKind.LEADER:
                leader = event.instance
                if current:
                    yield leader
            case EventKind.CURRENT:
                current = True
                yield leader
