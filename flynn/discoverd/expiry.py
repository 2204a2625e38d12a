"""When a silent instance is gone. Pure: the leader's memory of heartbeats and the time come in as values.

Heartbeats are not replicated, so a new leader (also the only one, after a restart) has heard nobody yet. It grants
everyone a whole time to live from the moment it took over: live instances report within 5 s, dead ones go together
with no delay beyond that, and a restart of discoverd never empties the directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from flynn.discoverd.store import Directory, Expired

TTL = timedelta(seconds=10)  # a heartbeat comes every 3-5 s, so one may be lost
AFTER_TAKEOVER = 0.75  # of the time to live, for those whom a new leader has not heard yet: the next heartbeat comes
# within 5 s, and one that was under way to a dead leader has tried two dead addresses, for 3 s each, by then
CHECK_EVERY = timedelta(seconds=0.5)
STOPPED = timedelta(seconds=4)  # a check that comes so late says that this process was suspended or starved

Key = tuple[str, str]
"""Service and instance id."""


def overdue(
    state: Directory, heard: Mapping[Key, float], leading_since: float, now: float, ttl: timedelta = TTL
) -> list[Expired]:
    """The registrations that have been silent for longer than `ttl`. Times are monotonic seconds."""
    limit = now - ttl.total_seconds()
    unheard = leading_since - (1 - AFTER_TAKEOVER) * ttl.total_seconds()
    return [
        Expired(name, instance.id, instance.index)
        for name, service in state.services.items()
        for instance in service.instances.values()
        if max(heard.get((name, instance.id), unheard), unheard) < limit
    ]


def remembered(state: Directory, heard: Mapping[Key, float]) -> dict[Key, float]:
    """`heard` without the instances that are not registered any more."""
    return {
        (name, instance_id): at
        for (name, instance_id), at in heard.items()
        if (service := state.services.get(name)) is not None and instance_id in service.instances
    }
