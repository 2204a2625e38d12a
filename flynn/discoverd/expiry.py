"""When a silent instance is gone. Pure: the time comes in as a value, monotonic seconds of the leader's own clock.

Heartbeats are not replicated, so a new leader (also the only one, after a restart) has heard nobody yet. It grants
everyone most of a time to live from the moment it took over: live instances report within 5 s, dead ones go together
with no delay beyond that, and a restart of discoverd never empties the directory.

Two rules keep the leader's own trouble from being blamed on others. A look that comes late says that this process
stood still, with the heartbeats of the others waiting in its sockets; one that comes early by the clock says that the
clock was turned back. Both grant everyone a whole time to live from that moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

from flynn.discoverd.store import Directory, Expired

TTL = timedelta(seconds=10)  # a heartbeat comes every 3-5 s, so one may be lost
AFTER_TAKEOVER = 0.75  # of the time to live, for those whom a new leader has not heard yet: the next heartbeat comes
# within 5 s, and one that was under way to a dead leader has tried two dead addresses, for 3 s each, by then
CHECK_EVERY = timedelta(seconds=0.5)
STOPPED = timedelta(seconds=4)  # a check that comes so late says that this process was suspended or starved

Key = tuple[str, str]
"""Service and instance id."""


@dataclass(slots=True)
class Heartbeats:
    """What one leader has heard since it leads, or since it began anew."""

    ttl: timedelta = TTL
    since: float | None = None  # when this began; None while not leading
    heard: dict[Key, float] = field(default_factory=dict)
    looked: float = 0.0
    _granted: float = 0.0  # whom nobody has heard yet is taken to be heard at this moment

    def lead(self, now: float) -> None:
        """Begin to lead, having heard nobody yet."""
        self.since = self.looked = now
        self._granted = now - (1 - AFTER_TAKEOVER) * self.ttl.total_seconds()
        self.heard = {}

    def cease(self) -> None:
        self.since = None
        self.heard = {}

    def hear(self, key: Key, now: float) -> None:
        self.heard[key] = now

    def interrupted(self, now: float) -> bool:
        """Whether the time since the last look cannot be trusted; then everybody is taken to be heard just now."""
        jump = now - self.looked
        self.looked = now
        if self.since is None or 0 <= jump <= STOPPED.total_seconds():
            return False
        self.heard = {}  # these times are of another clock
        self._granted = now
        return True

    def overdue(self, state: Directory, now: float) -> list[Expired]:
        """The registrations that have been silent for longer than the time to live, or nobody while not leading."""
        if self.since is None:
            return []
        self._forget_departed(state, now)
        limit = now - self.ttl.total_seconds()
        return [
            Expired(name, instance.id, instance.index)
            for name, service in state.services.items()
            for instance in service.instances.values()
            if max(self.heard.get((name, instance.id), self._granted), self._granted) < limit
        ]

    def _forget_departed(self, state: Directory, now: float) -> None:
        """Whoever is not registered may be about to be: what was heard of him lately still counts then."""
        recent = now - self.ttl.total_seconds()
        self.heard = {
            (name, instance_id): at
            for (name, instance_id), at in self.heard.items()
            if at > recent or ((service := state.services.get(name)) is not None and instance_id in service.instances)
        }
