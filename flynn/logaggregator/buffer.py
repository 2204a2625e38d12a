"""The recent lines of every app, in order of time, within a fixed budget of memory.

Lines come from several hosts, live or replayed, so they arrive out of order and sometimes twice. Followers get lines in
order of arrival through a bounded queue; what a slow follower misses is counted and told to it.

Pure data structures, used from one task.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

from flynn.logaggregator.rfc5424 import Message

MAX_LINES = 10000  # per app
MAX_BYTES = 64 << 20  # of all apps together, estimated
MESSAGE_OVERHEAD_BYTES = 220  # measured: the object, its time, its number, its place in the list
SLACK = 20  # one more line in so many is kept, unseen, so that not every line has to push another one out
FOLLOWER_LIMIT = 1000

Cursor = tuple[datetime, int]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which lines a reader wants; None does not restrict."""

    job_id: str | None = None
    process_type: str | None = None  # "" = jobs without a type
    streams: frozenset[str] | None = None

    def admits(self, message: Message) -> bool:
        if self.streams is not None and message.stream not in self.streams:
            return False
        if self.process_type is not None and message.process_type() != self.process_type:
            return False
        return self.job_id is None or message.job_id() == self.job_id


class Follower:
    """The lines that arrived since it was last asked; `wake` is called when there is something."""

    def __init__(self, wanted: Filter, wake: Callable[[], None], limit: int = FOLLOWER_LIMIT) -> None:
        self._wanted = wanted
        self._wake = wake
        self._limit = limit
        self._waiting: list[Message] = []
        self._missed = 0

    def offer(self, message: Message) -> None:
        if not self._wanted.admits(message):
            return
        if len(self._waiting) >= self._limit:
            self._missed += 1
        else:
            self._waiting.append(message)
        self._wake()

    def take(self) -> tuple[list[Message], int]:
        """Return the lines that are waiting, and how many were dropped after them."""
        taken = self._waiting, self._missed
        self._waiting, self._missed = [], 0
        return taken


@dataclass(slots=True)
class AppLog:
    """The lines of one app, oldest first."""

    lines: list[Message] = field(default_factory=list)
    size: int = 0  # bytes, estimated

    def insert(self, message: Message, max_lines: int) -> bool:
        """Put a line in its place; False for one that is there already, or older than all of a full buffer."""
        lines, place = self.lines, _place(message)
        position = len(lines)
        if lines and _place(lines[-1]) >= place:  # hosts that replay, or whose lines come late; else it is the last one
            position = bisect_left(lines, place, key=_place)
            if _place(lines[position]) == place:
                return False
        if position == 0 and len(lines) >= max_lines:
            return False
        lines.insert(position, message)
        self.size += _weight(message)
        if len(lines) > max_lines + max_lines // SLACK:
            self.drop_oldest(len(lines) - max_lines)
        return True

    def drop_oldest(self, count: int) -> int:
        """Remove lines from the old end; returns the bytes set free."""
        freed = sum(_weight(message) for message in self.lines[:count])
        del self.lines[:count]
        self.size -= freed
        return freed


class Logs:
    """The buffers of all apps, the hosts' cursors, and the followers."""

    def __init__(self, *, max_lines: int = MAX_LINES, max_bytes: int = MAX_BYTES) -> None:
        self._apps: dict[str, AppLog] = {}
        self._followers: dict[str, set[Follower]] = {}
        self._max_lines = max_lines
        self._max_bytes = max_bytes
        self.size = 0
        self.cursors: dict[str, Cursor] = {}

    def add(self, message: Message) -> None:
        """Take in one line: move its host's cursor, keep it, and tell the followers."""
        cursor = self.cursors.get(message.host)
        if cursor is None or message.cursor > cursor:
            self.cursors[message.host] = message.cursor
        log = self._apps.get(message.app)
        if log is None:
            log = self._apps[message.app] = AppLog()
        before = log.size
        if not log.insert(message, self._max_lines):
            return
        self.size += log.size - before
        if self.size > self._max_bytes:
            self._make_room()
        for follower in self._followers.get(message.app, ()):
            follower.offer(message)

    def read(self, app: str, wanted: Filter, last: int = 0) -> list[Message]:
        """Return the last lines that are wanted, oldest first; 0 = all of them."""
        log = self._apps.get(app)
        if log is None:
            return []
        if not last:
            return [message for message in self._seen(log) if wanted.admits(message)]
        found: list[Message] = []
        for message in reversed(self._seen(log)):
            if wanted.admits(message):
                found.append(message)
                if len(found) == last:
                    break
        return found[::-1]

    def _seen(self, log: AppLog) -> list[Message]:
        return log.lines[-self._max_lines :]

    def follow(self, app: str, follower: Follower) -> None:
        """Let `follower` hear of every line of `app` from now on."""
        self._followers.setdefault(app, set()).add(follower)

    def unfollow(self, app: str, follower: Follower) -> None:
        followers = self._followers.get(app, set())
        followers.discard(follower)
        if not followers:
            self._followers.pop(app, None)

    def everything(self) -> Iterator[Message]:
        """Iterate over all lines, app by app, as they were when each app's turn came."""
        for app in list(self._apps):
            yield from self._seen(self._apps[app])

    def _make_room(self) -> None:
        """The chattiest app pays: a tenth of the largest buffer goes, so that this is not needed for every line."""
        largest = max(self._apps.values(), key=lambda log: log.size)
        self.size -= largest.drop_oldest(max(1, len(largest.lines) // 10))


def _place(message: Message) -> tuple[datetime, str, int]:
    """Orders the lines of an app. Lines that a host has read together have one time, and there may be thousands."""
    return message.time, message.host, message.seq


def _weight(message: Message) -> int:
    return MESSAGE_OVERHEAD_BYTES + len(message.text)
