"""What clients of the directory saw, and whether one directory can have said all that. Pure.

    linearizable      compare-and-set of one document: is there one order that explains every answer (Wing and Gong
                      1993, with the memory of Lowe 2017)
    stream faults     one stream by itself: does it add up, is the leader the oldest, do indexes grow
    disagreements     several streams of one service, of any member: they must be windows into one and the same story
    lost              registrations that were taken down though their heartbeats had been acknowledged

Times are seconds of one clock. An answer that never came (`returned` infinite) may take effect at any time, or never.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

FOREVER = math.inf


class Outcome(NamedTuple):
    """What a compare-and-set was answered: the new index, `None` = refused."""

    index: int | None


@dataclass(frozen=True, slots=True)
class Write:
    """One compare-and-set: replace the document at `expected` (0: there is none) by `value`."""

    invoked: float
    returned: float
    expected: int
    value: str
    outcome: Outcome | None  # None: nobody knows


class Document(NamedTuple):
    """`known` False: written by somebody who was never told the index; it is higher than `index`."""

    index: int
    value: str | None
    known: bool = True

    def is_at(self, expected: int) -> bool:
        """Whether a writer who expects this index can have been right: he may know what we do not."""
        return expected == self.index if self.known else expected > self.index


NOTHING = Document(0, None)


def step(document: Document, write: Write) -> Document | None:
    """The document after the write, or None if the answer cannot have been given in this state.

    Of a write without an answer this is what it does if it takes effect.
    """
    fits = document.is_at(write.expected)
    if write.outcome is None:
        return Document(max(document.index, write.expected), write.value, known=False) if fits else None
    if write.outcome.index is None:
        return document if not (fits and document.known) else None
    return Document(write.outcome.index, write.value) if fits and write.outcome.index > document.index else None


def with_indexes(writes: Iterable[Write], known: Mapping[str, int]) -> list[Write]:
    """Give writes of unknown outcome the index under which somebody has seen their value."""
    return [
        Write(one.invoked, FOREVER, one.expected, one.value, Outcome(known[one.value]))
        if one.outcome is None and one.value in known
        else one
        for one in writes
    ]


def linearizable(writes: Sequence[Write], initial: Document = NOTHING) -> bool:
    """Whether some order of the writes, compatible with real time, explains every outcome.

    Depth first over "who may come next": whoever was invoked before the first pending return. Sets of finished writes
    (bits of a number) that were reached with the same document are explored once. Little is left to choose:

    - a refusal changes nothing, so it is placed as soon as it fits;
    - indexes grow, so of the accepted writes only the one with the lowest index can be next;
    - a write without an answer is tried where it fits, and need not be placed at all.
    """
    order = sorted(writes, key=lambda one: one.invoked)
    accepted = sorted(
        (i for i, one in enumerate(order) if one.outcome and one.outcome.index is not None),
        key=lambda i: order[i].outcome.index,  # type: ignore[union-attr]
    )
    required = [i for i in sorted(range(len(order)), key=lambda i: order[i].returned) if order[i].returned < FOREVER]
    refused = [i for i, one in enumerate(order) if one.outcome and one.outcome.index is None]
    unanswered = [i for i, one in enumerate(order) if one.outcome is None]
    seen: set[tuple[int, Document]] = set()
    stack: list[tuple[int, Document]] = [(0, initial)]
    while stack:
        done, document = stack.pop()
        while True:
            pending = next((i for i in required if not done >> i & 1), None)
            if pending is None:
                return True
            deadline = order[pending].returned
            placed = [
                i
                for i in refused
                if not done >> i & 1 and order[i].invoked <= deadline and step(document, order[i]) is not None
            ]
            if not placed:
                break
            done |= sum(1 << i for i in placed)
        if (done, document) in seen:
            continue
        seen.add((done, document))
        following = next((i for i in accepted if not done >> i & 1), None)
        candidates = [i for i in unanswered if not done >> i & 1] + ([following] if following is not None else [])
        for i in candidates:
            after = step(document, order[i]) if order[i].invoked <= deadline else None
            if after is not None:
                stack.append((done | 1 << i, after))
    return False


# Streams.


class Told(NamedTuple):
    """One event as a watcher was told it. `index` is that of the instance or the document, 0 for "no leader"."""

    kind: str
    id: str = ""
    index: int = 0
    version: str = ""  # what tells one update from the next: metadata of the instance, data of the document


@dataclass(frozen=True, slots=True)
class Stream:
    """One connection: what it began with (up to `current`), and what came afterwards."""

    member: str
    began: Sequence[Told]
    live: Sequence[Told]


def stream_faults(stream: Stream) -> list[str]:
    """What one connection said that cannot be: arrivals of who is there, a leader who is not the oldest, and so on."""
    faults: list[str] = []
    up: dict[str, int] = {}
    leader, document, owed = "", 0, False
    for number, event in enumerate((*stream.began, *stream.live)):
        live = number >= len(stream.began)
        if owed and event.kind not in ("leader", "down"):
            faults.append(f"#{number}: {event} where a new leader was due")
        match event.kind:
            case "up":
                if event.id in up:
                    faults.append(f"#{number}: {event.id} came twice")
                if up and event.index <= max(up.values()):
                    faults.append(f"#{number}: {event.id} has index {event.index}, older than one before it")
                up[event.id] = event.index
            case "update":
                if up.get(event.id) != event.index:
                    faults.append(f"#{number}: update of {event.id}@{event.index}, which is not there")
            case "down":
                if up.pop(event.id, None) != event.index:
                    faults.append(f"#{number}: {event.id}@{event.index} went, but was not there")
            case "leader":
                if event.id != oldest(up):
                    faults.append(f"#{number}: {event.id or 'nobody'} leads, but the oldest is {oldest(up)}")
                if live and event.id == leader:
                    faults.append(f"#{number}: {event.id} was told to lead twice")
                leader = event.id
            case "service_meta":
                if event.index <= document:
                    faults.append(f"#{number}: the document went from index {document} to {event.index}")
                document = event.index
        owed = live and leader != oldest(up)
    return faults


def oldest(up: Mapping[str, int]) -> str:
    return min(up, key=lambda id: up[id], default="")


def disagreements(streams: Sequence[Stream]) -> list[str]:
    """Where two streams tell the same stretch of the story differently: something was left out, or came twice.

    Two streams overlap if they share an event that happens once (an arrival, a document). From there they are laid side
    by side, forward to the end of the shorter and backward to the beginning of the shorter.
    """
    faults = []
    longest_first = sorted(streams, key=lambda stream: -len(stream.live))
    for number, one in enumerate(longest_first):
        places = {event: at for at, event in enumerate(one.live) if event.kind in ("up", "service_meta")}
        for other in longest_first[number + 1 :]:
            anchor = next(((places[event], at) for at, event in enumerate(other.live) if event in places), None)
            if anchor is None:
                continue
            here, there = anchor
            back = min(here, there)
            ahead = min(len(one.live) - here, len(other.live) - there)
            a, b = one.live[here - back : here + ahead], other.live[there - back : there + ahead]
            for at, (left, right) in enumerate(zip(a, b, strict=True)):
                if left != right:
                    faults.append(f"{one.member} says {left}, {other.member} says {right} ({at - back:+} of {a[back]})")
                    break
    return faults


# Registrations.


@dataclass(frozen=True, slots=True)
class Heartbeat:
    id: str
    invoked: float
    returned: float  # acknowledged then


class Down(NamedTuple):
    at: float  # when the first watcher was told
    id: str


def lost(
    heartbeats: Iterable[Heartbeat], downs: Iterable[Down], *, silence: float = 5.0, lag: float = 1.0
) -> list[str]:
    """Registrations that expired though a heartbeat had been acknowledged within `silence` seconds.

    `lag`: how much later than it happened the first watcher may have been told.
    """
    of: dict[str, list[Heartbeat]] = {}
    for heartbeat in heartbeats:
        of.setdefault(heartbeat.id, []).append(heartbeat)
    return [
        f"{down.id} was taken down at {down.at:.2f}, its heartbeat of {beat.invoked:.2f} had been acknowledged"
        for down in downs
        for beat in of.get(down.id, ())
        if beat.invoked > down.at - silence and beat.returned < down.at - lag
    ]
