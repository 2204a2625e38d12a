"""The events of the host's jobs: numbered, handed to every reader, and the latest kept for those who come back.

Numbers only grow, from one event to the next and from one daemon to the next, so that a reader can say which one it has
seen last. A daemon does not know the events of the one before: who asks for those is told so, and lists the jobs.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime

from flynn.aio.broadcast import Broadcast, Subscription
from flynn.types.errors import PreconditionFailed
from flynn.types.host import JobEvent

KEPT = 1000  # a thousand events are some minutes of a busy host, and about two megabytes


@dataclass(frozen=True, slots=True)
class NumberedEvent:
    number: int
    event: JobEvent


class JobEvents:
    """One per daemon; used from the event loop only."""

    def __init__(self, now: datetime, kept: int = KEPT) -> None:
        # Microseconds: no host has a million events a second, so a later daemon begins above the last number.
        self._last = int(now.timestamp() * 1_000_000)
        self._kept: deque[NumberedEvent] = deque(maxlen=kept)
        self._forgotten = self._last  # the newest number that is not kept
        self._readers: Broadcast[NumberedEvent] = Broadcast()

    @property
    def last(self) -> int:
        """The number of the latest event."""
        return self._last

    def publish(self, event: JobEvent) -> None:
        """Number an event and hand it to everybody; a reader that is too far behind is cut off instead."""
        self._last += 1
        if len(self._kept) == self._kept.maxlen:
            self._forgotten = self._kept[0].number
        numbered = NumberedEvent(self._last, event)
        self._kept.append(numbered)
        self._readers.send(numbered)

    def after(self, number: int) -> list[NumberedEvent]:
        """Return what has happened since the event `number`.

        Raises:
            PreconditionFailed: that is not known any more, or never was.
        """
        if not self._forgotten <= number <= self._last:
            raise PreconditionFailed(f"the events after {number} are not known here: list the jobs")
        return [event for event in self._kept if event.number > number]

    def subscribe(self, limit: int = KEPT) -> AbstractAsyncContextManager[Subscription[NumberedEvent]]:
        """Everything published while the block is open, at most `limit` events behind (then `Overflowed`)."""
        return self._readers.subscribe(limit)

    def close(self) -> None:
        """End all subscriptions."""
        self._readers.close()
